//! A digest of RAM that is cheap to keep current: only pages that changed are hashed again.
//!
//! Each page has a 256-bit digest, BLAKE3 over (page index, content), and zero for a page of zeros. The digest of
//! RAM is the lane-wise wrapping sum of the digests of all pages, as four 64-bit lanes, so it does not depend on
//! the order in which pages changed. It is meant to tell runs apart; it is not a commitment against someone who
//! constructs memory contents on purpose.

use orrery_cpu::memory::{GuestMemory, PAGE_SIZE};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

type Lanes = [u64; 4];

/// Digests of all pages and their sum.
#[derive(Clone)]
pub struct MemoryDigest {
    /// (first page index, digests of the region's pages).
    regions: Vec<(u64, Vec<Lanes>)>,
    sum: Lanes,
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

/// The digest of one page of 4096 bytes.
pub fn page_digest(index: u64, content: &[u8]) -> [u64; 4] {
    assert_eq!(content.len() as u64, PAGE_SIZE);
    // SAFETY: any bytes are valid u64 values; align_to returns what is aligned and leaves the rest in the ends.
    let (head, words, tail) = unsafe { content.align_to::<u64>() };
    if words.iter().all(|w| *w == 0) && head.iter().chain(tail).all(|b| *b == 0) {
        return [0; 4];
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(content);
    hasher.update(&index.to_le_bytes());
    let hash = hasher.finalize();
    let mut lanes = [0; 4];
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
                (region.start_addr().0 / PAGE_SIZE, vec![[0; 4]; pages as usize])
            })
            .collect();
        MemoryDigest { regions, sum: [0; 4] }
    }

    /// Hashes the given pages again. Pages outside RAM are ignored.
    pub fn update(&mut self, memory: &GuestMemory, pages: impl IntoIterator<Item = u64>) {
        let mut content = [0u8; PAGE_SIZE as usize];
        for page in pages {
            if !read_page(memory, page, &mut content) {
                continue;
            }
            let Some(slot) = self.slot(page) else { continue };
            let fresh = page_digest(page, &content);
            let old = std::mem::replace(slot, fresh);
            subtract(&mut self.sum, &old);
            add(&mut self.sum, &fresh);
        }
    }

    fn slot(&mut self, page: u64) -> Option<&mut Lanes> {
        self.regions.iter_mut().find_map(|(first, digests)| {
            let index = page.checked_sub(*first)?;
            digests.get_mut(usize::try_from(index).ok()?)
        })
    }

    /// The digest of all of RAM.
    pub fn value(&self) -> [u64; 4] {
        self.sum
    }

    /// Pages whose digests differ from those of another machine's RAM of the same size.
    pub fn differing_pages(&self, other: &MemoryDigest) -> Vec<u64> {
        let mut pages = Vec::new();
        for ((first, mine), (_, theirs)) in self.regions.iter().zip(&other.regions) {
            let differing = mine.iter().zip(theirs).enumerate().filter(|(_, (a, b))| a != b);
            pages.extend(differing.map(|(index, _)| first + index as u64));
        }
        pages
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
        memory.write_slice(&[0; 8192 * 3], GuestAddress(0x5000)).unwrap();
        digest.update(&memory, take_device_dirty(&memory));
        assert_eq!(digest.value(), [0; 4]);
    }
}
