//! Looking at a run while it goes on: breakpoints, watchpoints, records of executions. None of it is in the guest:
//! icount, state and memory are the same with and without.
//!
//! Instructions: a block ends before an observed address ([`Observed::cuts`]), and a block that begins at one is
//! neither linked to nor entered in the jump cache. So every arrival there comes through the dispatcher.
//!
//! Memory: a page with watched bytes never enters the software TLBs for accesses that could touch them, so that
//! each of these takes the slow path. One that overlaps the bytes is executed alone and carefully, where the
//! engine learns of each of its accesses exactly; the others are served without being cached. Accesses of emulated
//! instructions, of exception delivery and of page walks come through Rust anyway.

use std::sync::Arc;

use super::core::Core;
use super::mmu::Intent;
use crate::Icount;
use crate::memory::{PAGE_MASK, PAGE_SIZE};

/// The address bits of CR3 that name an address space. Bit 12 tells the two halves of a kernel with page-table
/// isolation apart, which share their user pages.
const SPACE_MASK: u64 = 0x000F_FFFF_FFFF_E000;
/// Records of executions after which the run stops to have them taken.
const RECORDS_MAX: usize = 4096;
/// Longest watchpoint, in bytes.
pub const WATCH_BYTES_MAX: u64 = 1 << 20;

/// Which bytes a watchpoint watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A linear address, if `root` is given only while CR3 holds that top-level table.
    Linear {
        /// First byte.
        address: u64,
        /// CR3 of the address space; flags and process-context identifier in it are not looked at.
        root: Option<u64>,
    },
    /// A guest-physical address, through whichever linear address it is reached; device writes count too.
    Physical {
        /// First byte.
        address: u64,
    },
}

/// A range of bytes, and which accesses to it are reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watchpoint {
    /// Where.
    pub place: Place,
    /// How many bytes, 1..=[`WATCH_BYTES_MAX`]; more are cut off.
    pub size: u64,
    /// Report reads.
    pub read: bool,
    /// Report writes.
    pub write: bool,
}

/// What is to be reported. The empty observation costs nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// Linear addresses of instructions: the run stops when one of them is about to be executed.
    pub breakpoints: Vec<u64>,
    /// Linear addresses of instructions: each time that one of them retires is noted. The run stops now and then
    /// to have the notes taken.
    pub executions: Vec<u64>,
    /// Note each instruction that retires, and stop the run behind it.
    pub every_execution: bool,
    /// Bytes: the run stops behind an instruction that accesses them.
    pub watchpoints: Vec<Watchpoint>,
}

/// What made an access to watched bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accessor {
    /// The instruction at RIP, or the delivery of an exception or interrupt before it.
    Processor,
    /// A page walk that set accessed or dirty flags.
    PageWalk,
    /// A device, or whoever else called `Engine::memory_written`.
    Device,
}

/// Something that was to be reported. `icount` counts the instructions that had retired *before*: what the
/// instruction did is to be seen in State(`icount` + 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hit {
    /// The instruction at `rip` is about to be executed.
    Breakpoint {
        /// Instructions retired before.
        icount: Icount,
        /// Its address.
        rip: u64,
    },
    /// The instruction at `rip` was executed.
    Execution {
        /// Instructions retired before.
        icount: Icount,
        /// Its address.
        rip: u64,
    },
    /// Watched bytes were accessed.
    Access {
        /// Instructions retired before.
        icount: Icount,
        /// Address of the instruction.
        rip: u64,
        /// Index into [`Observation::watchpoints`].
        watchpoint: usize,
        /// Linear address of the access, if it had one.
        linear: Option<u64>,
        /// Guest-physical address of the access.
        gpa: u64,
        /// Bytes accessed, from there.
        size: u64,
        /// A write, or a read and a write.
        write: bool,
        /// Who.
        accessor: Accessor,
    },
}

impl Hit {
    /// Instructions retired before.
    pub fn icount(&self) -> Icount {
        match *self {
            Hit::Breakpoint { icount, .. } | Hit::Execution { icount, .. } | Hit::Access { icount, .. } => icount,
        }
    }
}

impl Watchpoint {
    fn size(&self) -> u64 {
        self.size.clamp(1, WATCH_BYTES_MAX)
    }

    /// The watchpoint and an access of `len` bytes have a byte in common; in any address space if `cr3` is None.
    fn overlaps(&self, linear: Option<u64>, gpa: u64, len: u64, cr3: Option<u64>) -> bool {
        let (start, address) = match self.place {
            Place::Linear { address, root } => {
                let Some(linear) = linear else { return false };
                if let (Some(root), Some(cr3)) = (root, cr3)
                    && (root ^ cr3) & SPACE_MASK != 0
                {
                    return false;
                }
                (address, linear)
            }
            Place::Physical { address } => (address, gpa),
        };
        // Distances instead of ends: a range may touch the end of the address space.
        address.wrapping_sub(start) < self.size() || start.wrapping_sub(address) < len
    }
}

/// The observation in force and what it has found.
#[derive(Default)]
pub struct Observed {
    /// Addresses before which blocks end, ascending.
    cuts: Arc<[u64]>,
    breakpoints: Vec<u64>,
    executions: Vec<u64>,
    every_execution: bool,
    watchpoints: Vec<Watchpoint>,
    /// What physical watchpoints held last, to see whether a device changed it.
    values: Vec<Vec<u8>>,
    hits: Vec<Hit>,
    /// The run is to stop.
    stop: bool,
    /// (icount, RIP) of a breakpoint that has been reported: it is passed now.
    passed: Option<(u64, u64)>,
    /// (icount, RIP) of an instruction whose execution is to be noted if it retires.
    entered: Option<(u64, u64)>,
}

impl Observed {
    /// Addresses before which blocks end, ascending.
    pub fn cuts(&self) -> Arc<[u64]> {
        self.cuts.clone()
    }

    /// Every arrival at `rip` must come through the dispatcher.
    #[inline]
    pub fn is_cut(&self, rip: u64) -> bool {
        !self.cuts.is_empty() && self.cuts.binary_search(&rip).is_ok()
    }

    /// The run is to stop before the next instruction.
    #[inline]
    pub fn stops(&self) -> bool {
        self.stop
    }

    /// Something is observed.
    pub fn is_active(&self) -> bool {
        !self.cuts.is_empty() || !self.watchpoints.is_empty() || self.every_execution || self.stop
    }

    /// Another moment is loaded: what belongs to the one before is void.
    pub fn forget_moment(&mut self) {
        self.hits.clear();
        (self.stop, self.passed, self.entered) = (false, None, None);
    }

    fn push(&mut self, hit: Hit) {
        if let Hit::Access { watchpoint, write, .. } = hit {
            // An operand that spans two pages is looked at more than once.
            let same = |other: &Hit| matches!(*other, Hit::Access { watchpoint: w, write: k, .. } if w == watchpoint && k == write);
            if self.hits.iter().any(same) {
                return;
            }
        }
        self.hits.push(hit);
        let execution = matches!(hit, Hit::Execution { .. });
        self.stop |= !execution || self.every_execution || self.hits.len() >= RECORDS_MAX;
    }
}

impl Core {
    /// Replaces the observation.
    pub fn observe(&mut self, observation: &Observation) {
        let sorted = |addresses: &[u64]| {
            let mut sorted = addresses.to_vec();
            sorted.sort_unstable();
            sorted.dedup();
            sorted
        };
        let cuts = sorted(&[&observation.breakpoints[..], &observation.executions[..]].concat());
        let fresh: Vec<u64> = cuts.iter().copied().filter(|cut| !self.observed.is_cut(*cut)).collect();
        let watchpoints_changed = observation.watchpoints != self.observed.watchpoints;
        let passed = self.observed.passed;
        self.observed = Observed {
            cuts: cuts.into(),
            breakpoints: sorted(&observation.breakpoints),
            executions: sorted(&observation.executions),
            every_execution: observation.every_execution,
            watchpoints: observation.watchpoints.clone(),
            passed,
            ..Observed::default()
        };
        self.refresh_values();
        if !fresh.is_empty() {
            self.forget_code_near(&fresh);
        }
        if watchpoints_changed {
            self.flush_tlbs(true);
        }
    }

    /// Forgets blocks that may be in the pages of these addresses: they may lead past them, and others may lead to them.
    fn forget_code_near(&mut self, addresses: &[u64]) {
        let near = |vpage: u64| {
            // Ascending, so that the first address from the page's beginning on tells.
            let first = addresses.partition_point(|address| address >> 12 < vpage);
            addresses.get(first).is_some_and(|address| address >> 12 == vpage)
        };
        for index in 0..self.t.blocks.len() as u32 {
            let block = &self.t.blocks[index];
            let second = block.second.is_some_and(|(vpage, _)| near(vpage));
            if block.valid && (block.spreads || second || near(block.rip >> 12)) {
                self.kill(index);
            }
        }
    }

    /// What has been found since the last call.
    pub fn take_hits(&mut self) -> Vec<Hit> {
        self.observed.stop = false;
        if !self.observed.hits.is_empty() {
            self.refresh_values();
        }
        std::mem::take(&mut self.observed.hits)
    }

    /// Something has been found that is to stop the run.
    pub fn has_hits(&self) -> bool {
        self.observed.stop
    }

    /// The breakpoint at RIP, if there is one, does not stop the run at this icount.
    pub fn pass_breakpoint(&mut self) {
        self.observed.passed = Some((self.now().0, self.state().rip));
    }

    fn refresh_values(&mut self) {
        let read = |watchpoint: &Watchpoint| match watchpoint.place {
            Place::Physical { address } => self.physical_bytes(address, watchpoint.size()),
            Place::Linear { .. } => Vec::new(),
        };
        self.observed.values = self.observed.watchpoints.iter().map(read).collect();
    }

    /// Bytes of RAM; those that are outside it are missing at the end.
    fn physical_bytes(&self, address: u64, len: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len as usize);
        let mut at = address;
        while bytes.len() < len as usize {
            let piece = (PAGE_SIZE - at % PAGE_SIZE).min(len - bytes.len() as u64);
            let Some(host) = self.memory.host(at, piece) else { break };
            // SAFETY: `host` has checked the range; the guest does not run while it is read.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(host, piece as usize) });
            at = at.wrapping_add(piece);
        }
        bytes
    }

    // Hooks of the dispatcher ----------------------------------------------------------------------------------

    /// The instruction at RIP is to be executed alone, because its execution is recorded.
    #[inline]
    pub fn records_execution(&self) -> bool {
        let observed = &self.observed;
        observed.every_execution
            || !observed.executions.is_empty() && observed.executions.binary_search(&self.state().rip).is_ok()
    }

    /// Somebody wants to know which code is entered.
    #[inline]
    pub fn observes_entries(&self) -> bool {
        !self.observed.cuts.is_empty() || self.observed.every_execution
    }

    /// The code at RIP has been found and is about to be entered; true if the run stops instead.
    #[inline]
    pub fn observe_entry(&mut self) -> bool {
        if !self.observes_entries() {
            return false;
        }
        let (now, rip) = (self.now().0, self.state().rip);
        if self.observed.breakpoints.binary_search(&rip).is_ok() && self.observed.passed != Some((now, rip)) {
            self.observed.passed = Some((now, rip));
            self.observed.push(Hit::Breakpoint { icount: Icount(now), rip });
            return true;
        }
        if self.records_execution() {
            self.observed.entered = Some((now, rip));
        }
        false
    }

    /// Between two instructions: notes the execution of the one before, if it has retired.
    #[inline]
    pub fn observe_retirement(&mut self) {
        if let Some((before, rip)) = self.observed.entered.take()
            && self.now().0 > before
        {
            self.observed.push(Hit::Execution { icount: Icount(before), rip });
        }
    }

    /// A careful instruction was given up: it has accessed nothing.
    pub fn observe_abort(&mut self) {
        let made = |hit: &Hit| !matches!(hit, Hit::Access { accessor: Accessor::Processor, .. });
        self.observed.hits.retain(made);
        self.observed.stop = !self.observed.hits.is_empty();
    }

    // Hooks of the MMU -----------------------------------------------------------------------------------------

    /// An access of `len` bytes at `linear`, which is `gpa`, is about to happen. True if the instruction must be
    /// executed alone for it: if `running`, the access is one of translated code that goes on behind it.
    #[inline]
    pub fn observe_access(&mut self, linear: u64, gpa: u64, len: u64, intent: Intent, running: bool) -> bool {
        if self.observed.watchpoints.is_empty() {
            return false;
        }
        let cr3 = Some(self.state().cr3);
        for index in 0..self.observed.watchpoints.len() {
            let watchpoint = &self.observed.watchpoints[index];
            let wanted = watchpoint.read && intent.read || watchpoint.write && intent.write;
            if !wanted || !watchpoint.overlaps(Some(linear), gpa, len, cr3) {
                continue;
            }
            if running {
                return true;
            }
            self.observed.push(Hit::Access {
                icount: self.now(),
                rip: self.state().rip,
                watchpoint: index,
                linear: Some(linear),
                gpa,
                size: len,
                write: intent.write,
                accessor: Accessor::Processor,
            });
        }
        false
    }

    /// Watched bytes lie in a range that several accesses share.
    #[inline]
    pub fn observes_range(&self, linear: u64, gpa: u64, len: u64) -> bool {
        let watchpoints = &self.observed.watchpoints;
        !watchpoints.is_empty() && watchpoints.iter().any(|w| w.overlaps(Some(linear), gpa, len, None))
    }

    /// The translation of the page at `linear` to `gpa` must not be cached for reading (or, if `write`, for
    /// writing, which instructions that read and write use too).
    #[inline]
    pub fn observes_page(&self, linear: u64, gpa: u64, write: bool) -> bool {
        let (linear, gpa) = (linear & !PAGE_MASK, gpa & !PAGE_MASK);
        self.observed.watchpoints.iter().any(|w| (write || w.read) && w.overlaps(Some(linear), gpa, PAGE_SIZE, None))
    }

    /// A page walk has set flags in the entry at `gpa`.
    pub fn observe_walk(&mut self, gpa: u64) {
        let cr3 = Some(self.state().cr3);
        for index in 0..self.observed.watchpoints.len() {
            let watchpoint = &self.observed.watchpoints[index];
            if watchpoint.write && watchpoint.overlaps(None, gpa, 8, cr3) {
                self.observed.push(Hit::Access {
                    icount: self.now(),
                    rip: self.state().rip,
                    watchpoint: index,
                    linear: None,
                    gpa,
                    size: 8,
                    write: true,
                    accessor: Accessor::PageWalk,
                });
            }
        }
    }

    /// Something else than the vCPU has written somewhere in `len` bytes at `gpa`.
    pub fn observe_device(&mut self, gpa: u64, len: u64) {
        for index in 0..self.observed.watchpoints.len() {
            let watchpoint = self.observed.watchpoints[index];
            let Place::Physical { address } = watchpoint.place else { continue };
            if !watchpoint.write || !watchpoint.overlaps(None, gpa, len, None) {
                continue;
            }
            let now = self.physical_bytes(address, watchpoint.size());
            let before = std::mem::replace(&mut self.observed.values[index], now);
            let changed = before.iter().zip(&self.observed.values[index]).position(|(a, b)| a != b);
            if let Some(offset) = changed {
                self.observed.push(Hit::Access {
                    icount: self.now(),
                    rip: self.state().rip,
                    watchpoint: index,
                    linear: None,
                    gpa: address + offset as u64,
                    size: 1,
                    write: true,
                    accessor: Accessor::Device,
                });
            }
        }
    }
}
