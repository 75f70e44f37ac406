//! Pages of RAM as they were at one moment, for someone who reads them while the guest goes on.
//!
//! Whoever is about to write to a page keeps its content first; the reader takes what was kept, or what RAM still has.
//! Neither waits for the other: both copy first and then say so, and of two copies the first to be announced counts.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::memory::{PAGE_SIZE, PageBytes};

/// Copies a page of RAM as it is now.
type ReadPage = dyn Fn(GuestAddress, &mut PageBytes) + Send + Sync;

/// Some pages at one moment. The engine is given it with [`crate::engine::Engine::keep_past`].
pub struct Past {
    read: Box<ReadPage>,
    /// Ascending.
    pages: Vec<u64>,
    /// For each page: null, [`taken`], or the content that was kept.
    contents: Vec<AtomicPtr<PageBytes>>,
}

/// Stands for the content of a page that the reader has taken: nobody needs to keep it any more. Never dereferenced.
fn taken() -> *mut PageBytes {
    std::ptr::without_provenance_mut(1)
}

impl Past {
    /// The present, before anything else happens to these pages of RAM, in ascending order and each once.
    pub fn new<B: Bitmap + Send + Sync + 'static>(memory: GuestMemoryMmap<B>, pages: Vec<u64>) -> Past {
        assert!(pages.is_sorted_by(|a, b| a < b), "ascending, each once");
        let contents = pages.iter().map(|_| AtomicPtr::new(null_mut())).collect();
        let read = move |gpa, content: &mut PageBytes| {
            if memory.read_slice(content, gpa).is_err() {
                // Not RAM.
                content.fill(0);
            }
        };
        Past { read: Box::new(read), pages, contents }
    }

    /// The pages.
    pub fn pages(&self) -> &[u64] {
        &self.pages
    }

    /// To be called before a page is written, by the one thread that lets the guest run.
    pub fn keep(&self, page: u64) {
        if let Ok(index) = self.pages.binary_search(&page) {
            self.keep_at(index);
        }
    }

    /// Keeps all that is left, before something is written nobody knows where.
    pub fn keep_all(&self) {
        (0..self.pages.len()).for_each(|index| self.keep_at(index));
    }

    fn keep_at(&self, index: usize) {
        let slot = &self.contents[index];
        if !slot.load(Ordering::Acquire).is_null() {
            return;
        }
        let mut copy = Box::new([0; PAGE_SIZE as usize]);
        self.copy(index, &mut copy);
        let copy = Box::into_raw(copy);
        if slot.compare_exchange(null_mut(), copy, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: it was made above and nobody else has seen it.
            drop(unsafe { Box::from_raw(copy) });
        }
    }

    /// Takes the content of the page at `index` of [`Past::pages`]. Each is taken at most once; false if it was.
    pub fn take(&self, index: usize, content: &mut PageBytes) -> bool {
        let slot = &self.contents[index];
        if slot.load(Ordering::Acquire).is_null() {
            // A write in the middle of this is seen below: the content was kept before it.
            self.copy(index, content);
        }
        let kept = slot.swap(taken(), Ordering::AcqRel);
        if kept == taken() {
            return false;
        }
        if !kept.is_null() {
            // SAFETY: whoever kept it has given it away with the pointer, and the swap has given it to this call.
            *content = *unsafe { Box::from_raw(kept) };
        }
        true
    }

    fn copy(&self, index: usize, content: &mut PageBytes) {
        (self.read)(GuestAddress(self.pages[index].wrapping_mul(PAGE_SIZE)), content);
    }
}

impl Drop for Past {
    fn drop(&mut self) {
        for slot in &mut self.contents {
            let kept = *slot.get_mut();
            if !kept.is_null() && kept != taken() {
                // SAFETY: it was given away with the pointer, and nobody has taken it.
                drop(unsafe { Box::from_raw(kept) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;

    const PAGES: u64 = 64;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), (PAGES * PAGE_SIZE) as usize)]).expect("RAM")
    }

    fn fill(memory: &GuestMemory, page: u64, byte: u8) {
        memory.write_slice(&[byte; PAGE_SIZE as usize], GuestAddress(page * PAGE_SIZE)).expect("RAM");
    }

    fn taken_from(past: &Past, index: usize) -> u8 {
        let mut content = [0; PAGE_SIZE as usize];
        assert!(past.take(index, &mut content));
        assert!(content.iter().all(|byte| *byte == content[0]), "a torn page");
        content[0]
    }

    #[test]
    fn what_is_written_later_is_not_seen() {
        let memory = memory();
        (0..PAGES).for_each(|page| fill(&memory, page, page as u8));
        let past = Past::new(memory.clone(), vec![1, 5, 9, 12]);
        past.keep(5);
        past.keep(5);
        past.keep(6);
        fill(&memory, 5, 0xEE);
        assert_eq!(taken_from(&past, 0), 1);
        fill(&memory, 1, 0xEE);
        assert_eq!(taken_from(&past, 1), 5);
        past.keep_all();
        [9, 12].iter().for_each(|page| fill(&memory, *page, 0xEE));
        assert_eq!(taken_from(&past, 2), 9);
        assert!(!past.take(2, &mut [0; PAGE_SIZE as usize]), "only once");
        // The last one is kept and dropped.
    }
}
