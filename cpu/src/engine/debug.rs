//! The guest's own debug registers (Intel SDM volume 3, section 18.2). While any breakpoint is enabled every
//! instruction runs alone and carefully, so that each access can be compared.

use super::core::Core;
use crate::state::rflags;
use iced_x86::{Instruction, Mnemonic, Register};

/// Index in `CpuState::dr` of what a load of SS holds back while breakpoints are enabled: the data breakpoints that it
/// has met, in the places of DR6, and [`STACK_SEGMENT_LOADED`]. MOV never reaches it.
pub const PENDING: usize = 4;
/// An instruction breakpoint at the next instruction is not met (as on Intel's processors).
const STACK_SEGMENT_LOADED: u64 = 1 << 16;
/// DR6.BS
const SINGLE_STEP: u64 = 1 << 14;
/// Bits of DR7 that enable a breakpoint.
const ENABLES: u64 = 0xFF;

impl Core {
    /// Some breakpoint is enabled.
    pub fn debug_active(&self) -> bool {
        self.state().dr[7] & ENABLES != 0
    }

    fn breakpoints(&self) -> impl Iterator<Item = (u64, u64, u64, u64)> {
        let dr = self.state().dr;
        (0..4).filter(move |i| dr[7] >> (2 * i) & 3 != 0).map(move |i| {
            let control = dr[7] >> (16 + 4 * i) & 0xF;
            let len = match control >> 2 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            (1 << i, dr[i as usize] & !(len - 1), len, control & 3)
        })
    }

    /// DR6 bits of the instruction breakpoints at RIP, behind an instruction that has left `held`.
    pub fn instruction_breakpoint(&self, held: u64) -> u64 {
        if held & STACK_SEGMENT_LOADED != 0 {
            return 0;
        }
        let rip = self.linear_rip();
        self.breakpoints().filter(|&(_, at, _, kind)| kind == 0 && at == rip).map(|(bit, ..)| bit).sum()
    }

    /// DR6 bits of the traps that follow an instruction which has just retired; `trap` is what TF was before it and
    /// `held` what an instruction before it has left pending.
    pub fn plain_traps(&mut self, trap: bool, held: u64) -> u64 {
        held & 0xF | std::mem::take(&mut self.debug_hits) | if trap { SINGLE_STEP } else { 0 }
    }

    /// The same for an instruction that may have something to do with traps itself.
    pub fn traps_behind(&mut self, instruction: &Instruction, trap: bool, held: u64) -> u64 {
        let after = self.state().rflags & rflags::TF != 0;
        match instruction.mnemonic() {
            // These go by what TF is behind them: SYSCALL may mask it, and SYSRET sets it for what it returns to.
            Mnemonic::Syscall | Mnemonic::Sysret | Mnemonic::Sysretq => self.plain_traps(after, held),
            // Entering a handler discards the step; stepping goes on when the handler returns.
            Mnemonic::Int | Mnemonic::Int3 => self.plain_traps(false, held),
            // It was a #DB itself.
            Mnemonic::Int1 => 0,
            Mnemonic::Into => self.plain_traps(trap && after, held),
            Mnemonic::Mov | Mnemonic::Pop if instruction.op0_register() == Register::SS => {
                // Held back until behind the next instruction. For the step, TF is memory enough.
                let hits = self.plain_traps(false, held);
                let held = if self.debug_active() { hits | STACK_SEGMENT_LOADED } else { 0 };
                self.state_mut().dr[PENDING] = held;
                0
            }
            _ => self.plain_traps(trap, held),
        }
    }

    /// Compares an access with the data breakpoints; what it hits is reported after the instruction.
    pub fn watch(&mut self, linear: u64, len: u64, write: bool) {
        if !self.debug_active() {
            return;
        }
        let hits = self
            .breakpoints()
            .filter(|&(_, at, size, kind)| {
                let wanted = kind == 3 || kind == 1 && write;
                wanted && linear < at.wrapping_add(size) && at < linear.wrapping_add(len)
            })
            .map(|(bit, ..)| bit)
            .sum::<u64>();
        self.debug_hits |= hits;
    }
}
