//! Guest memory as the debugger reads it: through page tables, without changing accessed bits or anything else.

use orrery_cpu::CpuState;
use orrery_cpu::paging::is_canonical;
use orrery_cpu::state::control;
use orrery_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

const FRAME: u64 = 0x000F_FFFF_FFFF_F000;
const PAGE_BYTES: u64 = 4096;

/// Guest-physical address of a linear one by the four-level tables at `root` (Intel SDM volume 3, section 4.5),
/// whatever the rights are. None if it is not mapped.
pub fn translate_in(memory: &GuestMemory, root: u64, linear: u64) -> Option<u64> {
    const PRESENT: u64 = 1;
    const LARGE: u64 = 0x80;
    if !is_canonical(linear) {
        return None;
    }
    let mut table = root & FRAME;
    for shift in [39, 30, 21, 12] {
        let slot = table.checked_add(8 * ((linear >> shift) & 511))?;
        let entry: u64 = memory.read_obj(GuestAddress(slot)).ok()?;
        if entry & PRESENT == 0 {
            return None;
        }
        if shift == 12 || (shift < 39 && entry & LARGE != 0) {
            let offset = (1u64 << shift) - 1;
            return Some((entry & FRAME & !offset) | (linear & offset));
        }
        table = entry & FRAME;
    }
    None
}

/// Guest-physical address of a linear one in the current address space.
pub fn translate(memory: &GuestMemory, cpu: &CpuState, linear: u64) -> Option<u64> {
    if cpu.cr0 & control::CR0_PG == 0 {
        return Some(linear);
    }
    translate_in(memory, cpu.cr3, linear)
}

/// The parts of a range of linear addresses that lie in one page each: (linear address, length), at most
/// `len / 4096 + 2` of them.
pub fn pages(linear: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = linear.wrapping_add(done);
        let piece = (PAGE_BYTES - at % PAGE_BYTES).min(len - done);
        done += piece;
        (piece > 0).then_some((at, piece))
    })
}

/// Reads from a linear address on; how many bytes could be read before the first that is not mapped.
pub fn read(memory: &GuestMemory, cpu: &CpuState, linear: u64, data: &mut [u8]) -> usize {
    let mut done = 0;
    for (at, piece) in pages(linear, data.len() as u64) {
        let Some(gpa) = translate(memory, cpu, at) else { break };
        let target = &mut data[done..done + piece as usize];
        if memory.read_slice(target, GuestAddress(gpa)).is_err() {
            break;
        }
        done += piece as usize;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped() -> GuestMemory {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
        write(0x1000, 0x2003);
        write(0x2000, 0x3003);
        write(0x3000, 0x4003);
        write(0x4000 + 8 * 5, 0x8003);
        write(0x4000 + 8 * 6, 0x7003);
        write(0x3008, 0x83);
        memory
    }

    #[test]
    fn tables_are_walked() {
        let memory = mapped();
        assert_eq!(translate_in(&memory, 0x1018, 0x5123), Some(0x8123));
        assert_eq!(translate_in(&memory, 0x1000, 0x20_0456), Some(0x456));
        assert_eq!(translate_in(&memory, 0x1000, 0x7000), None);
        assert_eq!(translate_in(&memory, 0x1000, 1 << 63), None);
        assert_eq!(translate_in(&memory, 0xFFFF_FFFF_F000, 0x5000), None);
    }

    #[test]
    fn reading_stops_at_the_first_hole() {
        let memory = mapped();
        memory.write_slice(b"ab", GuestAddress(0x8FFE)).unwrap();
        memory.write_slice(b"cd", GuestAddress(0x7000)).unwrap();
        let mut cpu = CpuState::long_mode_boot(0, 0, 0, 0x1000, 0, 0);
        let mut data = [0; 4];
        assert_eq!((read(&memory, &cpu, 0x5FFE, &mut data), &data), (4, b"abcd"));
        assert_eq!(read(&memory, &cpu, 0x6FFE, &mut data), 2);
        assert_eq!(read(&memory, &cpu, u64::MAX - 1, &mut data), 0);
        cpu.cr0 &= !control::CR0_PG;
        assert_eq!((read(&memory, &cpu, 0x7000, &mut data[..2]), &data[..2]), (2, &b"cd"[..]));
    }

    #[test]
    fn a_range_is_cut_at_pages() {
        assert_eq!(pages(0x1FFE, 4).collect::<Vec<_>>(), [(0x1FFE, 2), (0x2000, 2)]);
        assert_eq!(pages(u64::MAX, 2).collect::<Vec<_>>(), [(u64::MAX, 1), (0, 1)]);
        assert_eq!(pages(5, 0).count(), 0);
    }
}
