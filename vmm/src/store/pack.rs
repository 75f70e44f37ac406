//! Pack files: where the bytes of snapshots are.
//!
//! A pack is a header and then records, only ever appended to. A record holds a group of pages, or one blob (a state,
//! a page table), compressed, under the content hashes of what is in it. Everything is little-endian:
//!
//! | part | bytes | |
//! |---|---|---|
//! | pack header | 8 | `ORRYPACK` |
//! | | 4 | version |
//! | | 4 | the pack's number, which is also its name |
//! | record header | 4 | `OREC` |
//! | | 4 | kind: 1 pages, 2 blob |
//! | | 4 | number of hashes: pages in the group, 1 for a blob |
//! | | 4 | bytes before compression |
//! | | 4 | bytes after compression |
//! | | 16 | checksum: start of BLAKE3 over the four numbers, the hashes and the compressed bytes |
//! | hashes | 32 each | BLAKE3 of each page, or of the blob |
//! | content | | one zstd frame |

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{SnapshotError, io_error};
use crate::chain::Hash;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Most pages of one record: more compress better, fewer are quicker to get one page from.
pub const RECORD_PAGES_MAX: usize = 16;
/// Largest blob.
pub const BLOB_BYTES_MAX: usize = 256 << 20;
/// A pack that has become this long is closed and another begun.
pub const PACK_BYTES_MAX: u64 = 256 << 20;
/// What looks like a record behind damage, and is none, is looked at so many times.
const FALSE_RECORDS_MAX: u32 = 64;
/// Version of the format.
pub const PACK_VERSION: u32 = 1;

const PACK_MAGIC: &[u8; 8] = b"ORRYPACK";
pub(super) const PACK_HEADER_BYTES: u64 = 16;
const RECORD_MAGIC: &[u8; 4] = b"OREC";
const RECORD_HEADER_BYTES: usize = 36;
/// zstd's quickest ordinary level.
const ZSTD_LEVEL: i32 = 1;

/// Where a record is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    /// Number of the pack.
    pub pack: u32,
    /// First byte of the record.
    pub offset: u64,
}

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A group of pages.
    Pages,
    /// One run of bytes.
    Blob,
}

/// The head of a record.
#[derive(Clone, Debug)]
pub struct RecordHead {
    /// What it holds.
    pub kind: Kind,
    /// Hashes of what it holds.
    pub hashes: Vec<Hash>,
    /// Bytes before compression.
    pub raw_bytes: usize,
    /// Bytes after compression.
    pub stored_bytes: usize,
    checksum: [u8; 16],
}

impl RecordHead {
    /// Bytes of the whole record.
    pub fn bytes(&self) -> u64 {
        (RECORD_HEADER_BYTES + 32 * self.hashes.len() + self.stored_bytes) as u64
    }
}

/// Buffers for reading records.
pub struct Scratch {
    /// The content of the record read last.
    pub raw: Vec<u8>,
    stored: Vec<u8>,
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl Scratch {
    /// Empty buffers.
    pub fn new() -> Scratch {
        let decompressor = zstd::bulk::Decompressor::new().expect("there is memory for a decompressor");
        Scratch { raw: Vec::new(), stored: Vec::new(), decompressor }
    }
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch::new()
    }
}

/// The packs of a store, for reading.
pub struct Packs {
    directory: PathBuf,
    open: std::sync::Mutex<std::collections::HashMap<u32, std::sync::Arc<File>>>,
}

impl Packs {
    /// Packs in a directory, which need not exist.
    pub fn new(directory: PathBuf) -> Packs {
        Packs { directory, open: Default::default() }
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Path of a pack.
    pub fn path(&self, pack: u32) -> PathBuf {
        self.directory.join(format!("{pack:08}.pack"))
    }

    /// Numbers of the packs there are, ascending.
    pub fn list(&self) -> Result<Vec<u32>, SnapshotError> {
        let entries = match std::fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("read directory", &self.directory)(error)),
        };
        let mut numbers = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error("read directory", &self.directory))?;
            let name = entry.file_name();
            let digits = name.to_str().and_then(|name| name.strip_suffix(".pack"));
            numbers.extend(digits.filter(|digits| digits.len() >= 8).and_then(|digits| digits.parse::<u32>().ok()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Opens a pack and checks its header.
    pub fn file(&self, pack: u32) -> Result<std::sync::Arc<File>, SnapshotError> {
        let mut open = self.open.lock().expect("nobody panics with the lock");
        if let Some(file) = open.get(&pack) {
            return Ok(file.clone());
        }
        let path = self.path(pack);
        let file = File::open(&path).map_err(io_error("open", &path))?;
        let mut header = [0; PACK_HEADER_BYTES as usize];
        let damaged =
            |what: &str| SnapshotError::Damaged { path: path.display().to_string(), offset: 0, what: what.to_owned() };
        file.read_exact_at(&mut header, 0).map_err(|_| damaged("it has no whole header"))?;
        if &header[..8] != PACK_MAGIC {
            return Err(damaged("it is not a pack"));
        }
        let found = word(&header, 8);
        if found != PACK_VERSION {
            return Err(SnapshotError::Version { path: path.display().to_string(), found, expected: PACK_VERSION });
        }
        if word(&header, 12) != pack {
            return Err(damaged("its number is not that of its name"));
        }
        let file = std::sync::Arc::new(file);
        open.insert(pack, file.clone());
        Ok(file)
    }

    /// Reads the head of a record; None at the end of the pack. A record that the pack's end cuts is damage.
    pub fn head(&self, place: Place) -> Result<Option<RecordHead>, SnapshotError> {
        let file = self.file(place.pack)?;
        let path = self.path(place.pack);
        let len = file.metadata().map_err(io_error("look at", &path))?.len();
        if place.offset == len {
            return Ok(None);
        }
        let damaged = |what: String| self.damaged(place, what);
        let mut buffer = [0; RECORD_HEADER_BYTES + 32 * RECORD_PAGES_MAX];
        let got = len.saturating_sub(place.offset).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..got], place.offset).map_err(io_error("read", &path))?;
        if got < RECORD_HEADER_BYTES {
            return Err(self.cut(place));
        }
        let head = parse_head(&buffer[..got]).map_err(damaged)?;
        if place.offset.checked_add(head.bytes()).is_none_or(|end| end > len) {
            return Err(self.cut(place));
        }
        Ok(Some(head))
    }

    /// Reads a record into `scratch.raw` and checks its checksum.
    pub fn read(&self, place: Place, scratch: &mut Scratch) -> Result<RecordHead, SnapshotError> {
        let Scratch { stored, raw, decompressor } = scratch;
        let head = self.head(place)?.ok_or_else(|| self.damaged(place, "the pack ends here".into()))?;
        let path = self.path(place.pack);
        let start = place.offset + (RECORD_HEADER_BYTES + 32 * head.hashes.len()) as u64;
        stored.resize(head.stored_bytes, 0);
        self.file(place.pack)?.read_exact_at(stored, start).map_err(io_error("read", &path))?;
        if checksum(head.kind, &head.hashes, head.raw_bytes, stored) != head.checksum {
            return Err(self.damaged(place, "a record's checksum does not match its content".into()));
        }
        raw.clear();
        raw.reserve(head.raw_bytes);
        let count = decompressor
            .decompress_to_buffer(stored.as_slice(), raw)
            .map_err(|error| self.damaged(place, format!("a record cannot be decompressed: {error}")))?;
        if count != head.raw_bytes {
            return Err(self.damaged(place, "a record has another length than it says".into()));
        }
        Ok(head)
    }

    /// Reads a record and compares its content with its hashes as well.
    pub fn verify(&self, place: Place, scratch: &mut Scratch) -> Result<RecordHead, SnapshotError> {
        let head = self.read(place, scratch)?;
        let piece = match head.kind {
            Kind::Pages => PAGE_BYTES,
            Kind::Blob => head.raw_bytes.max(1),
        };
        let pieces = scratch.raw.chunks(piece).chain(std::iter::repeat(&[][..]));
        for (hash, content) in head.hashes.iter().zip(pieces) {
            if blake3::hash(content).as_bytes() != &hash.0 {
                return Err(self.damaged(place, format!("content is not that of hash {hash}")));
            }
        }
        Ok(head)
    }

    /// The next place behind a damaged one where a whole record begins.
    pub(super) fn record_behind(&self, damaged: Place) -> Option<Place> {
        let file = self.file(damaged.pack).ok()?;
        let mut scratch = Scratch::new();
        let mut failed = 0;
        let mut window = vec![0; 64 << 10];
        let mut start = damaged.offset + 1;
        loop {
            let got = file.read_at(&mut window, start).ok()?;
            let found = |at: &usize| &window[*at..*at + RECORD_MAGIC.len()] == RECORD_MAGIC;
            for at in (0..(got + 1).saturating_sub(RECORD_MAGIC.len())).filter(found) {
                let place = Place { offset: start + at as u64, ..damaged };
                if self.read(place, &mut scratch).is_ok() {
                    return Some(place);
                }
                // What only looks like a record may be long; a pack made of such is not gone through for ever.
                failed += 1;
                if failed == FALSE_RECORDS_MAX {
                    return None;
                }
            }
            if got < window.len() {
                return None;
            }
            start += (got - RECORD_MAGIC.len() + 1) as u64;
        }
    }

    fn cut(&self, place: Place) -> SnapshotError {
        SnapshotError::Cut { path: self.path(place.pack).display().to_string(), offset: place.offset }
    }

    pub(super) fn damaged(&self, place: Place, what: String) -> SnapshotError {
        SnapshotError::Damaged { path: self.path(place.pack).display().to_string(), offset: place.offset, what }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn parse_head(bytes: &[u8]) -> Result<RecordHead, String> {
    if &bytes[..4] != RECORD_MAGIC {
        return Err("there is no record".into());
    }
    let (count, raw_bytes, stored_bytes) =
        (word(bytes, 8) as usize, word(bytes, 12) as usize, word(bytes, 16) as usize);
    let kind = match word(bytes, 4) {
        1 if (1..=RECORD_PAGES_MAX).contains(&count) && raw_bytes == count * PAGE_BYTES => Kind::Pages,
        2 if count == 1 && raw_bytes <= BLOB_BYTES_MAX => Kind::Blob,
        kind => return Err(format!("a record of kind {kind} has {count} hashes and {raw_bytes} bytes")),
    };
    // Compression never makes more of it than this.
    if stored_bytes > raw_bytes + raw_bytes / 128 + 512 {
        return Err(format!("a record of {raw_bytes} bytes is stored in {stored_bytes}"));
    }
    let end = RECORD_HEADER_BYTES + 32 * count;
    let hashes = bytes.get(RECORD_HEADER_BYTES..end).ok_or("a record is cut off")?;
    Ok(RecordHead {
        kind,
        hashes: hashes.chunks_exact(32).map(|hash| Hash(hash.try_into().expect("32 bytes"))).collect(),
        raw_bytes,
        stored_bytes,
        checksum: bytes[20..36].try_into().expect("16 bytes"),
    })
}

fn numbers(kind: Kind, hashes: &[Hash], raw_bytes: usize, stored: &[u8]) -> [u8; 16] {
    let kind: u32 = match kind {
        Kind::Pages => 1,
        Kind::Blob => 2,
    };
    let mut bytes = [0; 16];
    for (at, value) in [kind, hashes.len() as u32, raw_bytes as u32, stored.len() as u32].into_iter().enumerate() {
        bytes[4 * at..4 * at + 4].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn checksum(kind: Kind, hashes: &[Hash], raw_bytes: usize, stored: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&numbers(kind, hashes, raw_bytes, stored));
    hashes.iter().for_each(|hash| {
        hasher.update(&hash.0);
    });
    hasher.update(stored);
    let mut start = [0; 16];
    start.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    start
}

/// Appends records to a pack of its own.
pub struct PackWriter {
    file: File,
    path: PathBuf,
    number: u32,
    len: u64,
    compressor: zstd::bulk::Compressor<'static>,
    record: Vec<u8>,
}

impl PackWriter {
    /// Begins a new pack. Its name is on disk when this returns.
    pub fn create(packs: &Packs) -> Result<PackWriter, SnapshotError> {
        let directory = packs.directory();
        std::fs::create_dir_all(directory).map_err(io_error("create directory", directory))?;
        let mut number = packs.list()?.last().map_or(1, |last| last.saturating_add(1));
        let (file, path) = loop {
            let path = packs.path(number);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (file, path),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number = number.saturating_add(1),
                Err(error) => return Err(io_error("create", &path)(error)),
            }
        };
        let mut header = PACK_MAGIC.to_vec();
        header.extend(PACK_VERSION.to_le_bytes());
        header.extend(number.to_le_bytes());
        let compressor = zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(io_error("compress", &path))?;
        let mut writer = PackWriter { file, path, number, len: 0, compressor, record: Vec::new() };
        writer.append(&header)?;
        sync_directory(directory)?;
        Ok(writer)
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Appends a record; `raw` is what it holds.
    pub fn write(&mut self, kind: Kind, hashes: &[Hash], raw: &[u8]) -> Result<Place, SnapshotError> {
        let place = Place { pack: self.number, offset: self.len };
        let stored = self.compressor.compress(raw).map_err(io_error("compress", &self.path))?;
        let mut record = std::mem::take(&mut self.record);
        record.clear();
        record.extend(RECORD_MAGIC);
        record.extend(numbers(kind, hashes, raw.len(), &stored));
        record.extend(checksum(kind, hashes, raw.len(), &stored));
        hashes.iter().for_each(|hash| record.extend(hash.0));
        record.extend(&stored);
        let result = self.append(&record);
        self.record = record;
        result.map(|()| place)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        if let Err(error) = self.file.write_all(bytes) {
            // What is half written must not stay: the next record would be behind it.
            let _ = self.file.set_len(self.len);
            let _ = std::io::Seek::seek(&mut self.file, std::io::SeekFrom::Start(self.len));
            return Err(io_error("write", &self.path)(error));
        }
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Puts everything so far on disk.
    pub fn sync(&mut self) -> Result<(), SnapshotError> {
        self.file.sync_data().map_err(io_error("flush", &self.path))
    }
}

/// Puts the names in a directory on disk.
pub(super) fn sync_directory(directory: &Path) -> Result<(), SnapshotError> {
    let file = File::open(directory).map_err(io_error("open", directory))?;
    file.sync_all().map_err(io_error("flush", directory))
}
