//! [`Image`]: what a guest boots from, opened from a file or put together from parts.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::content::{self, Content, DecodeError};
use crate::error::ImageError;
use crate::format::{self, FormatError, SectionEntry, SectionKind};
use crate::kernel::{self, KernelKind};

/// Facts about how an image was made, for people. Part of the image's hash, so nothing here may vary from one
/// build of the same things to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metadata {
    /// Version of the kernel, as its own header says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel_release: Option<String>,
    /// Package that the kernel was taken from: name and version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel_package: Option<String>,
    /// Kernel modules in the initramfs, in load order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<String>,
}

/// The contents of an image.
#[derive(Clone, Debug, Default)]
pub struct ImageParts {
    /// bzImage or ELF vmlinux for x86-64.
    pub kernel: Content,
    /// cpio archive for the kernel to unpack; may be empty.
    pub initramfs: Content,
    /// Raw disks, in the machine's order.
    pub disks: Vec<Content>,
    /// Kernel command line.
    pub command_line: String,
    /// Entry command and its arguments, for people: what runs is in the initramfs.
    pub entry: Vec<String>,
    /// Environment of the entry command, for people likewise.
    pub environment: Vec<(String, String)>,
    /// Facts about the build.
    pub metadata: Metadata,
}

/// An image, complete and verified. Cloning shares the contents.
#[derive(Clone, Debug)]
pub struct Image {
    parts: ImageParts,
    kernel_kind: KernelKind,
    hash: [u8; 32],
}

/// What `orrery image inspect` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Description {
    /// The image hash in hexadecimal.
    pub hash: String,
    /// Version of the file format.
    pub format: u32,
    /// "bzImage" or "ELF".
    pub kernel_kind: String,
    /// Every section.
    pub sections: Vec<SectionDescription>,
    /// Kernel command line.
    pub command_line: String,
    /// Entry command and its arguments.
    pub entry: Vec<String>,
    /// Environment of the entry command, as `NAME=VALUE`.
    pub environment: Vec<String>,
    /// Facts about the build.
    pub metadata: Metadata,
}

/// One section of a [`Description`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SectionDescription {
    /// What it holds.
    pub name: String,
    /// Bytes of content.
    pub bytes: u64,
    /// Hash of its content in hexadecimal.
    pub hash: String,
}

impl Image {
    /// Puts an image together and computes its hash. The kernel must be one that boots.
    pub fn from_parts(parts: ImageParts) -> Result<Image, kernel::KernelError> {
        let kernel_kind = kernel::recognise(&parts.kernel)?;
        let entries: Vec<SectionEntry> =
            sections_of(&parts).into_iter().map(|(kind, content)| entry_of(kind, &content)).collect();
        let hash = format::image_hash(&entries);
        Ok(Image { parts, kernel_kind, hash })
    }

    /// Opens an image file, restores its contents to memory and verifies every hash. The file is untrusted: its
    /// sizes are bounded before anything is allocated for them.
    pub fn open(path: impl AsRef<Path>) -> Result<Image, ImageError> {
        let path = path.as_ref();
        let io = |error| ImageError::Io { path: path.to_path_buf(), error };
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if metadata.is_dir() {
            return Err(io(io::Error::from(io::ErrorKind::IsADirectory)));
        }
        let file_len = metadata.len();
        let table_len = (format::HEADER_BYTES + format::MAX_SECTIONS * format::ENTRY_BYTES) as u64;
        let mut table = vec![0; file_len.min(table_len) as usize];
        file.read_exact_at(&mut table, 0).map_err(io)?;
        let (entries, hash) = format::decode_table(&table).map_err(|error| from_format(path, file_len, error))?;
        check_extent(path, file_len, entries.len(), &entries)?;

        let mut loader = Loader { path, file: &file, material: format::MAX_MATERIAL_BYTES };
        let mut parts = ImageParts::default();
        for entry in &entries {
            let content = loader.load(entry)?;
            loader.place(entry, content, &mut parts)?;
        }
        let kernel_kind =
            kernel::recognise(&parts.kernel).map_err(|error| ImageError::Kernel { path: path.to_path_buf(), error })?;
        Ok(Image { parts, kernel_kind, hash })
    }

    /// Writes the image file, first beside `path` and then renamed over it, so that a crash leaves the old file or
    /// the new one.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), ImageError> {
        let path = path.as_ref();
        let io = |error| ImageError::Io { path: path.to_path_buf(), error };
        let sections = sections_of(&self.parts);
        let table_len = format::HEADER_BYTES + sections.len() * format::ENTRY_BYTES;
        let mut entries = Vec::with_capacity(sections.len());
        let mut offset = table_len as u64;
        let mut temporary =
            tempfile::Builder::new().prefix(".orrery-image-").tempfile_in(parent_of(path)).map_err(io)?;
        let file = temporary.as_file_mut();
        file.write_all(&vec![0; table_len]).map_err(io)?;
        for (kind, content) in &sections {
            let encoded = content::encode(content);
            for part in &encoded.parts {
                file.write_all(part).map_err(io)?;
            }
            entries.push(SectionEntry {
                kind: *kind,
                content_len: content.len() as u64,
                offset,
                stored_len: encoded.stored_len,
                hash: encoded.hash,
            });
            offset += encoded.stored_len;
        }
        file.write_all_at(&format::encode_table(&entries), 0).map_err(io)?;
        file.sync_all().map_err(io)?;
        set_mode(file).map_err(io)?;
        temporary.persist(path).map_err(|error| io(error.error))?;
        Ok(())
    }

    /// Writes kernel, initramfs, disks and command line as files of their own, for other tools: `vmlinuz` or
    /// `vmlinux`, `initrd.img`, `disk0.img`…, `cmdline.txt`. Returns their paths. Disks are sparse.
    pub fn extract(&self, directory: impl AsRef<Path>) -> Result<Vec<PathBuf>, ImageError> {
        let directory = directory.as_ref();
        fs::create_dir_all(directory).map_err(|error| ImageError::Io { path: directory.to_path_buf(), error })?;
        let kernel_name = match self.kernel_kind {
            KernelKind::BzImage => "vmlinuz",
            KernelKind::Elf => "vmlinux",
        };
        let command_line = format!("{}\n", self.command_line());
        let mut files: Vec<(String, &[u8])> =
            vec![(kernel_name.into(), self.kernel()), ("cmdline.txt".into(), command_line.as_bytes())];
        if !self.initramfs().is_empty() {
            files.push(("initrd.img".into(), self.initramfs()));
        }
        files.extend(self.disks().iter().enumerate().map(|(index, disk)| (format!("disk{index}.img"), &**disk)));
        let mut written = Vec::new();
        for (name, bytes) in files {
            let path = directory.join(name);
            write_sparse(&path, bytes).map_err(|error| ImageError::Io { path: path.clone(), error })?;
            written.push(path);
        }
        Ok(written)
    }

    /// The image's name: a hash of its contents, however they are stored.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// The kernel's bytes.
    pub fn kernel(&self) -> &[u8] {
        &self.parts.kernel
    }

    /// How the kernel is to be loaded.
    pub fn kernel_kind(&self) -> KernelKind {
        self.kernel_kind
    }

    /// The initramfs; empty when there is none.
    pub fn initramfs(&self) -> &[u8] {
        &self.parts.initramfs
    }

    /// The disks, each a cheaply cloned immutable base for a copy-on-write disk.
    pub fn disks(&self) -> &[Content] {
        &self.parts.disks
    }

    /// The kernel command line.
    pub fn command_line(&self) -> &str {
        &self.parts.command_line
    }

    /// The entry command and its arguments.
    pub fn entry(&self) -> &[String] {
        &self.parts.entry
    }

    /// The entry command's environment.
    pub fn environment(&self) -> &[(String, String)] {
        &self.parts.environment
    }

    /// Facts about the build.
    pub fn metadata(&self) -> &Metadata {
        &self.parts.metadata
    }

    /// Everything about the image that is worth showing.
    pub fn describe(&self) -> Description {
        let sections = sections_of(&self.parts).into_iter().map(|(kind, content)| SectionDescription {
            name: kind.name().to_string(),
            bytes: content.len() as u64,
            hash: hex(&content::hash(&content)),
        });
        Description {
            hash: hex(&self.hash),
            format: format::VERSION,
            kernel_kind: self.kernel_kind.name().to_string(),
            sections: sections.collect(),
            command_line: self.parts.command_line.clone(),
            entry: self.parts.entry.clone(),
            environment: self.parts.environment.iter().map(|(name, value)| format!("{name}={value}")).collect(),
            metadata: self.parts.metadata.clone(),
        }
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The sections in file order; those with nothing in them are left out.
fn sections_of(parts: &ImageParts) -> Vec<(SectionKind, Content)> {
    let list = |items: &mut dyn Iterator<Item = String>| {
        Content::from(items.flat_map(|item| [item.into_bytes(), vec![0]].concat()).collect::<Vec<u8>>())
    };
    let mut sections =
        vec![(SectionKind::Kernel, parts.kernel.clone()), (SectionKind::Initramfs, parts.initramfs.clone())];
    sections.extend(parts.disks.iter().map(|disk| (SectionKind::Disk, disk.clone())));
    let environment = &mut parts.environment.iter().map(|(name, value)| format!("{name}={value}"));
    sections.extend([
        (SectionKind::CommandLine, Content::from(parts.command_line.clone().into_bytes())),
        (SectionKind::Entry, list(&mut parts.entry.iter().cloned())),
        (SectionKind::Environment, list(environment)),
        (SectionKind::Metadata, Content::from(metadata_bytes(&parts.metadata))),
    ]);
    sections.retain(|(kind, content)| *kind == SectionKind::Disk || !content.is_empty());
    sections
}

fn metadata_bytes(metadata: &Metadata) -> Vec<u8> {
    serde_json::to_vec(metadata).expect("strings and lists of strings always serialise")
}

fn entry_of(kind: SectionKind, content: &Content) -> SectionEntry {
    let content_len = content.len() as u64;
    SectionEntry { kind, content_len, offset: 0, stored_len: 0, hash: content::hash(content) }
}

/// Reads sections of one file.
struct Loader<'a> {
    path: &'a Path,
    file: &'a File,
    material: u64,
}

impl Loader<'_> {
    fn load(&mut self, entry: &SectionEntry) -> Result<Content, ImageError> {
        // The file is at least this long: the extent was checked.
        let mut stored = vec![0; entry.stored_len as usize];
        self.file
            .read_exact_at(&mut stored, entry.offset)
            .map_err(|error| ImageError::Io { path: self.path.to_path_buf(), error })?;
        let path = self.path.to_path_buf();
        let section = entry.kind.name().to_string();
        content::decode(&stored, entry.content_len, &entry.hash, &mut self.material).map_err(|error| match error {
            DecodeError::Corrupt(reason) => ImageError::Corrupt { path, section, reason },
            DecodeError::TooLarge { bytes } => {
                ImageError::TooLarge { path, section, bytes, limit: format::MAX_MATERIAL_BYTES }
            }
            DecodeError::Memory(error) => ImageError::Memory { path, section, bytes: entry.content_len, error },
        })
    }

    fn place(&self, entry: &SectionEntry, content: Content, parts: &mut ImageParts) -> Result<(), ImageError> {
        let text =
            |content: &[u8]| String::from_utf8(content.to_vec()).map_err(|_| self.corrupt(entry, "is not UTF-8"));
        match entry.kind {
            SectionKind::Kernel => parts.kernel = content,
            SectionKind::Initramfs => parts.initramfs = content,
            SectionKind::Disk => parts.disks.push(content),
            SectionKind::CommandLine => {
                if content.contains(&0) {
                    return Err(self.corrupt(entry, "has a NUL byte"));
                }
                parts.command_line = text(&content)?;
            }
            SectionKind::Entry => parts.entry = self.list(entry, &text(&content)?)?,
            SectionKind::Environment => {
                for variable in self.list(entry, &text(&content)?)? {
                    let Some((name, value)) = variable.split_once('=') else {
                        return Err(self.corrupt(entry, "has an entry without '='"));
                    };
                    parts.environment.push((name.to_string(), value.to_string()));
                }
            }
            SectionKind::Metadata => {
                let metadata: Metadata = serde_json::from_slice(&content)
                    .map_err(|error| self.corrupt(entry, &format!("is not the expected JSON: {error}")))?;
                if metadata_bytes(&metadata) != content[..] {
                    return Err(self.corrupt(entry, "has fields that this program does not know"));
                }
                parts.metadata = metadata;
            }
        }
        Ok(())
    }

    /// Splits NUL-terminated strings.
    fn list(&self, entry: &SectionEntry, text: &str) -> Result<Vec<String>, ImageError> {
        let body = text.strip_suffix('\0').ok_or_else(|| self.corrupt(entry, "does not end with NUL"))?;
        Ok(body.split('\0').map(str::to_string).collect())
    }

    fn corrupt(&self, entry: &SectionEntry, reason: &str) -> ImageError {
        ImageError::Corrupt {
            path: self.path.to_path_buf(),
            section: entry.kind.name().to_string(),
            reason: reason.to_string(),
        }
    }
}

/// The file must reach as far as its table says, and no further.
fn check_extent(path: &Path, file_len: u64, count: usize, entries: &[SectionEntry]) -> Result<(), ImageError> {
    let mut end = (format::HEADER_BYTES + count * format::ENTRY_BYTES) as u64;
    for entry in entries {
        end = entry.offset + entry.stored_len;
        if end > file_len {
            return Err(ImageError::Truncated {
                path: path.to_path_buf(),
                section: entry.kind.name().to_string(),
                needed: end,
                present: file_len,
            });
        }
    }
    if end != file_len {
        return Err(ImageError::Corrupt {
            path: path.to_path_buf(),
            section: "end of file".to_string(),
            reason: format!("{} bytes follow the last section", file_len - end),
        });
    }
    Ok(())
}

fn from_format(path: &Path, file_len: u64, error: FormatError) -> ImageError {
    let path = path.to_path_buf();
    match error {
        FormatError::NotAnImage => ImageError::NotAnImage { path },
        FormatError::Version(found) => ImageError::Version { path, found, supported: format::VERSION },
        FormatError::Truncated { needed } => {
            ImageError::Truncated { path, section: "header".to_string(), needed, present: file_len }
        }
        FormatError::Corrupt { section, reason } => ImageError::Corrupt { path, section, reason },
        FormatError::TooLarge { section, bytes, limit } => ImageError::TooLarge { path, section, bytes, limit },
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Temporary files are private; an image is an ordinary file.
fn set_mode(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

/// Writes a file with holes where whole blocks of 64 KiB are zero.
fn write_sparse(path: &Path, bytes: &[u8]) -> io::Result<()> {
    const BLOCK_BYTES: usize = 64 << 10;
    let file = File::create(path)?;
    file.set_len(bytes.len() as u64)?;
    for (index, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
        if block.iter().any(|&byte| byte != 0) {
            file.write_all_at(block, (index * BLOCK_BYTES) as u64)?;
        }
    }
    Ok(())
}
