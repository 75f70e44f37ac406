//! A digest of RAM that is cheap to keep current: only pages that changed are hashed again.
//!
//! Each page has a content hash, BLAKE3 over its 4096 bytes, and zeros for a page of zeros; the same hash is the
//! page's address in the store. A page's digest is BLAKE3 over (content hash, page index), as four 64-bit lanes, and
//! zero for a page of zeros. The digest of RAM is the lane-wise wrapping sum of the digests of all pages, so it does
//! not depend on the order in which pages changed. It is meant to tell runs apart; it is not a commitment against
//! someone who constructs memory contents on purpose.
//!
//! The table of hashes is made of chunks that clones share until one of them writes: a clone costs nothing that grows
//! with what RAM holds.

use std::sync::Arc;

use orrery_cpu::memory::{GuestMemory, PAGE_SIZE};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use crate::chain::Hash;

/// A page's digest, and the sum of many.
pub type Lanes = [u64; 4];

/// The content hash of a page of zeros.
pub const ZERO_PAGE: Hash = Hash([0; 32]);

/// Pages of one chunk of the table.
pub const CHUNK_PAGES: usize = 512;

/// From so many pages on it pays to start threads for them.
const PARALLEL_PAGES: usize = 512;
/// Most threads that hash.
const WORKERS_MAX: usize = 8;

type Chunk = Option<Arc<[Hash; CHUNK_PAGES]>>;

/// Content hashes of all pages and the sum of their digests.
#[derive(Clone)]
pub struct MemoryDigest {
    /// Shared by clones, like their chunks.
    regions: Arc<Vec<RegionDigest>>,
    sum: Lanes,
}

#[derive(Clone)]
struct RegionDigest {
    /// Page number of the region's first page.
    first: u64,
    /// Number of pages.
    pages: u64,
    /// None: all zeros.
    chunks: Vec<Chunk>,
}

fn add(sum: &mut Lanes, value: &Lanes) {
    for (lane, value) in sum.iter_mut().zip(value) {
        *lane = lane.wrapping_add(*value);
    }
}

fn subtract(sum: &mut Lanes, value: &Lanes) {
    for (lane, value) in sum.iter_mut().zip(value) {
        *lane = lane.wrapping_sub(*value);
    }
}

/// True if every byte is zero.
pub fn is_zero(content: &[u8]) -> bool {
    // SAFETY: any bytes are valid u64 values; align_to returns what is aligned and leaves the rest in the ends.
    let (head, words, tail) = unsafe { content.align_to::<u64>() };
    words.iter().all(|w| *w == 0) && head.iter().chain(tail).all(|b| *b == 0)
}

/// The content hash of one page of 4096 bytes.
pub fn content_hash(content: &[u8]) -> Hash {
    assert_eq!(content.len() as u64, PAGE_SIZE);
    if is_zero(content) { ZERO_PAGE } else { Hash(*blake3::hash(content).as_bytes()) }
}

/// The digest of a page with this content.
pub fn page_digest(index: u64, content: &Hash) -> Lanes {
    let mut lanes = [0; 4];
    if *content == ZERO_PAGE {
        return lanes;
    }
    let mut bytes = [0; 40];
    bytes[..32].copy_from_slice(&content.0);
    bytes[32..].copy_from_slice(&index.to_le_bytes());
    let hash = blake3::hash(&bytes);
    for (lane, bytes) in lanes.iter_mut().zip(hash.as_bytes().chunks_exact(8)) {
        *lane = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    }
    lanes
}

impl MemoryDigest {
    /// A digest of RAM that is all zeros. Whatever was written before must be given to [`Self::update`].
    pub fn zeroed(memory: &GuestMemory) -> MemoryDigest {
        let regions = memory
            .iter()
            .map(|region| {
                let pages = region.len() / PAGE_SIZE;
                let chunks = vec![None; (pages as usize).div_ceil(CHUNK_PAGES)];
                RegionDigest { first: region.start_addr().0 / PAGE_SIZE, pages, chunks }
            })
            .collect();
        MemoryDigest { regions: Arc::new(regions), sum: [0; 4] }
    }

    /// Hashes the given pages again, many of them on several processors. Pages outside RAM are ignored.
    pub fn update(&mut self, memory: &GuestMemory, pages: impl IntoIterator<Item = u64>) {
        let pages: Vec<u64> = pages.into_iter().collect();
        let workers = if pages.len() < PARALLEL_PAGES {
            1
        } else {
            std::thread::available_parallelism().map_or(1, |count| count.get()).min(WORKERS_MAX)
        };
        if workers == 1 {
            hash_pages(memory, &pages, |page, hash| {
                self.set(page, hash);
            });
            return;
        }
        let hashed: Vec<Vec<(u64, Hash)>> = std::thread::scope(|scope| {
            let hash = |pages| {
                let mut hashed = Vec::new();
                hash_pages(memory, pages, |page, hash| hashed.push((page, hash)));
                hashed
            };
            let parts = pages.chunks(pages.len().div_ceil(workers));
            let start = |part| std::thread::Builder::new().spawn_scoped(scope, move || hash(part));
            let threads: Vec<_> = parts.map(|part| (part, start(part))).collect();
            let finish = |(part, thread): (_, std::io::Result<std::thread::ScopedJoinHandle<_>>)| match thread {
                Ok(thread) => thread.join().expect("hashing does not panic"),
                // The host gives no more threads.
                Err(_) => hash(part),
            };
            threads.into_iter().map(finish).collect()
        });
        for (page, hash) in hashed.into_iter().flatten() {
            self.set(page, hash);
        }
    }

    /// Notes the content hash of a page; false if it is outside RAM.
    pub fn set(&mut self, page: u64, fresh: Hash) -> bool {
        let Some((region, index)) = self.regions.iter().enumerate().find_map(|(number, region)| {
            let index = page.checked_sub(region.first).filter(|index| *index < region.pages)?;
            Some((number, index as usize))
        }) else {
            return false;
        };
        let chunk = &mut Arc::make_mut(&mut self.regions)[region].chunks[index / CHUNK_PAGES];
        let old = chunk.as_ref().map_or(ZERO_PAGE, |chunk| chunk[index % CHUNK_PAGES]);
        if old != fresh {
            let chunk = chunk.get_or_insert_with(|| Arc::new([ZERO_PAGE; CHUNK_PAGES]));
            Arc::make_mut(chunk)[index % CHUNK_PAGES] = fresh;
            subtract(&mut self.sum, &page_digest(page, &old));
            add(&mut self.sum, &page_digest(page, &fresh));
        }
        true
    }

    /// Content hash of a page; None outside RAM.
    pub fn hash_of(&self, page: u64) -> Option<Hash> {
        self.regions.iter().find_map(|region| {
            let index = page.checked_sub(region.first).filter(|index| *index < region.pages)? as usize;
            Some(region.chunks[index / CHUNK_PAGES].as_ref().map_or(ZERO_PAGE, |chunk| chunk[index % CHUNK_PAGES]))
        })
    }

    /// The digest of all of RAM.
    pub fn value(&self) -> Lanes {
        self.sum
    }

    /// Pages whose contents differ from those of another machine's RAM of the same size, ascending. Cheap where the
    /// two share their past.
    pub fn differing_pages(&self, other: &MemoryDigest) -> Vec<u64> {
        let mut pages = Vec::new();
        for (mine, theirs) in self.regions.iter().zip(other.regions.iter()) {
            for (number, (a, b)) in mine.chunks.iter().zip(&theirs.chunks).enumerate() {
                let first = mine.first + (number * CHUNK_PAGES) as u64;
                let mut compare = |a: &[Hash], b: &[Hash]| {
                    let differing = a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b);
                    pages.extend(differing.map(|(index, _)| first + index as u64));
                };
                match (a, b) {
                    (None, None) => {}
                    (Some(a), Some(b)) if Arc::ptr_eq(a, b) => {}
                    (Some(a), Some(b)) => compare(&a[..], &b[..]),
                    (Some(a), None) => compare(&a[..], &[ZERO_PAGE; CHUNK_PAGES]),
                    (None, Some(b)) => compare(&[ZERO_PAGE; CHUNK_PAGES], &b[..]),
                }
            }
        }
        pages
    }

    /// Every page that is not all zeros, ascending, with its content hash.
    pub fn pages(&self) -> impl Iterator<Item = (u64, Hash)> + '_ {
        self.regions
            .iter()
            .flat_map(|region| {
                region.chunks.iter().enumerate().flat_map(move |(number, chunk)| {
                    let first = region.first + (number * CHUNK_PAGES) as u64;
                    let hashes = chunk.as_ref().map_or(&[][..], |chunk| &chunk[..]);
                    hashes.iter().enumerate().map(move |(index, hash)| (first + index as u64, *hash))
                })
            })
            .filter(|(_, hash)| *hash != ZERO_PAGE)
    }
}

fn hash_pages(memory: &GuestMemory, pages: &[u64], mut each: impl FnMut(u64, Hash)) {
    let mut content = [0u8; PAGE_SIZE as usize];
    for page in pages {
        if read_page(memory, *page, &mut content) {
            each(*page, content_hash(&content));
        }
    }
}

/// Copies a page of RAM; false if the page is not RAM.
pub fn read_page(memory: &GuestMemory, page: u64, content: &mut [u8; PAGE_SIZE as usize]) -> bool {
    use vm_memory::{Bytes, GuestAddress};
    page.checked_mul(PAGE_SIZE).is_some_and(|gpa| memory.read_slice(content, GuestAddress(gpa)).is_ok())
}

/// Takes the page numbers that devices have written since the last call, sorted, and forgets them.
pub fn take_device_dirty(memory: &GuestMemory) -> Vec<u64> {
    let mut pages = Vec::new();
    for region in memory.iter() {
        let mapping: &MmapRegion<AtomicBitmap> = region;
        let bitmap = mapping.bitmap();
        let first = region.start_addr().0 / PAGE_SIZE;
        for (word_index, word) in bitmap.get_and_reset().into_iter().enumerate() {
            let mut rest = word;
            while rest != 0 {
                pages.push(first + word_index as u64 * 64 + u64::from(rest.trailing_zeros()));
                rest &= rest - 1;
            }
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn incremental_equals_from_scratch() {
        let memory = crate::ram::create(16 << 20).unwrap();
        let mut digest = MemoryDigest::zeroed(&memory);
        memory.write_slice(b"one", GuestAddress(0x5000)).unwrap();
        memory.write_slice(b"two", GuestAddress(0x9FFE)).unwrap();
        let dirty = take_device_dirty(&memory);
        assert_eq!(dirty, vec![5, 9, 10]);
        assert!(take_device_dirty(&memory).is_empty());
        digest.update(&memory, dirty);
        let mut all = MemoryDigest::zeroed(&memory);
        all.update(&memory, 0..4096);
        assert_eq!(digest.value(), all.value());
        assert_eq!(digest.differing_pages(&MemoryDigest::zeroed(&memory)), vec![5, 9, 10]);
        assert_eq!(MemoryDigest::zeroed(&memory).differing_pages(&digest), vec![5, 9, 10]);
        assert_eq!(digest.pages().map(|(page, _)| page).collect::<Vec<_>>(), vec![5, 9, 10]);
        memory.write_slice(&[0; 8192 * 3], GuestAddress(0x5000)).unwrap();
        digest.update(&memory, take_device_dirty(&memory));
        assert_eq!(digest.value(), [0; 4]);
    }

    #[test]
    fn a_clone_does_not_see_later_writes() {
        let memory = crate::ram::create(16 << 20).unwrap();
        let mut digest = MemoryDigest::zeroed(&memory);
        assert!(digest.set(7, Hash([1; 32])));
        let before = digest.clone();
        digest.set(7, Hash([2; 32]));
        digest.set(4095, Hash([3; 32]));
        assert!(!digest.set(4096, Hash([3; 32])), "beyond RAM");
        assert_eq!(before.hash_of(7), Some(Hash([1; 32])));
        assert_eq!(before.hash_of(4096), None);
        assert_eq!(digest.differing_pages(&before), vec![7, 4095]);
        let mut back = digest.clone();
        back.set(7, Hash([1; 32]));
        back.set(4095, ZERO_PAGE);
        assert_eq!(back.value(), before.value());
    }
}
