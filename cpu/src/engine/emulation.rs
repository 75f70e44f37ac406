//! Instructions that the emulation executes, and what it sees of the engine.

use super::Stop;
use super::block::Class;
use super::classify;
use super::core::Core;
use super::fpu;
use crate::Icount;
use crate::bus::Bus;
use crate::exception::Exception;
use crate::model::ModelFeatures;
use crate::state::CpuState;
use crate::system::availability::{self, Unit};
use crate::system::{self, ExecError, Flush, Outcome, Privilege, System};
use iced_x86::{Instruction, Mnemonic};

/// More bytes than this raise #GP(0), whatever they say.
const LONGEST_INSTRUCTION: usize = 15;

impl Core {
    /// Executes one instruction in Rust; Some if the run stops after it.
    pub fn emulate(&mut self, instruction: &Instruction) -> Option<Stop> {
        match self.permitted(instruction) {
            Ok(()) => {}
            Err(exception) => return self.raise(exception),
        }
        let touches_fpu = touches_fpu(instruction);
        if touches_fpu {
            self.store_fpu();
        }
        let nmi_blocked = self.state().nmi_blocked;
        let state: *mut CpuState = self.state_mut();
        self.unfinished = None;
        // SAFETY: as in `raise` (exceptions.rs): nobody else refers to the state meanwhile.
        let result = system::execute(unsafe { &mut *state }, instruction, self);
        if touches_fpu {
            self.load_fpu();
        }
        let stop = match result {
            Ok(Outcome::Next) => {
                let budget = self.budget() - 1;
                self.set_budget(budget);
                None
            }
            Ok(Outcome::Halt) => {
                let budget = self.budget() - 1;
                self.set_budget(budget);
                self.state_mut().halted = true;
                Some(Stop::Halted)
            }
            Ok(Outcome::Unfinished) => {
                self.unfinished = Some(*instruction);
                Some(Stop::Unfinished)
            }
            Err(ExecError::Exception(exception)) => self.raise(exception),
            Err(ExecError::Unsupported(what)) => match self.execute_natively(instruction) {
                Some(Ok(())) => {
                    self.state_mut().interrupt_shadow = false;
                    let budget = self.budget() - 1;
                    self.set_budget(budget);
                    None
                }
                Some(Err(exception)) => self.raise(exception),
                None => Some(self.report_unsupported(what, instruction)),
            },
        };
        // Behind IRET an NMI may have been waiting.
        let unblocked = nmi_blocked && !self.state().nmi_blocked;
        if stop.is_none() && (unblocked || self.bus().attention()) {
            return Some(Stop::Attention);
        }
        stop
    }

    fn report_unsupported(&mut self, what: &str, instruction: &Instruction) -> Stop {
        let mut bytes = [0u8; 15];
        let len = instruction.len();
        let (rip, class) = (self.linear_rip(), self.current_class());
        let read = self.read_linear(rip, &mut bytes[..len], class).is_ok();
        self.unsupported(what, if read { &bytes[..len] } else { &[] })
    }

    /// The checks that do not depend on the operands: is the instruction in the model, is its unit switched on.
    fn permitted(&self, instruction: &Instruction) -> Result<(), Exception> {
        if instruction.is_invalid() && instruction.len() >= LONGEST_INSTRUCTION {
            return Err(Exception::GP0);
        }
        let state = self.state();
        if !state.is_64bit()
            && classify::writes_code_segment(instruction)
            && !classify::looks_at_code_segment_itself(instruction)
        {
            use Mnemonic::{Fnsave, Fnstcw, Fnstenv, Fnstsw};
            let waits = availability::unit(instruction) == Unit::X87
                && !matches!(instruction.mnemonic(), Fnsave | Fnstcw | Fnstenv | Fnstsw);
            return Err(if waits && fpu::error_pending() { Exception::FloatingPoint } else { Exception::GP0 });
        }
        availability::refused(state, instruction).map_or(Ok(()), Err)
    }

    fn class_for(&self, privilege: Privilege) -> Class {
        match privilege {
            Privilege::Current => self.current_class(),
            Privilege::Supervisor => Class::Kernel,
        }
    }

    /// Notes that the guest may write to the page from now on, and keeps its past first. Later writes need no notes,
    /// until the pages are taken.
    #[inline]
    pub fn mark_dirty(&mut self, page: u64) {
        if self.t.pages.mark_dirty(page) {
            self.memory.keep(page);
        }
    }

    /// Pages that may have been written since the last call; later writes are seen again.
    pub fn take_dirty(&mut self) -> Vec<u64> {
        let dirty = self.t.pages.take_dirty();
        self.direct_forget_marks();
        self.flush_writes();
        dirty
    }

    /// How many pages [`Core::take_dirty`] would give.
    pub fn dirty_count(&self) -> usize {
        self.t.pages.dirty_count()
    }
}

impl System for Core {
    fn read(
        &mut self,
        _state: &mut CpuState,
        linear: u64,
        data: &mut [u8],
        privilege: Privilege,
    ) -> Result<(), Exception> {
        let class = self.class_for(privilege);
        self.read_linear(linear, data, class)
    }

    fn write(
        &mut self,
        _state: &mut CpuState,
        linear: u64,
        data: &[u8],
        privilege: Privilege,
    ) -> Result<(), Exception> {
        let class = self.class_for(privilege);
        self.write_linear(linear, data, class)
    }

    fn page_pointer(
        &mut self,
        _state: &mut CpuState,
        linear: u64,
        len: usize,
        write: bool,
        privilege: Privilege,
    ) -> Result<Option<*mut u8>, Exception> {
        let class = self.class_for(privilege);
        self.bulk(linear, len, write, class)
    }

    fn flush(&mut self, what: Flush) {
        match what {
            Flush::All => self.flush_tlbs(true),
            Flush::AddressSpace { .. } => self.switch_address_space(),
            Flush::NonGlobal | Flush::Pcid(_) | Flush::PcidPage(..) => {
                self.flush_tlbs(false);
            }
            Flush::Page(linear) => self.flush_page(linear),
        }
    }

    fn bus(&mut self) -> &mut dyn Bus {
        Core::bus(self)
    }

    fn now(&self) -> Icount {
        Core::now(self)
    }

    fn features(&self) -> &ModelFeatures {
        &self.features
    }

    fn patience(&self) -> u32 {
        self.config.patience.max(1)
    }
}

/// The emulation of this instruction reads or writes `CpuState::fpu`.
fn touches_fpu(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    availability::unit(instruction) != Unit::Integer
        || matches!(
            instruction.mnemonic(),
            Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Xsave | Xsave64 | Xrstor | Xrstor64 | Ldmxcsr | Vldmxcsr | Xsetbv
        )
}
