//! The stack windows: ranges around RSP that translated code may reach without asking the TLB.

use super::block::{Class, SPARE_WINDOWS, SpareWindow, WINDOW_SPANS, window_of};
use super::coherence::is_shared;
use super::core::Core;
use crate::memory::{PAGE_MASK, PAGE_SIZE};

impl Core {
    /// Forgets the stack windows. Their distances stay: the running block may still add one.
    pub fn forget_windows(&mut self) {
        self.forget_window(0);
        self.forget_window(1);
    }

    /// Forgets one of them.
    pub fn forget_window(&mut self, which: usize) {
        // SAFETY: the vCPU block is owned by this core.
        unsafe {
            (*self.block).near.windows[which].places = [0; WINDOW_SPANS.len()];
            if std::mem::take(&mut self.spares_used[which]) {
                (*self.block).spares[which].iter_mut().for_each(|spare| spare.page = SpareWindow::NONE);
            }
        }
    }

    /// A block found that the stack window does not cover its reach: moves the window to RSP. False if the window
    /// does not cover it then either.
    pub fn move_window(&mut self, block: u32) -> bool {
        /// Blocks that may miss the window before it is moved again: going back and forth costs more than it saves.
        const PATIENCE: u32 = 32;
        /// Pages that the window may have on each side.
        const PAGES: u64 = 16;
        let Some((min, max)) = self.t.blocks[block].window else { return false };
        let class = self.current_class();
        let rsp = self.state().gpr[crate::state::gpr::RSP];
        let (first, last) = (rsp.wrapping_add(min as u64), rsp.wrapping_add(max as u64).wrapping_sub(1));
        // SAFETY: the vCPU block is owned by this core.
        unsafe { (*self.block).window_patience = PATIENCE };
        let Some(distance) = self.written_page(first, class) else { return false };
        let mut low = first & !PAGE_MASK;
        let mut high = low + PAGE_MASK;
        while low > (first & !PAGE_MASK).saturating_sub(PAGES * PAGE_SIZE)
            && self.written_page(low - PAGE_SIZE, class) == Some(distance)
        {
            low -= PAGE_SIZE;
        }
        while high < (first | PAGE_MASK).saturating_add(PAGES * PAGE_SIZE)
            && self.written_page(high + 1, class) == Some(distance)
        {
            high += PAGE_SIZE;
        }
        let size = high - low + 1;
        // SAFETY: as above.
        let window = unsafe { &mut (*self.block).near.windows[window_of(class as usize)] };
        self.low_windows |= class != Class::User && !is_shared(low);
        window.low = low;
        window.distance = distance;
        window.places = WINDOW_SPANS.map(|span| size + 1 - span as u64);
        let page = rsp >> 12;
        let spare = SpareWindow { page, window: *window };
        // SAFETY: as above.
        unsafe { (*self.block).spares[window_of(class as usize)][page as usize % SPARE_WINDOWS] = spare };
        self.spares_used[window_of(class as usize)] = true;
        first <= last && last <= high
    }

    /// Host minus linear address of a page in the write TLB.
    fn written_page(&self, linear: u64, class: Class) -> Option<u64> {
        let index = ((linear >> 12) & self.tlb_mask as u64) as usize;
        // SAFETY: the vCPU block is owned by this core.
        let tlb = unsafe { &(*self.block).tlb[class as usize] };
        let (tag, distance) = (tlb.tags[1][index], tlb.distances[index]);
        // Supervisor code has one window; with SMAP suspended the TLB may hold pages that it must not cover.
        (class != Class::KernelAc && tag == linear & !PAGE_MASK).then_some(distance)
    }
}
