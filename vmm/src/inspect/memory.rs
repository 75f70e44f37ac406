//! Guest memory as a reader outside sees it: physical, or virtual through any page-table root. Reading sets no
//! accessed flag and leaves no trace. Page tables are the guest's own and may be anything at all: every walk has four
//! steps at most, and everything outside RAM reads as not mapped.

use std::ops::Range;

use orrery_cpu::CpuState;
use orrery_cpu::paging::{PHYSICAL_ADDRESS_MASK, entry, is_canonical};
use orrery_cpu::state::control;
use orrery_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

/// A page that translations are asked for one by one, in bytes.
pub const PAGE: u64 = 4096;

/// Memory that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The page tables map nothing there.
    #[error("virtual address {address:#x} is not mapped")]
    Unmapped {
        /// The first address without a mapping.
        address: u64,
    },
    /// No RAM there.
    #[error("there is no RAM at physical address {address:#x}")]
    NoRam {
        /// Guest-physical address.
        address: u64,
    },
}

/// Where a virtual address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Guest-physical address.
    pub physical: u64,
    /// Size of the page, in bytes: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// User mode may access it.
    pub user: bool,
    /// It may be written.
    pub writable: bool,
    /// It may be executed.
    pub executable: bool,
}

/// One view of guest memory: a set of page tables, or none.
#[derive(Clone, Copy)]
pub struct AddressSpace<'a> {
    memory: &'a GuestMemory,
    /// Guest-physical address of the root table; None where addresses are physical.
    root: Option<u64>,
}

impl<'a> AddressSpace<'a> {
    /// Memory by guest-physical address.
    pub fn physical(memory: &'a GuestMemory) -> AddressSpace<'a> {
        AddressSpace { memory, root: None }
    }

    /// Memory through the page tables at `root`: a value of CR3, of which PCID and flags are ignored.
    pub fn rooted(memory: &'a GuestMemory, root: u64) -> AddressSpace<'a> {
        AddressSpace { memory, root: Some(root & PHYSICAL_ADDRESS_MASK & !(PAGE - 1)) }
    }

    /// Memory as the vCPU sees it now.
    pub fn of(cpu: &CpuState, memory: &'a GuestMemory) -> AddressSpace<'a> {
        if cpu.cr0 & control::CR0_PG == 0 { Self::physical(memory) } else { Self::rooted(memory, cpu.cr3) }
    }

    /// The page tables' root, if there are any.
    pub fn root(&self) -> Option<u64> {
        self.root
    }

    /// Translates an address (Intel SDM volume 3, section 4.5); None where nothing is mapped.
    pub fn translate(&self, address: u64) -> Option<Mapped> {
        self.walk(address).ok()
    }

    /// As [`AddressSpace::translate`], but says how many bytes around an unmapped address are unmapped with it.
    fn walk(&self, address: u64) -> Result<Mapped, u64> {
        let Some(root) = self.root else {
            return Ok(Mapped { physical: address, page_size: PAGE, user: true, writable: true, executable: true });
        };
        if !is_canonical(address) {
            return Err(PAGE);
        }
        let mut table = root;
        let mut rights = entry::WRITE | entry::USER;
        let mut executable = true;
        for shift in [39, 30, 21, 12] {
            let value = self.physical_u64(table | (address >> shift & 0x1FF) << 3).unwrap_or(0);
            if value & entry::PRESENT == 0 {
                return Err(1 << shift);
            }
            rights &= value;
            executable &= value & entry::NO_EXECUTE == 0;
            if shift == 12 || (shift < 39 && value & entry::PAGE_SIZE != 0) {
                let offset = (1u64 << shift) - 1;
                return Ok(Mapped {
                    physical: value & PHYSICAL_ADDRESS_MASK & !(PAGE - 1) & !offset | address & offset,
                    page_size: offset + 1,
                    user: rights & entry::USER != 0,
                    writable: rights & entry::WRITE != 0,
                    executable,
                });
            }
            table = value & PHYSICAL_ADDRESS_MASK & !(PAGE - 1);
        }
        Err(PAGE)
    }

    /// The mapped ranges between two page-aligned addresses, neighbours joined.
    pub fn mapped_ranges(&self, start: u64, end: u64) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut at = start;
        while at < end {
            let (size, mapped) = match self.walk(at) {
                Ok(mapped) => (mapped.page_size, true),
                Err(size) => (size, false),
            };
            let next = ((at & !(size - 1)).saturating_add(size)).min(end);
            match ranges.last_mut() {
                Some(last) if mapped && last.end == at => last.end = next,
                _ if mapped => ranges.push(at..next),
                _ => {}
            }
            at = next;
        }
        ranges
    }

    fn physical_u64(&self, physical: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.memory.read_slice(&mut bytes, GuestAddress(physical)).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    /// Fills `into` from `address` on. What precedes an unmapped address has then been filled.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), ReadError> {
        let mut done = 0;
        while done < into.len() {
            let at = address.wrapping_add(done as u64);
            let mapped = self.translate(at).ok_or(ReadError::Unmapped { address: at })?;
            let in_page = (mapped.page_size - (at & (mapped.page_size - 1))).min((into.len() - done) as u64) as usize;
            self.memory
                .read_slice(&mut into[done..done + in_page], GuestAddress(mapped.physical))
                .map_err(|_| ReadError::NoRam { address: mapped.physical })?;
            done += in_page;
        }
        Ok(())
    }

    /// Reads up to `len` bytes, and fewer if the mapping ends before.
    pub fn read_up_to(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let at = address.wrapping_add(bytes.len() as u64);
            let count = ((PAGE - at % PAGE) as usize).min(len - bytes.len());
            let start = bytes.len();
            bytes.resize(start + count, 0);
            if self.read(at, &mut bytes[start..]).is_err() {
                bytes.truncate(start);
                break;
            }
        }
        bytes
    }

    /// Reads a little-endian u64.
    pub fn u64(&self, address: u64) -> Result<u64, ReadError> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads a little-endian u32.
    pub fn u32(&self, address: u64) -> Result<u32, ReadError> {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Reads an unsigned number of 1 to 8 bytes.
    pub fn unsigned(&self, address: u64, size: usize) -> Result<u64, ReadError> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes[..size.min(8)])?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads a zero-terminated string of at most `limit` bytes; what is not UTF-8 is replaced.
    pub fn string(&self, address: u64, limit: usize) -> Result<String, ReadError> {
        let mut bytes = self.read_up_to(address, limit);
        match bytes.iter().position(|byte| *byte == 0) {
            Some(end) => bytes.truncate(end),
            None if bytes.is_empty() => return Err(ReadError::Unmapped { address }),
            None => {}
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram;

    fn tables() -> GuestMemory {
        let memory = ram::create(16 << 20).unwrap();
        let put = |address: u64, value: u64| memory.write_obj(value, GuestAddress(address)).unwrap();
        put(0x1000, 0x2000 | 7); // PML4[0]
        put(0x2000, 0x3000 | 7); // PDPT[0]
        put(0x3000, 0x4000 | 7); // PD[0]
        put(0x3008, 0x20_0000 | 0x83); // PD[1]: 2 MiB, supervisor
        put(0x4000 + 8 * 5, 0x9000 | 5 | 1 << 63); // 0x5000: read-only, no execution
        put(0x4000 + 8 * 6, 0xA000 | 7);
        put(0x4000 + 8 * 7, 0x7FFF_F000 | 7); // outside RAM
        put(0x1000 + 8 * 511, 0x1000 | 3); // a table that holds itself
        memory
    }

    #[test]
    fn pages_of_all_kinds_are_found() {
        let memory = tables();
        let space = AddressSpace::rooted(&memory, 0x1000 | 0xFFF);
        let small = space.translate(0x5123).unwrap();
        assert_eq!((small.physical, small.page_size), (0x9123, 4096));
        assert!(small.user && !small.writable && !small.executable);
        let large = space.translate(0x21_2345).unwrap();
        assert_eq!((large.physical, large.page_size, large.user), (0x21_2345, 2 << 20, false));
        assert_eq!(space.translate(0x8000), None);
        assert_eq!(space.translate(1 << 50), None);
        assert_eq!(space.mapped_ranges(0, 1 << 39), [0x5000..0x8000, 0x20_0000..0x40_0000]);
        // Four steps, then it ends, even where tables contain themselves.
        assert_eq!(space.translate(0xFFFF_FFFF_FFFF_F000).unwrap().physical, 0x1000);
    }

    #[test]
    fn reads_cross_pages_and_stop_where_the_mapping_does() {
        let memory = tables();
        memory.write_slice(b"abcd", GuestAddress(0x9FFE)).unwrap();
        let space = AddressSpace::rooted(&memory, 0x1000);
        let mut bytes = [0; 4];
        space.read(0x5FFE, &mut bytes).unwrap();
        assert_eq!(&bytes, b"abcd");
        assert_eq!(space.read(0x4FFF, &mut bytes), Err(ReadError::Unmapped { address: 0x4FFF }));
        assert_eq!(space.read(0x7000, &mut bytes), Err(ReadError::NoRam { address: 0x7FFF_F000 }));
        assert_eq!(space.read_up_to(0x5FFE, 1 << 20).len(), 4096 + 2);
        assert_eq!(space.string(0x5FFE, 4).unwrap(), "abcd");
        assert_eq!(space.u64(u64::MAX - 3), Err(ReadError::Unmapped { address: 0 }));
    }
}
