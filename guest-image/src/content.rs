//! A section's content: in memory one immutable run of bytes, in the file a list of chunks.
//!
//! Chunks are hashed and compressed one by one, which makes three things cheap: all cores work on one section,
//! a chunk of zeroes costs neither time nor memory nor room in the file, and no declared size is believed before
//! the bytes for it have been seen.

use std::fmt;
use std::io;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::format::{CHUNK_BYTES, CHUNK_ENTRY_BYTES, chunk_count, chunk_hash, section_hash, u32_at};

/// zstd level of stored chunks: a good deal of the size, and decompression as fast as any level's.
const ZSTD_LEVEL: i32 = 3;

/// Immutable bytes, shared by cloning. The pages are the host's: those never written by the image (zeroes) take no
/// memory.
#[derive(Clone)]
pub struct Content {
    bytes: Arc<Bytes>,
}

enum Bytes {
    Heap(Vec<u8>),
    Mapped(Mmap),
}

/// Only the length: contents are far too long to print.
impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Content({} bytes)", self.len())
    }
}

impl Deref for Content {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &*self.bytes {
            Bytes::Heap(bytes) => bytes,
            Bytes::Mapped(bytes) => bytes,
        }
    }
}

impl AsRef<[u8]> for Content {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Vec<u8>> for Content {
    fn from(bytes: Vec<u8>) -> Content {
        Content { bytes: Arc::new(Bytes::Heap(bytes)) }
    }
}

impl From<Mmap> for Content {
    fn from(bytes: Mmap) -> Content {
        Content { bytes: Arc::new(Bytes::Mapped(bytes)) }
    }
}

impl Default for Content {
    fn default() -> Content {
        Content::from(Vec::new())
    }
}

/// A section's content made ready for the file.
pub(crate) struct Encoded {
    /// Chunk table and chunks, one after the other.
    pub parts: Vec<Vec<u8>>,
    /// Bytes of all parts.
    pub stored_len: u64,
    /// The content's hash.
    pub hash: [u8; 32],
}

/// Hashes and compresses content, on all cores.
pub(crate) fn encode(content: &[u8]) -> Encoded {
    let count = chunk_count(content.len() as u64);
    let chunks = in_parallel(count, |index| {
        let chunk = &content[chunk_range(index, content.len())];
        if is_zero(chunk) { (zero_hash(chunk.len()), Vec::new()) } else { (chunk_hash(chunk), store(chunk)) }
    });
    let mut table = Vec::with_capacity(count * CHUNK_ENTRY_BYTES);
    for (hash, stored) in &chunks {
        table.extend_from_slice(&(stored.len() as u32).to_le_bytes());
        table.extend_from_slice(hash);
    }
    let hash = section_hash(content.len() as u64, chunks.iter().map(|chunk| chunk.0));
    let parts: Vec<Vec<u8>> = std::iter::once(table).chain(chunks.into_iter().map(|chunk| chunk.1)).collect();
    Encoded { stored_len: parts.iter().map(|part| part.len() as u64).sum(), parts, hash }
}

/// Only the hash of content, the one that is stored with it.
pub fn hash(content: &[u8]) -> [u8; 32] {
    let hashes = in_parallel(chunk_count(content.len() as u64), |index| {
        let chunk = &content[chunk_range(index, content.len())];
        if is_zero(chunk) { zero_hash(chunk.len()) } else { chunk_hash(chunk) }
    });
    section_hash(content.len() as u64, hashes)
}

/// Why stored content cannot be restored.
pub(crate) enum DecodeError {
    /// The stored bytes contradict themselves or the hash.
    Corrupt(String),
    /// There is more than `limit` bytes of it that is not zero.
    TooLarge { bytes: u64 },
    /// The host has no memory for it.
    Memory(io::Error),
}

/// Restores and verifies content from its section of the file. `material` is what is left of the budget for bytes
/// other than zero chunks, and is reduced.
pub(crate) fn decode(
    stored: &[u8],
    content_len: u64,
    expected_hash: &[u8; 32],
    material: &mut u64,
) -> Result<Content, DecodeError> {
    let corrupt = |reason: &str| DecodeError::Corrupt(reason.to_string());
    let count = chunk_count(content_len);
    let Some((table, data)) = stored.split_at_checked(count * CHUNK_ENTRY_BYTES) else {
        return Err(corrupt("is shorter than its chunk table"));
    };
    let content_len = usize::try_from(content_len).map_err(|_| DecodeError::TooLarge { bytes: content_len })?;
    // The table is checked before anything is allocated: against the section's hash, then for its sums.
    let hashes = table.chunks_exact(CHUNK_ENTRY_BYTES).map(|entry| entry[4..].try_into().expect("32 bytes"));
    if section_hash(content_len as u64, hashes) != *expected_hash {
        return Err(corrupt("its chunk table does not match its hash"));
    }
    let mut chunks = Vec::with_capacity(count);
    let mut position = 0usize;
    let mut needed = 0u64;
    for (index, entry) in table.chunks_exact(CHUNK_ENTRY_BYTES).enumerate() {
        let stored_len = u32_at(entry, 0) as usize;
        let range = position..position + stored_len;
        position = range.end;
        if position > data.len() {
            return Err(corrupt("its chunks reach beyond its end"));
        }
        if stored_len != 0 {
            needed += chunk_range(index, content_len).len() as u64;
        }
        chunks.push((range, &entry[4..]));
    }
    if position != data.len() {
        return Err(corrupt("has bytes after its last chunk"));
    }
    *material = material.checked_sub(needed).ok_or(DecodeError::TooLarge { bytes: needed })?;
    if content_len == 0 {
        return Ok(Content::default());
    }
    let mut memory = allocate(content_len).map_err(DecodeError::Memory)?;
    fill(&mut memory, data, &chunks)?;
    let memory = memory.make_read_only().map_err(DecodeError::Memory)?;
    Ok(Content::from(memory))
}

/// Decompresses and verifies all chunks into `memory`, which is zero.
fn fill(memory: &mut MmapMut, data: &[u8], chunks: &[(Range<usize>, &[u8])]) -> Result<(), DecodeError> {
    let targets: Vec<Mutex<&mut [u8]>> = memory.chunks_mut(CHUNK_BYTES).map(Mutex::new).collect();
    let results = in_parallel(chunks.len(), |index| {
        let mut target = targets[index].lock().expect("no chunk is filled twice");
        let (range, hash) = &chunks[index];
        let found = if range.is_empty() {
            zero_hash(target.len())
        } else {
            restore(&data[range.clone()], &mut target)
                .map_err(|reason| DecodeError::Corrupt(format!("chunk {index} {reason}")))?;
            chunk_hash(&target)
        };
        if found[..] == **hash {
            Ok(())
        } else {
            Err(DecodeError::Corrupt(format!("chunk {index} does not match its hash")))
        }
    });
    results.into_iter().collect()
}

/// Memory for content: anonymous, zero, not charged before it is written.
pub(crate) fn allocate(bytes: usize) -> io::Result<MmapMut> {
    MmapOptions::new().len(bytes).no_reserve_swap().map_anon()
}

/// A chunk as stored: compressed, or as it is where that is no longer.
fn store(chunk: &[u8]) -> Vec<u8> {
    match zstd::bulk::compress(chunk, ZSTD_LEVEL) {
        Ok(compressed) if compressed.len() < chunk.len() => compressed,
        _ => chunk.to_vec(),
    }
}

/// The inverse of [`store`]; `target` has the chunk's length.
fn restore(stored: &[u8], target: &mut [u8]) -> Result<(), String> {
    if stored.len() == target.len() {
        target.copy_from_slice(stored);
        return Ok(());
    }
    let written = zstd::bulk::decompress_to_buffer(stored, target).map_err(|error| format!("is not zstd: {error}"))?;
    if written == target.len() { Ok(()) } else { Err(format!("has {written} bytes instead of {}", target.len())) }
}

fn chunk_range(index: usize, content_len: usize) -> Range<usize> {
    let start = index * CHUNK_BYTES;
    start..(start + CHUNK_BYTES).min(content_len)
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(4096).all(|part| part.iter().fold(0, |seen, byte| seen | byte) == 0)
}

/// The hash of this many zeroes; that of a whole chunk is computed once.
fn zero_hash(len: usize) -> [u8; 32] {
    static WHOLE: OnceLock<[u8; 32]> = OnceLock::new();
    if len == CHUNK_BYTES {
        *WHOLE.get_or_init(|| chunk_hash(&vec![0; CHUNK_BYTES]))
    } else {
        chunk_hash(&vec![0; len])
    }
}

/// `work(0..count)` on all cores; the results in order.
fn in_parallel<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let workers = thread::available_parallelism().map_or(1, |cores| cores.get().min(16)).min(count);
    if workers <= 1 {
        return (0..count).map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let take_turns = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return done;
            }
            done.push((index, work(index)));
        }
    };
    let mut results: Vec<(usize, T)> = thread::scope(|scope| {
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(take_turns)).collect();
        handles.into_iter().flat_map(|handle| handle.join().expect("the work does not panic")).collect()
    });
    results.sort_unstable_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(len: usize) -> Vec<u8> {
        let mut state = 1u32;
        let mut bytes: Vec<u8> = (0..len)
            .map(|index| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if index % 3 == 0 { (state >> 24) as u8 } else { 7 }
            })
            .collect();
        if len > 2 * CHUNK_BYTES {
            bytes[CHUNK_BYTES..2 * CHUNK_BYTES].fill(0);
        }
        bytes
    }

    fn joined(encoded: &Encoded) -> Vec<u8> {
        encoded.parts.concat()
    }

    #[test]
    fn content_survives_the_round_trip() {
        for len in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 17] {
            let content = sample(len);
            let encoded = encode(&content);
            assert_eq!(encoded.hash, hash(&content));
            let mut budget = u64::MAX;
            let decoded = decode(&joined(&encoded), len as u64, &encoded.hash, &mut budget);
            let Ok(decoded) = decoded else { panic!("{len} bytes do not decode") };
            assert!(*decoded == content[..], "{len} bytes differ");
        }
    }

    #[test]
    fn zero_chunks_take_no_room_and_no_budget() {
        let content = vec![0; 5 * CHUNK_BYTES];
        let encoded = encode(&content);
        assert_eq!(encoded.stored_len, 5 * CHUNK_ENTRY_BYTES as u64);
        let mut budget = 0;
        let decoded = decode(&joined(&encoded), content.len() as u64, &encoded.hash, &mut budget);
        assert!(decoded.is_ok());
    }

    #[test]
    fn the_budget_stops_bombs_before_they_are_allocated() {
        let content = vec![1; 4 * CHUNK_BYTES];
        let encoded = encode(&content);
        let mut budget = 2 * CHUNK_BYTES as u64;
        let decoded = decode(&joined(&encoded), content.len() as u64, &encoded.hash, &mut budget);
        assert!(matches!(decoded, Err(DecodeError::TooLarge { .. })));
    }
}
