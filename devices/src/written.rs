//! Notes which pages of RAM devices write. Costs what is written, whatever the size of RAM.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

const PAGE_BYTES: usize = 4096;

/// Pages of one region of RAM that were written through [`crate::GuestMemory`] and have not been taken yet.
#[derive(Debug, Default)]
pub struct WrittenPages(Mutex<BTreeSet<u64>>);

impl WrittenPages {
    /// Numbers of the pages in the region, ascending; they are forgotten.
    pub fn take(&self) -> Vec<u64> {
        std::mem::take(&mut *self.lock()).into_iter().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        // The set is whole whoever panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> WithBitmapSlice<'a> for WrittenPages {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for WrittenPages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len > 0 {
            let last = offset.saturating_add(len - 1) / PAGE_BYTES;
            self.lock().extend(offset as u64 / PAGE_BYTES as u64..=last as u64);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.lock().contains(&(offset as u64 / PAGE_BYTES as u64))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for WrittenPages {
    fn with_len(_bytes: usize) -> WrittenPages {
        WrittenPages::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestMemory;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, MmapRegion};

    #[test]
    fn each_page_is_there_once_until_it_is_taken() {
        let written = WrittenPages::with_len(1 << 40);
        for (offset, len) in [(4095, 2), (0, 1), (3 << 30, 4096), (9 << 12, 0), (4096, 1)] {
            written.mark_dirty(offset, len);
        }
        assert!(written.dirty_at(8191) && !written.dirty_at(8192) && !written.dirty_at(9 << 12));
        assert_eq!(written.take(), [0, 1, (3 << 30) >> 12]);
        assert!(written.take().is_empty() && !written.dirty_at(0));
    }

    #[test]
    fn writes_to_memory_are_noted_and_reads_are_not() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0x10_0000), 1 << 20)]).unwrap();
        memory.write_slice(&[1; 4097], GuestAddress(0x10_2FFF)).unwrap();
        memory.write_obj(7u16, GuestAddress(0x10_8000)).unwrap();
        memory.read_obj::<u16>(GuestAddress(0x10_9000)).unwrap();
        let region: &MmapRegion<WrittenPages> = memory.iter().next().unwrap();
        assert_eq!(region.bitmap().take(), [2, 3, 8]);
    }
}
