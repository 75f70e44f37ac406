//! Code in a segment that has a base or a limit: 16-bit programs, and 32-bit ones that make segments of their own.
//!
//! Translations are keyed by linear address and hold RIPs, which are the same thing everywhere else. Here each
//! instruction is fetched, decoded and executed by the emulation, with nothing remembered.

use super::Stop;
use super::core::Core;
use super::debug::PENDING;
use super::mode::Mode;
use crate::exception::Exception;
use crate::memory::PAGE_SIZE;
use crate::state::{CpuState, rflags, seg};
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

/// No instruction is longer.
const LONGEST: usize = 15;

/// True if RIP is an offset in a code segment that does not span the address space.
pub fn is_segmented(state: &CpuState) -> bool {
    let code = &state.seg[seg::CS];
    !state.is_64bit() && (code.base != 0 || code.limit != u32::MAX)
}

impl Core {
    /// The linear address of the instruction at CS:RIP.
    pub fn linear_rip(&self) -> u64 {
        let state = self.state();
        if state.is_64bit() { state.rip } else { state.seg[seg::CS].base.wrapping_add(state.rip) & 0xFFFF_FFFF }
    }

    /// Executes one instruction; Some if the run stops there.
    pub fn step_segmented(&mut self) -> Option<Stop> {
        let debug = self.debug_active();
        let before = self.now();
        let state = self.state_mut();
        let trap = state.rflags & rflags::TF != 0;
        let resume = state.rflags & rflags::RF != 0;
        state.rflags &= !rflags::RF;
        state.interrupt_shadow = false;
        let held = std::mem::take(&mut state.dr[PENDING]);
        if debug && !resume {
            let hits = self.instruction_breakpoint(held);
            if hits != 0 {
                return self.raise(Exception::Debug { dr6: hits });
            }
        }
        let instruction = match self.fetch_segmented() {
            Ok(instruction) => instruction,
            Err(exception) => return self.raise(exception),
        };
        self.statistics.emulate(instruction.mnemonic());
        let stop = self.emulate(&instruction);
        if stop == Some(Stop::Unfinished) {
            self.state_mut().dr[PENDING] = held;
            return stop;
        }
        let traps = if self.now() > before { self.traps_behind(&instruction, trap, held) } else { 0 };
        self.behind(stop, traps)
    }

    /// The instruction at CS:RIP. Errors: #GP(0) if its bytes reach beyond the segment's limit, #PF.
    fn fetch_segmented(&mut self) -> Result<Instruction, Exception> {
        let mode = Mode::of(self.state());
        let (rip, code) = (self.state().rip, self.state().seg[seg::CS]);
        let within_limit = (u64::from(code.limit) + 1).saturating_sub(rip).min(LONGEST as u64) as usize;
        let mut bytes = [0u8; LONGEST];
        let mut len = 0;
        let instruction = loop {
            if len == within_limit {
                return Err(Exception::GP0);
            }
            // One page at a time: the second is looked at only if the instruction goes on there.
            let linear = code.base.wrapping_add(rip).wrapping_add(len as u64) & 0xFFFF_FFFF;
            let piece = ((PAGE_SIZE - linear % PAGE_SIZE) as usize).min(within_limit - len);
            self.fetch(linear, &mut bytes[len..len + piece], mode)?;
            len += piece;
            let mut decoder = Decoder::with_ip(mode.bitness(), &bytes[..len], rip, DecoderOptions::NONE);
            let instruction = decoder.decode();
            if decoder.last_error() != DecoderError::NoMoreBytes || len == LONGEST {
                break instruction;
            }
        };
        Ok(instruction)
    }

    /// Reads code of one page.
    fn fetch(&mut self, linear: u64, bytes: &mut [u8], mode: Mode) -> Result<(), Exception> {
        let translation = self.walk(linear, false, true, mode.class())?;
        match self.memory.host(translation.gpa, bytes.len() as u64) {
            // SAFETY: the range is mapped RAM; the guest does not run while it is read.
            Some(host) => unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len()) },
            // Nothing there answers an instruction fetch.
            None => bytes.fill(0xFF),
        }
        Ok(())
    }
}
