//! Page faults in the virtual machine: most only mean that a page of the guest is not in its tables yet.

use super::super::block::Class;
use super::super::core::Core;
use super::ROOT_MASK;
use crate::memory::{PAGE_MASK, PAGE_SIZE};
use crate::paging::{PHYSICAL_ADDRESS_MASK, entry};

impl Core {
    /// Maps what the guest's own tables map at `linear`, and some of what is around it, as far as nothing must happen
    /// there: accessed and dirty flags are set, and nobody watches. False if the access is the soft engine's.
    pub(super) fn direct_page_fault(&mut self, linear: u64, write: bool) -> bool {
        /// Pages on each side of the one that is wanted, within its table.
        const AROUND: u64 = 16;
        if linear >> 47 != 0 {
            return false;
        }
        let page = linear & !PAGE_MASK;
        let Some(changed) = self.direct_map(page, write) else { return false };
        let table = page >> 21;
        for distance in 1..=AROUND {
            for near in [page.wrapping_add(distance * PAGE_SIZE), page.wrapping_sub(distance * PAGE_SIZE)] {
                if near >> 21 == table {
                    self.direct_map(near, write);
                }
            }
        }
        changed
    }

    /// Maps one page. None if that cannot be; false if it was mapped.
    fn direct_map(&mut self, linear: u64, write: bool) -> Option<bool> {
        let mapping = peek(self, linear)?;
        let page = mapping.gpa / PAGE_SIZE;
        self.memory.host(page * PAGE_SIZE, PAGE_SIZE)?;
        let write_allowed = mapping.writable && mapping.dirty;
        if write && !write_allowed {
            return None;
        }
        // It is marked and changes nothing else: all flags are set.
        let translation = self.walk(linear, write, false, Class::User).ok()?;
        if translation.gpa & !PAGE_MASK != mapping.gpa || translation.updated != 0 {
            return None;
        }
        if write && self.t.pages.records[page as u32].flags != 0 {
            return None;
        }
        let space = self.state().cr3 & ROOT_MASK;
        let changed = self.direct().tables.fill(space, linear, page as u32, write);
        if write {
            self.mark_dirty(page);
        }
        Some(changed)
    }
}

/// A user page as the guest's tables have it.
struct Mapping {
    gpa: u64,
    writable: bool,
    dirty: bool,
}

/// Looks at the guest's tables without changing them. None if the page is not a user page with all accessed flags set.
fn peek(core: &Core, linear: u64) -> Option<Mapping> {
    let mut table = core.state().cr3 & PHYSICAL_ADDRESS_MASK & !0xFFF;
    let mut rights = entry::WRITE | entry::USER;
    for shift in [39, 30, 21, 12] {
        let value = core.memory.read_u64(table | (linear >> shift & 0x1FF) << 3)?;
        if value & (entry::PRESENT | entry::ACCESSED) != entry::PRESENT | entry::ACCESSED {
            return None;
        }
        rights &= value;
        let base = value & PHYSICAL_ADDRESS_MASK & !0xFFF;
        if shift == 12 || shift < 39 && value & entry::PAGE_SIZE != 0 {
            let offset = (1u64 << shift) - 1;
            return (rights & entry::USER != 0).then_some(Mapping {
                gpa: (base & !offset | linear & offset) & !0xFFF,
                writable: rights & entry::WRITE != 0,
                dirty: value & entry::DIRTY != 0,
            });
        }
        table = base;
    }
    None
}
