//! The vCPU block: what translated code reaches through R11. Its layout is the contract between the Rust side and the
//! emitted code, so every field is addressed by `offset_of!`.

#![allow(missing_docs)]

use super::profile::Profile;
use super::residents::RESIDENTS_MAX;
use super::signals::SignalStack;
use super::threads;
use crate::memory::PAGE_SIZE;
use crate::state::{CpuState, gpr};
use std::mem::offset_of;

/// Largest number of entries of one TLB, as a power of two.
pub const TLB_BITS_MAX: u32 = 20;
/// Entries of one TLB.
pub const TLB_ENTRIES: usize = 1 << TLB_BITS_MAX;
/// Entries of the jump cache, a power of two.
pub const JUMP_ENTRIES: usize = 1 << 18;
/// Entries of one instruction TLB, a power of two.
pub const ITLB_ENTRIES: usize = 1 << 13;

/// Which permission checks an access is subject to; each has TLBs of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[repr(u8)]
pub enum Class {
    /// CPL 3.
    User = 0,
    /// CPL 0..2 with SMAP in force (if CR4.SMAP is set).
    Kernel = 1,
    /// CPL 0..2 with RFLAGS.AC set: SMAP suspended.
    KernelAc = 2,
}

/// Which of the stack windows serves a class: supervisor code has one whether SMAP is in force or not.
pub const fn window_of(class: usize) -> usize {
    (class == Class::User as usize) as usize
}

/// Number of [`Class`]es.
pub const CLASSES: usize = 3;

/// The software TLBs of a class, direct-mapped, for reads and for writes. The index is so wide that translated code
/// needs no mask; the host provides what is used of them.
#[repr(C)]
pub struct Tlb {
    /// Linear addresses of the pages that may be read, and of those that may be written; an invalid entry holds a page
    /// that belongs to another index.
    pub tags: [[u64; TLB_ENTRIES]; 2],
    /// Host minus linear addresses of the pages, for both.
    pub distances: [u64; TLB_ENTRIES],
}

impl Tlb {
    /// Enters a page. An entry of the other kind is forgotten if it is about another page.
    pub fn fill(&mut self, index: usize, tag: u64, host: u64, write: bool) {
        let distance = host.wrapping_sub(tag);
        if self.distances[index] != distance {
            // Memory that nobody has used stays so.
            if self.tags[!write as usize][index] != empty_tag(index) {
                self.forget(index, !write);
            }
            self.distances[index] = distance;
        }
        self.tags[write as usize][index] = tag;
    }

    /// Forgets an entry.
    pub fn forget(&mut self, index: usize, write: bool) {
        self.tags[write as usize][index] = empty_tag(index);
    }
}

/// Widths of a block's reach around RSP for which the stack window has a size of its own.
pub const WINDOW_SPANS: [i32; 5] = [64, 128, 256, 512, 1024];

/// Linear memory around RSP that is contiguous in the host, writable, and watched by nobody: what it covers needs no
/// look into a TLB. It is a copy of some write TLB entries and is forgotten with them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct StackWindow {
    /// Host minus linear address.
    pub distance: u64,
    /// Linear address of the first byte.
    pub low: u64,
    /// For each of [`WINDOW_SPANS`]: how many places from `low` on can hold that span. 0 if there is no window.
    pub places: [u64; WINDOW_SPANS.len()],
}

/// Spare windows of supervisor and of user code; a power of two.
pub const SPARE_WINDOWS: usize = 256;

/// A window that serves RSP in one page: threads have a stack each.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct SpareWindow {
    /// Linear page number of RSP, or [`SpareWindow::NONE`].
    pub page: u64,
    pub window: StackWindow,
}

impl SpareWindow {
    /// No page number: a stack may well be in page 0.
    pub const NONE: u64 = u64::MAX;
}

/// Space for an operand that has no single host address: page-crossing or memory-mapped I/O.
#[repr(C, align(64))]
pub struct Bounce(pub [u8; 128]);

/// Numbers of the entries of a table that may be in use, some of them twice: what is to be done to all entries is done to
/// these, and the host need not provide the others.
#[derive(Default)]
pub struct InUse(Vec<u32>);

impl InUse {
    /// So many, and each time as many again as are left, are looked through for double ones.
    const FEW: usize = 1 << 18;

    /// Notes that an entry is in use.
    pub fn add(&mut self, index: usize) {
        if self.0.len() >= Self::FEW && self.0.len() == self.0.capacity() {
            self.sort();
            self.0.reserve(self.0.len());
        }
        self.0.push(index as u32);
    }

    /// Brings the notes in order, each once.
    pub fn sort(&mut self) {
        self.0.sort_unstable();
        self.0.dedup();
    }

    /// The entries noted.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|index| *index as usize)
    }

    /// The entries noted, which are forgotten.
    pub fn take(&mut self) -> impl Iterator<Item = usize> {
        self.0.drain(..).map(|index| index as usize)
    }
}

/// An entry of the jump cache. One that holds no address looked up in it is empty.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct JumpEntry {
    /// The target.
    pub rip: u64,
    /// Host address of the checked entry of its translation; 0 if the entry is empty.
    pub host: u64,
}

/// Where indirect branches go. Each four bytes of code have an entry, so that neighbours share a line of the host's caches
/// and two targets hardly ever an entry.
#[repr(C)]
pub struct JumpCache(pub [JumpEntry; JUMP_ENTRIES]);

/// Bytes of code for each entry of the jump cache.
pub const JUMP_CODE: usize = 4;

impl JumpCache {
    fn index(rip: u64) -> usize {
        rip as usize / JUMP_CODE % JUMP_ENTRIES
    }

    /// Host address of the translation at `rip`, if it is known.
    pub fn get(&self, rip: u64) -> Option<u64> {
        let entry = self.0[Self::index(rip)];
        (entry.rip == rip && entry.host != 0).then_some(entry.host)
    }

    /// The entry for `rip` is empty.
    pub fn has_room(&self, rip: u64) -> bool {
        self.0[Self::index(rip)].host == 0
    }

    /// Enters where a branch to `rip` goes, without a look at what is there.
    pub fn set(&mut self, rip: u64, host: u64, used: &mut InUse) {
        let at = Self::index(rip);
        self.0[at] = JumpEntry { rip, host };
        used.add(at);
    }

    /// Empties the cache.
    pub fn clear(&mut self, used: &mut InUse) {
        for at in used.take() {
            self.0[at] = JumpEntry { rip: 0, host: 0 };
        }
        self.seal();
    }

    /// Makes a cache of zeroes an empty one: target 0 looks at entry 0.
    pub fn seal(&mut self) {
        self.0[0].rip = JUMP_CODE as u64;
    }
}

/// What translated code uses most, where the displacements of instructions have one byte.
#[repr(C, align(64))]
pub struct Near {
    /// Makes the length a multiple of the alignment: what comes last is next to the TLBs.
    pub unused: [u64; 2],
    /// For supervisor and for user code.
    pub windows: [StackWindow; 2],
    /// Guest registers that have no home.
    pub homeless: [u64; 16 - HOMELESS_FIRST],
    /// Status flags while translated code runs: SF, ZF, AF, PF, CF in bits 15:8 (as LAHF), OF in bit 0.
    pub flags: u32,
    /// Which pieces of each thread window are known, a bit each.
    pub threads_known: [u8; 2],
    /// What was in host registers that residents of the running block live in.
    pub evicted: [u64; RESIDENTS_MAX],
    /// Operands of the instruction that gave the flags, to have these again.
    pub operands: [u64; 2],
    /// Host addresses of the ranges of the running block's groups.
    pub groups: [u64; super::groups::GROUPS_MAX],
}

/// The first guest register without a home: those from R11 on have none.
pub const HOMELESS_FIRST: usize = gpr::R11;

/// Offset that R11 points at while translated code runs. Its low bits make it a count for shifts, too: that of the bits
/// of an address within a page.
pub const BLOCK_BIAS: u32 = offset_of!(VcpuBlock, tlb) as u32 - 116;

const _: () = assert!(BLOCK_BIAS % 32 == PAGE_SIZE.trailing_zeros());
// The fields that are to be near are.
const _: () = assert!(BLOCK_BIAS - field::window_low(Class::User) <= 128);
const _: () = assert!(field::tlb_tags(Class::User, false) - BLOCK_BIAS < 128);

/// See the module's text.
#[repr(C, align(4096))]
pub struct VcpuBlock {
    pub state: CpuState,
    pub ymm: [[u8; 32]; 16],
    /// 1 unless the upper halves of all of `ymm` are zero.
    pub upper_in_use: u32,
    pub exit_argument: u32,
    /// Instructions until the limit.
    pub budget: i64,
    pub host_rsp: u64,
    pub core: u64,
    pub memory_slow: u64,
    pub slow_address: u64,
    pub slow_site: u32,
    pub fault_vector: u32,
    /// Nonzero if the machine waits for the guest to accept interrupts.
    pub window_wanted: u32,
    pub slow_resume: u64,
    /// RDTSC may be executed with the following two, which hold until the end of this run: ticks when the budget is
    /// zero, and ticks for each instruction.
    pub tsc_known: u32,
    pub tsc_at_limit: u64,
    pub tsc_per_instruction: u64,
    pub temporary: [u64; 8],
    /// What was in the distance's register at the last host fault.
    pub fault_distance: u64,
    pub fault_rip: u64,
    pub fault_flags: u64,
    pub fault_address: u64,
    pub code_start: u64,
    pub code_end: u64,
    pub fault_exit: u64,
    pub read_bounce: Bounce,
    pub write_bounce: Bounce,
    pub itlb: [[u32; ITLB_ENTRIES]; CLASSES],
    /// Windows that were in use before, by the page of RSP; emptied together with `windows`.
    pub spares: [[SpareWindow; SPARE_WINDOWS]; 2],
    /// Distance of the window in use.
    pub window_distance: u64,
    /// Host addresses that belong to the values of R14 and R15, for each piece of their thread windows.
    pub threads: [[u64; threads::PIECES]; 2],
    /// How often a block may still miss the window before Rust is asked for a better one.
    pub window_patience: u32,
    pub profile: Profile,
    /// Indexed by class: what is at an address for user code must not be entered by supervisor code, nor the other way round.
    pub jumps: [JumpCache; CLASSES],
    /// The last fields in front of the TLBs and the first of these are near the block's base.
    pub near: Near,
    /// Indexed by class.
    pub tlb: [Tlb; CLASSES],
    /// Where signal handlers run while translated code does: here it costs nothing until one does.
    pub signal_stack: [u8; SignalStack::SIZE],
}

/// Offsets of the fields that emitted code uses.
pub mod field {
    use super::*;

    macro_rules! offset {
        ($($name:tt)+) => { offset_of!(VcpuBlock, $($name)+) as u32 };
    }

    pub const fn gpr(index: u8) -> u32 {
        offset!(state) + offset_of!(CpuState, gpr) as u32 + 8 * index as u32
    }
    /// Where a guest register is that has no home.
    pub const fn homeless(guest: u8) -> u32 {
        assert!(guest as usize >= HOMELESS_FIRST, "the others have homes");
        offset!(near.homeless) + 8 * (guest as usize - HOMELESS_FIRST) as u32
    }
    pub const fn segment_base(index: usize) -> u32 {
        offset!(state)
            + offset_of!(CpuState, seg) as u32
            + (index * size_of::<crate::state::Segment>()) as u32
            + offset_of!(crate::state::Segment, base) as u32
    }
    pub const fn selector(index: usize) -> u32 {
        offset!(state)
            + offset_of!(CpuState, seg) as u32
            + (index * size_of::<crate::state::Segment>()) as u32
            + offset_of!(crate::state::Segment, selector) as u32
    }
    pub const RIP: u32 = offset!(state) + offset_of!(CpuState, rip) as u32;
    pub const RFLAGS: u32 = offset!(state) + offset_of!(CpuState, rflags) as u32;
    pub const KERNEL_GS_BASE: u32 = offset!(state) + offset_of!(CpuState, kernel_gs_base) as u32;
    pub const WINDOW_WANTED: u32 = offset!(window_wanted);
    pub const TSC_OFFSET: u32 = offset!(state) + offset_of!(CpuState, tsc_offset) as u32;
    pub const TSC_AUX: u32 = offset!(state) + offset_of!(CpuState, tsc_aux) as u32;
    pub const TSC_KNOWN: u32 = offset!(tsc_known);
    pub const TSC_AT_LIMIT: u32 = offset!(tsc_at_limit);
    pub const TSC_PER_INSTRUCTION: u32 = offset!(tsc_per_instruction);
    pub const FLAGS: u32 = offset!(near.flags);
    pub const UPPER_IN_USE: u32 = offset!(upper_in_use);
    pub const EXIT_ARGUMENT: u32 = offset!(exit_argument);
    pub const BUDGET: u32 = offset!(budget);
    pub const HOST_RSP: u32 = offset!(host_rsp);
    pub const CORE: u32 = offset!(core);
    pub const MEMORY_SLOW: u32 = offset!(memory_slow);
    pub const SLOW_ADDRESS: u32 = offset!(slow_address);
    pub const SLOW_SITE: u32 = offset!(slow_site);
    pub const SLOW_RESUME: u32 = offset!(slow_resume);
    pub const fn jump_rip(class: Class) -> u32 {
        jumps(class) + offset_of!(JumpEntry, rip) as u32
    }
    pub const fn jump_host(class: Class) -> u32 {
        jumps(class) + offset_of!(JumpEntry, host) as u32
    }
    const fn jumps(class: Class) -> u32 {
        offset!(jumps) + (class as usize * size_of::<JumpCache>()) as u32
    }
    pub const WINDOW_DISTANCE: u32 = offset!(window_distance);
    pub const FAULT_DISTANCE: u32 = offset!(fault_distance);
    pub const WINDOW_PATIENCE: u32 = offset!(window_patience);
    pub const fn runs(rip: u64) -> u32 {
        offset!(profile) + Profile::runs(rip)
    }
    pub const fn taken(rip: u64, branch: usize) -> u32 {
        offset!(profile) + Profile::taken(rip, branch)
    }
    pub const fn window(which: usize) -> u32 {
        offset!(near.windows) + (which * size_of::<StackWindow>()) as u32
    }
    pub const fn spare_page(which: usize) -> u32 {
        offset!(spares) + (which * SPARE_WINDOWS * size_of::<SpareWindow>()) as u32
    }
    pub const fn spare_window(which: usize) -> u32 {
        spare_page(which) + offset_of!(SpareWindow, window) as u32
    }
    pub const fn window_low(class: Class) -> u32 {
        window(window_of(class as usize)) + offset_of!(StackWindow, low) as u32
    }
    pub const fn window_places(class: Class, span: usize) -> u32 {
        window(window_of(class as usize)) + offset_of!(StackWindow, places) as u32 + 8 * span as u32
    }
    pub const fn temporary(index: u32) -> u32 {
        offset!(temporary) + 8 * index
    }

    pub const fn evicted(index: usize) -> u32 {
        offset!(near.evicted) + 8 * index as u32
    }
    pub const fn operand(index: u32) -> u32 {
        offset!(near.operands) + 8 * index
    }
    pub const fn threads_known(register: usize) -> u32 {
        offset!(near.threads_known) + register as u32
    }
    pub const fn thread(piece: threads::Piece) -> u32 {
        offset!(threads) + 8 * (piece.register * threads::PIECES + piece.number) as u32
    }
    pub const fn group(index: usize) -> u32 {
        offset!(near.groups) + 8 * index as u32
    }
    pub const fn ymm(index: u8) -> u32 {
        offset!(ymm) + 32 * index as u32
    }
    pub const fn itlb(class: Class, vpage: u64) -> u32 {
        offset!(itlb) + ((class as usize * ITLB_ENTRIES + vpage as usize % ITLB_ENTRIES) * 4) as u32
    }
    pub const fn tlb_tags(class: Class, write: bool) -> u32 {
        let tags = class as usize * size_of::<Tlb>() + write as usize * size_of::<[u64; TLB_ENTRIES]>();
        offset!(tlb) + tags as u32
    }
    pub const fn tlb_distances(class: Class) -> u32 {
        offset!(tlb) + (class as usize * size_of::<Tlb>() + offset_of!(Tlb, distances)) as u32
    }
}

/// The tag of an empty TLB entry: a page whose addresses look at another entry. Zero where possible, so that a new
/// block of zeroed memory is almost an empty one.
pub const fn empty_tag(index: usize) -> u64 {
    if index == 0 { 1 << 12 } else { 0 }
}

/// Status flags of RFLAGS in the form of [`VcpuBlock::flags`].
pub fn flags_to_slot(rflags: u64) -> u32 {
    ((rflags & 0xD5) << 8) as u32 | ((rflags >> 11) & 1) as u32
}

/// RFLAGS with its status flags taken from the slot.
pub fn flags_from_slot(rflags: u64, slot: u32) -> u64 {
    let status = u64::from(slot >> 8) & 0xD5 | u64::from(slot & 1) << 11;
    rflags & !crate::state::rflags::STATUS | status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_cache_knows_what_was_entered_last() {
        let bytes = vec![0u64; size_of::<JumpCache>() / 8].into_boxed_slice();
        // SAFETY: as long and as aligned, and all-zero bytes are a valid value.
        let mut jumps = unsafe { Box::from_raw(Box::into_raw(bytes).cast::<JumpCache>()) };
        let mut used = InUse::default();
        jumps.seal();
        let nothing = |jumps: &JumpCache| (0..64).all(|rip| jumps.get(rip).is_none() && jumps.has_room(rip));
        assert!(nothing(&jumps), "target 0 neither");
        let covered = (JUMP_ENTRIES * JUMP_CODE) as u64;
        // In an entry each, up to the last; the next is that of the first.
        for rip in [0, 5, 10, covered - 1] {
            jumps.set(rip, rip + 7, &mut used);
        }
        assert_eq!([0, 5, 10, covered - 1].map(|rip| jumps.get(rip)), [0, 5, 10, covered - 1].map(|rip| Some(rip + 7)));
        assert_eq!([1, 6, 4, covered].map(|rip| jumps.get(rip)), [None; 4]);
        jumps.set(covered, 1, &mut used);
        assert_eq!((jumps.get(0), jumps.get(covered), jumps.get(5)), (None, Some(1), Some(12)));
        jumps.clear(&mut used);
        assert!(nothing(&jumps) && jumps.get(covered).is_none());
    }

    #[test]
    fn notes_of_many_entries_cost_little_and_none_is_lost() {
        let mut used = InUse::default();
        for _ in 0..4 {
            (0..InUse::FEW * 3).for_each(|index| used.add(index));
        }
        assert!(used.iter().count() <= InUse::FEW * 6);
        used.sort();
        assert!(used.take().eq(0..InUse::FEW * 3));
        assert_eq!(used.iter().count(), 0);
    }
}
