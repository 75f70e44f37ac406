//! Keeps every cached address translation coherent with the guest's page tables.
//!
//! Coherence is what keeps TLBs out of State(N): a page that a translation was derived from is marked, writes to
//! it take the slow path, and a write to a present entry forgets what came from it. So a guest never sees a stale
//! translation, whatever the size of the TLBs and however often they are flushed.

use super::block::{ITLB_ENTRIES, InUse, window_of};
use super::core::Core;
use super::pages::{HAS_CODE, IS_TABLE, MANY_BASES};
use crate::memory::{PAGE_MASK, PAGE_SIZE};

/// The address bits of CR3.
const ROOT_MASK: u64 = 0x000F_FFFF_FFFF_F000;
/// Slow writes after which a page that was a table is taken for an ordinary one again.
const TABLE_WRITES_MAX: u16 = 600;

/// Which TLB indexes are in use, so that flushing costs what was filled.
#[derive(Default)]
pub struct Used {
    /// Pages in the upper half of the address space.
    pub shared: InUse,
    pub local: InUse,
}

impl Used {
    /// Notes a filled entry. One that was filled before may be in the other list too: a flush of that list then
    /// forgets it early, but one that must be forgotten is always found.
    pub fn add(&mut self, index: usize, linear: u64) {
        if is_shared(linear) { &mut self.shared } else { &mut self.local }.add(index);
    }
}

/// Translations of the upper half of the address space may outlive a load of CR3, see `switch_address_space`.
pub fn is_shared(linear: u64) -> bool {
    linear >> 63 != 0
}

impl Core {
    /// Forgets translations; those of the upper half only if `shared`.
    pub fn flush_tlbs(&mut self, shared: bool) {
        self.statistics.flushes += 1;
        if shared {
            self.parked.clear();
            self.root = self.state().cr3 & ROOT_MASK;
            self.t.flushes += u64::from(std::mem::take(&mut self.walked));
        }
        self.direct_flush(shared);
        for c in 0..super::block::CLASSES {
            for write in 0..2 {
                self.flush_tlb(c, write, shared);
            }
            self.flush_itlb(c, shared);
        }
    }

    /// CR3 was loaded. What came from the old tables is put aside, and had again when they are. Translations of the upper
    /// half are kept if they are those of the new tables, too: if both top-level tables lead to the same tables for it.
    /// Without that condition a guest would see what happens to be cached.
    pub fn switch_address_space(&mut self) {
        let new = self.state().cr3 & ROOT_MASK;
        if new == self.root {
            // What is cached came from the same tables, and says what they say.
            return;
        }
        let same = match (self.upper_half(self.root), self.upper_half(new)) {
            (Some(old), Some(new)) => old == new,
            _ => false,
        };
        if !same {
            self.flush_tlbs(true);
            return;
        }
        self.statistics.flushes += 1;
        self.direct_flush(false);
        self.park(self.root);
        self.unpark(new);
        self.root = new;
        // What is kept comes from the new table as well from now on.
        let page = (new / PAGE_SIZE) as usize;
        if self.t.pages.records[page as u32].flags & IS_TABLE == 0 {
            self.t.pages.records[page as u32].flags |= IS_TABLE;
            self.t.pages.records[page as u32].table_base = MANY_BASES;
            self.t.pages.records[page as u32].table_writes = 0;
            self.watched += 1;
            self.begin_to_watch(page as u64);
        }
    }

    /// Entries 256 to 511 of a top-level table; None if it is not in RAM.
    fn upper_half(&self, root: u64) -> Option<&[u8]> {
        let half = PAGE_SIZE / 2;
        let table = self.memory.host(root + half, half)?;
        // SAFETY: RAM of that length, which nobody writes while the reference lives: the guest is not running.
        Some(unsafe { std::slice::from_raw_parts(table, half as usize) })
    }

    fn flush_tlb(&mut self, c: usize, write: usize, shared: bool) {
        if write == 1 {
            self.forget_window(window_of(c));
        }
        // SAFETY: the vCPU block is owned by this core and nothing else refers to its TLBs now.
        let tlb = unsafe { &mut (*self.block).tlb[c] };
        let used = &mut self.used[c][write];
        for index in used.local.take() {
            tlb.forget(index, write == 1);
        }
        if shared {
            for index in used.shared.take() {
                tlb.forget(index, write == 1);
            }
        }
    }

    pub fn flush_itlb(&mut self, c: usize, shared: bool) {
        if shared {
            self.parked.forget_code(c);
        }
        // SAFETY: as above.
        let itlb = unsafe { &mut (*self.block).itlb[c] };
        for index in self.itlb_used[c].local.take() {
            itlb[index] = 0;
        }
        if shared {
            for index in self.itlb_used[c].shared.take() {
                itlb[index] = 0;
            }
        }
    }

    /// Forgets the write translations of a page: from now on, each write must be noticed.
    pub fn begin_to_watch(&mut self, page: u64) {
        let Some(host) = self.memory.host(page * PAGE_SIZE, PAGE_SIZE) else { return };
        // SAFETY: the vCPU block is owned by this core.
        let tlbs = unsafe { &mut (*self.block).tlb };
        for (tlb, used) in tlbs.iter_mut().zip(&self.used) {
            for index in used[1].local.iter().chain(used[1].shared.iter()) {
                if tlb.tags[1][index].wrapping_add(tlb.distances[index]) == host as u64 {
                    tlb.forget(index, true);
                }
            }
        }
        self.parked.forget_writes_of(host as u64);
        self.forget_windows();
        self.direct_watch(page);
    }

    /// Forgets all write translations: from now on, writes are noted again.
    pub fn flush_writes(&mut self) {
        self.parked.forget_writes();
        for c in 0..super::block::CLASSES {
            self.flush_tlb(c, 1, true);
        }
    }

    /// Forgets one linear page.
    pub fn flush_page(&mut self, linear: u64) {
        let vpage = linear >> 12;
        let index = (vpage & self.tlb_mask as u64) as usize;
        // SAFETY: as above.
        let block = unsafe { &mut *self.block };
        for tlb in &mut block.tlb {
            for write in [false, true] {
                if tlb.tags[write as usize][index] == vpage << 12 {
                    tlb.forget(index, write);
                }
            }
        }
        for itlb in &mut block.itlb {
            itlb[vpage as usize % ITLB_ENTRIES] = 0;
        }
        self.parked.forget_page(linear);
        self.direct_flush_page(linear);
        self.forget_windows();
    }

    /// A write of `len` bytes at `offset` of a watched page is about to happen.
    pub fn watched_write(&mut self, page: u64, offset: u64, len: u64, flags: u8) {
        if flags & HAS_CODE != 0 && self.t.pages.hits_code(page as u32, offset as u32, len as u32) {
            self.kill_code(page, offset, len);
        }
        if flags & IS_TABLE != 0 {
            self.table_write(page, offset, len);
        }
    }

    /// Forgets the blocks that were translated from `len` bytes at `offset` of a page.
    pub fn kill_code(&mut self, page: u64, offset: u64, len: u64) {
        for block in self.t.pages.remove_blocks(page as u32, offset as u32, len as u32) {
            self.kill(block);
        }
    }

    fn table_write(&mut self, page: u64, offset: u64, len: u64) {
        let base = self.t.pages.records[page as u32].table_base;
        let first = offset & !7;
        let last = (offset + len - 1) & !7;
        for entry in (first..=last).step_by(8) {
            let old = self.memory.read_u64(page * PAGE_SIZE + entry).unwrap_or(0);
            if old & 1 == 0 {
                continue;
            }
            if base != MANY_BASES && base & 7 == 1 {
                let linear = (base & !PAGE_MASK) + (entry / 8) * PAGE_SIZE;
                // Sign-extend bit 47.
                self.flush_page(((linear << 16) as i64 >> 16) as u64);
            } else {
                self.flush_tlbs(true);
                break;
            }
        }
        let writes = &mut self.t.pages.records[page as u32].table_writes;
        *writes = writes.saturating_add(1 + (len / 8) as u16);
        if *writes > TABLE_WRITES_MAX {
            self.flush_tlbs(true);
            self.t.pages.records[page as u32].flags &= !IS_TABLE;
        }
    }

    /// True if a write to watched RAM would change what the running block executes, so that the instruction has
    /// to be executed alone.
    pub fn disturbs(&self, page: u64, offset: u64, len: u64) -> bool {
        let flags = self.t.pages.records[page as u32].flags;
        if flags & HAS_CODE != 0 && self.t.pages.hits_code(page as u32, offset as u32, len as u32) {
            return true;
        }
        if flags & IS_TABLE != 0 {
            let old = self.memory.read_u64(page * PAGE_SIZE + (offset & !7)).unwrap_or(0);
            let old_last = self.memory.read_u64(page * PAGE_SIZE + ((offset + len - 1) & !7)).unwrap_or(0);
            // The running block may hold a translation that came from a present entry.
            return (old | old_last) & 1 != 0;
        }
        false
    }
}
