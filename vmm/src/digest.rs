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

use orrery_cpu::memory::{PAGE_SIZE, PageBytes};
use orrery_devices::{GuestMemory, WrittenPages};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use crate::chain::Hash;
use crate::page_hash::{PAGES_AT_ONCE, ZERO_PAGE, content_hashes};
use crate::ram::host_page;

/// A page's digest, and the sum of many.
pub type Lanes = [u64; 4];

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

/// What hashing pages again has found.
#[derive(Default)]
struct Rehashed {
    /// The pages that have changed, with their hashes now.
    hashes: Vec<(u64, Hash)>,
    /// What to add to the sum.
    difference: Lanes,
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

    /// Hashes the given pages of RAM again. Pages outside RAM are ignored. Nothing writes to RAM meanwhile.
    pub fn update(&mut self, memory: &GuestMemory, pages: impl IntoIterator<Item = u64>) {
        self.update_from(|page| host_page(memory, page), pages);
    }

    /// Hashes the given pages again, many of them on several processors. Pages without content are ignored.
    pub fn update_from<'a>(
        &mut self,
        content: impl Fn(u64) -> Option<&'a PageBytes> + Sync,
        pages: impl IntoIterator<Item = u64>,
    ) {
        let mut pages: Vec<u64> = pages.into_iter().collect();
        pages.sort_unstable();
        pages.dedup();
        let workers = if pages.len() < PARALLEL_PAGES {
            1
        } else {
            std::thread::available_parallelism().map_or(1, |count| count.get()).min(WORKERS_MAX)
        };
        let part = pages.len().div_ceil(workers).max(1);
        let rehashed: Vec<Rehashed> = std::thread::scope(|scope| {
            let (this, content) = (&*self, &content);
            let mut parts = pages.chunks(part);
            let mine = parts.next_back();
            let start = |part| std::thread::Builder::new().spawn_scoped(scope, move || this.rehash(content, part));
            let threads: Vec<_> = parts.map(|part| (part, start(part))).collect();
            let mine = mine.map(|part| this.rehash(content, part));
            let finish = |(part, thread): (_, std::io::Result<std::thread::ScopedJoinHandle<_>>)| match thread {
                Ok(thread) => thread.join().expect("hashing does not panic"),
                // The host gives no more threads.
                Err(_) => this.rehash(content, part),
            };
            threads.into_iter().map(finish).chain(mine).collect()
        });
        for Rehashed { hashes, difference } in rehashed {
            for (page, hash) in hashes {
                self.put(page, hash);
            }
            add(&mut self.sum, &difference);
        }
    }

    /// Hashes pages and finds which have changed.
    fn rehash<'a>(&self, content: impl Fn(u64) -> Option<&'a PageBytes>, pages: &[u64]) -> Rehashed {
        let mut rehashed = Rehashed::default();
        for group in pages.chunks(PAGES_AT_ONCE) {
            let group: Vec<_> = group.iter().filter_map(|page| Some((*page, content(*page)?))).collect();
            let contents: Vec<&PageBytes> = group.iter().map(|(_, content)| *content).collect();
            for ((page, _), fresh) in group.into_iter().zip(content_hashes(&contents)) {
                let Some(old) = self.hash_of(page) else { continue };
                if old != fresh {
                    subtract(&mut rehashed.difference, &page_digest(page, &old));
                    add(&mut rehashed.difference, &page_digest(page, &fresh));
                    rehashed.hashes.push((page, fresh));
                }
            }
        }
        rehashed
    }

    /// Notes the content hash of a page; false if it is outside RAM.
    pub fn set(&mut self, page: u64, fresh: Hash) -> bool {
        let Some(old) = self.put(page, fresh) else { return false };
        if old != fresh {
            subtract(&mut self.sum, &page_digest(page, &old));
            add(&mut self.sum, &page_digest(page, &fresh));
        }
        true
    }

    /// Puts a hash into the table and gives the old one; None outside RAM.
    fn put(&mut self, page: u64, fresh: Hash) -> Option<Hash> {
        let (region, index) = self.place(page)?;
        let chunk = &mut Arc::make_mut(&mut self.regions)[region].chunks[index / CHUNK_PAGES];
        let old = chunk.as_ref().map_or(ZERO_PAGE, |chunk| chunk[index % CHUNK_PAGES]);
        if old != fresh {
            let chunk = chunk.get_or_insert_with(|| Arc::new([ZERO_PAGE; CHUNK_PAGES]));
            Arc::make_mut(chunk)[index % CHUNK_PAGES] = fresh;
        }
        Some(old)
    }

    /// Where a page is in the table: its region, and its index there.
    fn place(&self, page: u64) -> Option<(usize, usize)> {
        self.regions.iter().enumerate().find_map(|(number, region)| {
            let index = page.checked_sub(region.first).filter(|index| *index < region.pages)?;
            Some((number, index as usize))
        })
    }

    /// Content hash of a page; None outside RAM.
    pub fn hash_of(&self, page: u64) -> Option<Hash> {
        let (region, index) = self.place(page)?;
        let chunk = self.regions[region].chunks[index / CHUNK_PAGES].as_ref();
        Some(chunk.map_or(ZERO_PAGE, |chunk| chunk[index % CHUNK_PAGES]))
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

/// Copies a page of RAM; false if the page is not RAM.
pub fn read_page(memory: &GuestMemory, page: u64, content: &mut PageBytes) -> bool {
    host_page(memory, page).map(|found| *content = *found).is_some()
}

/// Takes the page numbers that devices have written since the last call, sorted, and forgets them.
pub fn take_device_dirty(memory: &GuestMemory) -> Vec<u64> {
    let mut pages = Vec::new();
    for region in memory.iter() {
        let first = region.start_addr().0 / PAGE_SIZE;
        let mapping: &MmapRegion<WrittenPages> = region;
        pages.extend(mapping.bitmap().take().into_iter().map(|page| first + page));
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
