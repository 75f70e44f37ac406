//! The image file's header and section table, as bytes. Pure: slices in, values out.
//!
//! `docs/image-format.md` is the specification; the layout below is its summary. All integers little-endian.
//!
//! ```text
//! header, 64 bytes      magic[8] version:u32 section_count:u32 reserved[16]=0 image_hash[32]
//! section entry, 72     kind:u32 reserved:u32=0 content_len:u64 offset:u64 stored_len:u64 reserved:u64=0 hash[32]
//! section, at offset    chunk table (stored_len:u32 hash[32] per MiB of content), then the stored chunks
//! ```

/// The first eight bytes of every image. The control characters show a file mangled as text.
pub const MAGIC: [u8; 8] = *b"ORRERY\x1a\n";
/// The version that this program reads and writes.
pub const VERSION: u32 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of an entry of the section table.
pub const ENTRY_BYTES: usize = 72;
/// Bytes of content per chunk; only the last chunk of a section is shorter.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Bytes of an entry of a section's chunk table.
pub const CHUNK_ENTRY_BYTES: usize = 36;
/// Most sections an image may have.
pub const MAX_SECTIONS: usize = 64;
/// Most disks an image may have.
pub const MAX_DISKS: usize = 16;
/// Largest disk.
pub const MAX_DISK_BYTES: u64 = 64 << 30;
/// Most bytes of all sections together that are not whole chunks of zeroes: what opening may take of the host's
/// memory.
pub const MAX_MATERIAL_BYTES: u64 = 8 << 30;

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum SectionKind {
    /// bzImage or ELF, as the kernel's build made it.
    Kernel = 1,
    /// Uncompressed or compressed cpio archive.
    Initramfs = 2,
    /// A raw disk. May occur several times; the order is that of the machine's disks.
    Disk = 3,
    /// Kernel command line, UTF-8.
    CommandLine = 4,
    /// Entry command and arguments, each ended by NUL.
    Entry = 5,
    /// Environment of the entry command, `NAME=VALUE` each ended by NUL.
    Environment = 6,
    /// JSON object with facts about the build.
    Metadata = 7,
}

impl SectionKind {
    /// The kind with this number.
    pub fn from_number(number: u32) -> Option<SectionKind> {
        use SectionKind::*;
        [Kernel, Initramfs, Disk, CommandLine, Entry, Environment, Metadata]
            .into_iter()
            .find(|kind| *kind as u32 == number)
    }

    /// What messages call it.
    pub fn name(self) -> &'static str {
        match self {
            SectionKind::Kernel => "kernel",
            SectionKind::Initramfs => "initramfs",
            SectionKind::Disk => "disk",
            SectionKind::CommandLine => "command line",
            SectionKind::Entry => "entry command",
            SectionKind::Environment => "environment",
            SectionKind::Metadata => "metadata",
        }
    }

    /// Largest content, in bytes.
    pub fn limit_bytes(self) -> u64 {
        match self {
            SectionKind::Kernel => 512 << 20,
            SectionKind::Initramfs => 2 << 30,
            SectionKind::Disk => MAX_DISK_BYTES,
            SectionKind::CommandLine => 2047,
            SectionKind::Entry | SectionKind::Environment | SectionKind::Metadata => 1 << 20,
        }
    }

    /// Whether an image may have several.
    pub fn repeats(self) -> bool {
        self == SectionKind::Disk
    }
}

/// A row of the section table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionEntry {
    /// What the section holds.
    pub kind: SectionKind,
    /// Bytes of content.
    pub content_len: u64,
    /// Where the section begins in the file.
    pub offset: u64,
    /// Bytes it takes there, chunk table included.
    pub stored_len: u64,
    /// The content's hash, see [`section_hash`].
    pub hash: [u8; 32],
}

/// Why header or table cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FormatError {
    /// The magic is not there.
    NotAnImage,
    /// Another version.
    Version(u32),
    /// The file is shorter than header and table.
    Truncated {
        /// What header and table take.
        needed: u64,
    },
    /// A contradiction.
    Corrupt {
        /// Where.
        section: String,
        /// What.
        reason: String,
    },
    /// A size beyond its limit.
    TooLarge {
        /// Where.
        section: String,
        /// The declared size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
}

/// Chunks of a section with this much content.
pub fn chunk_count(content_len: u64) -> usize {
    content_len.div_ceil(CHUNK_BYTES as u64) as usize
}

/// BLAKE3 of one chunk's content.
pub fn chunk_hash(content: &[u8]) -> [u8; 32] {
    *blake3::hash(content).as_bytes()
}

/// The hash of a section's content: BLAKE3 in key-derivation mode over its length and its chunks' hashes. It does
/// not depend on how the chunks are stored.
pub fn section_hash(content_len: u64, chunk_hashes: impl IntoIterator<Item = [u8; 32]>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("orrery image v1 section");
    hasher.update(&content_len.to_le_bytes());
    for hash in chunk_hashes {
        hasher.update(&hash);
    }
    *hasher.finalize().as_bytes()
}

/// The image's hash: BLAKE3 in key-derivation mode over the version and each section's kind, length and hash.
pub fn image_hash(sections: &[SectionEntry]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("orrery image v1");
    hasher.update(&VERSION.to_le_bytes());
    hasher.update(&(sections.len() as u32).to_le_bytes());
    for section in sections {
        hasher.update(&(section.kind as u32).to_le_bytes());
        hasher.update(&section.content_len.to_le_bytes());
        hasher.update(&section.hash);
    }
    *hasher.finalize().as_bytes()
}

/// Header and section table.
pub fn encode_table(sections: &[SectionEntry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + sections.len() * ENTRY_BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(sections.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&[0; 16]);
    bytes.extend_from_slice(&image_hash(sections));
    for section in sections {
        bytes.extend_from_slice(&(section.kind as u32).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&section.content_len.to_le_bytes());
        bytes.extend_from_slice(&section.offset.to_le_bytes());
        bytes.extend_from_slice(&section.stored_len.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&section.hash);
    }
    bytes
}

/// Reads header and section table from the beginning of a file and checks everything that can be checked without
/// the sections: magic, version, bounds, order, limits, and the image hash.
pub fn decode_table(file: &[u8]) -> Result<(Vec<SectionEntry>, [u8; 32]), FormatError> {
    let corrupt = |section: &str, reason: &str| FormatError::Corrupt { section: section.into(), reason: reason.into() };
    let magic_len = file.len().min(MAGIC.len());
    if magic_len == 0 || file[..magic_len] != MAGIC[..magic_len] {
        return Err(FormatError::NotAnImage);
    }
    if file.len() < HEADER_BYTES {
        return Err(FormatError::Truncated { needed: HEADER_BYTES as u64 });
    }
    let version = u32_at(file, 8);
    if version != VERSION {
        return Err(FormatError::Version(version));
    }
    let count = u32_at(file, 12) as usize;
    if count > MAX_SECTIONS {
        return Err(FormatError::TooLarge {
            section: "section table".into(),
            bytes: count as u64 * ENTRY_BYTES as u64,
            limit: (MAX_SECTIONS * ENTRY_BYTES) as u64,
        });
    }
    if file[16..32].iter().any(|&byte| byte != 0) {
        return Err(corrupt("header", "reserved bytes are set"));
    }
    let table_end = HEADER_BYTES + count * ENTRY_BYTES;
    if file.len() < table_end {
        return Err(FormatError::Truncated { needed: table_end as u64 });
    }
    let mut sections: Vec<SectionEntry> = Vec::with_capacity(count);
    let mut end = table_end as u64;
    for entry in file[HEADER_BYTES..table_end].chunks_exact(ENTRY_BYTES) {
        let section = decode_entry(entry)?;
        let name = section.kind.name();
        if let Some(previous) = sections.last() {
            let ordered = previous.kind < section.kind || (previous.kind == section.kind && section.kind.repeats());
            if !ordered {
                return Err(corrupt(name, "sections are out of order or repeated"));
            }
        }
        if section.offset != end {
            return Err(corrupt(name, "does not begin where the section before it ends"));
        }
        end = end.checked_add(section.stored_len).ok_or_else(|| corrupt(name, "reaches beyond any file"))?;
        sections.push(section);
    }
    if sections.iter().filter(|section| section.kind == SectionKind::Disk).count() > MAX_DISKS {
        return Err(corrupt("section table", "too many disks"));
    }
    let declared: [u8; 32] = file[32..64].try_into().expect("32 bytes");
    if declared != image_hash(&sections) {
        return Err(corrupt("header", "the image hash does not match the section table"));
    }
    Ok((sections, declared))
}

/// One row of the section table.
fn decode_entry(entry: &[u8]) -> Result<SectionEntry, FormatError> {
    let number = u32_at(entry, 0);
    let kind = SectionKind::from_number(number).ok_or_else(|| FormatError::Corrupt {
        section: "section table".into(),
        reason: format!("unknown section kind {number}"),
    })?;
    let corrupt = |reason: &str| FormatError::Corrupt { section: kind.name().into(), reason: reason.into() };
    if u32_at(entry, 4) != 0 || u64_at(entry, 32) != 0 {
        return Err(corrupt("reserved bytes are set"));
    }
    let content_len = u64_at(entry, 8);
    if content_len > kind.limit_bytes() {
        return Err(FormatError::TooLarge {
            section: kind.name().into(),
            bytes: content_len,
            limit: kind.limit_bytes(),
        });
    }
    let stored_len = u64_at(entry, 24);
    if stored_len < (chunk_count(content_len) * CHUNK_ENTRY_BYTES) as u64 {
        return Err(corrupt("is shorter than its chunk table"));
    }
    Ok(SectionEntry {
        kind,
        content_len,
        offset: u64_at(entry, 16),
        stored_len,
        hash: entry[40..72].try_into().expect("32 bytes"),
    })
}

/// Little-endian u32 at `at`; the caller has checked the length.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// Little-endian u64 at `at`; the caller has checked the length.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
