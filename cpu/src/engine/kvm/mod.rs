//! The kvm engine: long stretches of translated user-mode code in a virtual machine, where the processor translates the
//! guest's addresses and the software MMU is not needed.
//!
//! `policy` decides when to go there, `visit` goes in and out, `emit` is what the translator does otherwise for such code,
//! `blocks` which code that is, `faults` and `tables` are the VM's page tables, `vm` is the VM itself; what the rest of the
//! engine has to tell is in this file. What runs in the VM is counted like all translated code, so nothing that happens
//! here can change a state or a hash. Everything but plain user-mode code comes back and goes on in the soft engine, with
//! the state that lies before the instruction that could not go on.

mod blocks;
mod emit;
mod faults;
mod measure;
mod policy;
mod tables;
mod visit;
mod vm;

pub use emit::emit_exit;
pub use measure::{KvmCosts, available, measure};
pub use policy::Policy;
use policy::thread_ns;
pub use vm::KvmError;

use super::block::{Class, ITLB_ENTRIES, InUse, VcpuBlock};
use super::core::Core;
use super::mode::Mode;
use crate::memory::PAGE_SIZE;
use crate::paging::is_canonical;
use crate::state::{gpr, rflags};
use tables::Arena;
use vm::Vm;

/// From the page that is the way out of the VM to the code behind it.
pub const EXIT_DISTANCE: i32 = 4096;
/// The address bits of CR3.
const ROOT_MASK: u64 = 0x000F_FFFF_FFFF_F000;
/// Most instructions of a block: a budget is never overdrawn by more.
const OVERDRAFT: i64 = super::translate::MAX_INSTRUCTIONS as i64;

/// The engine's part of a VM. Dropped in this order: the VM goes before the memory that it uses.
pub struct Direct {
    vm: Vm,
    tables: Arena,
    /// The mode that the entries of its instruction TLB stand for, and which of them are in use.
    mode: Mode,
    pages_used: Vec<u16>,
    jumps_used: InUse,
    /// All pages that the VM can write are marked as written.
    marked: bool,
}

impl Direct {
    fn new(core: &Core) -> Result<Direct, KvmError> {
        let code = (core.t.code_start(), core.t.code_end());
        let tables = Arena::new(code.1 - code.0, (core.memory.end() / PAGE_SIZE) as usize)?;
        let vm = Vm::new(&core.memory, &tables, code, core.config.kvm_fails)?;
        let mut direct =
            Direct { vm, tables, mode: Mode(0), pages_used: Vec::new(), jumps_used: InUse::default(), marked: false };
        direct.forget_jumps();
        Ok(direct)
    }

    fn block(&mut self) -> &mut VcpuBlock {
        // SAFETY: zeroed memory is a valid block, it lives as long as the arena, and the VM does not run while the
        // reference lives.
        unsafe { &mut *self.tables.block() }
    }

    fn forget_jumps(&mut self) {
        // SAFETY: as above; the list is no part of the block.
        unsafe { (*self.tables.block()).jumps[Class::User as usize].clear(&mut self.jumps_used) };
    }

    fn forget_pages(&mut self) {
        for slot in std::mem::take(&mut self.pages_used) {
            self.block().itlb[Class::User as usize][slot as usize] = 0;
        }
    }
}

impl Core {
    // What the rest of the engine tells ------------------------------------------------------------------------

    /// All address translations are void, or those of this address space that are not global.
    pub fn direct_flush(&mut self, all: bool) {
        if let Some(direct) = &mut self.direct {
            direct.forget_pages();
            if all {
                direct.tables.forget_all();
            }
        }
    }

    /// The translation of one linear page is void, in whatever address space.
    pub fn direct_flush_page(&mut self, linear: u64) {
        if let Some(direct) = &mut self.direct {
            direct.tables.forget_page(linear);
            direct.block().itlb[Class::User as usize][(linear >> 12) as usize % ITLB_ENTRIES] = 0;
        }
    }

    /// Writes to the page of RAM are watched from now on.
    pub fn direct_watch(&mut self, page: u64) {
        if let Some(direct) = &mut self.direct {
            direct.tables.protect(page as u32);
        }
    }

    /// Nothing of this address space is worth keeping.
    fn direct_forget_space(&mut self, space: u64) {
        if let Some(direct) = &mut self.direct {
            direct.tables.forget_space(space);
        }
    }

    /// All code is forgotten.
    pub fn direct_clear_code(&mut self) {
        if let Some(direct) = &mut self.direct {
            direct.forget_pages();
            direct.forget_jumps();
        }
    }

    /// No page is marked as written any more.
    pub fn direct_forget_marks(&mut self) {
        if let Some(direct) = &mut self.direct {
            direct.marked = false;
        }
    }

    /// Marks the pages that code in the VM can write, before it runs: it may write them all.
    fn direct_mark_dirty(&mut self) {
        let direct = self.direct();
        if std::mem::replace(&mut direct.marked, true) {
            return;
        }
        let writable = direct.tables.writable();
        for page in &writable {
            self.mark_dirty(*page);
        }
        self.policy.marked(writable.len() as u64);
    }

    /// The soft engine may write to the page, or read it, at this linear address.
    pub fn direct_fill(&mut self, linear: u64, page: u64, write: bool) {
        let space = self.state().cr3 & ROOT_MASK;
        if let Some(direct) = &mut self.direct
            && direct.tables.fill(space, linear & !0xFFF, page as u32, write)
            && write
        {
            self.mark_dirty(page);
        }
    }

    // Whether --------------------------------------------------------------------------------------------------

    /// The state at hand can go on in the VM, and should.
    pub fn direct_wanted(&mut self) -> bool {
        if self.direct_failed || !self.policy_wants() {
            return false;
        }
        let state = self.state();
        let fits = state.cpl == 3
            && state.is_64bit()
            && is_canonical(state.gpr[gpr::RSP])
            && state.rip >> 47 == 0
            && state.rflags & (rflags::TF | rflags::AC) == 0;
        // Blocks that the budget does not cover are cut short by the soft engine.
        fits && self.budget() >= OVERDRAFT && !self.observed.is_active()
    }

    fn direct_ready(&mut self) -> bool {
        if self.direct.is_none() {
            let start = thread_ns();
            match Direct::new(self) {
                Ok(direct) => self.direct = Some(Box::new(direct)),
                Err(error) => self.direct_fails(error),
            }
            self.policy.excuse(thread_ns() - start);
        }
        self.direct.is_some()
    }

    /// From now on all code runs in the soft engine.
    fn direct_fails(&mut self, error: KvmError) {
        self.direct_failed = true;
        if let Some(failure) = &self.config.kvm_failure {
            // The first one is told.
            let _ = failure.set(error);
        }
    }

    pub(super) fn direct(&mut self) -> &mut Direct {
        self.direct.as_mut().expect("the VM is there: `direct_ready`")
    }
}
