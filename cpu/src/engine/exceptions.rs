//! Exceptions: what a host fault stands for, what comes first, delivering them; and interrupts.

use super::Stop;
use super::assembler::host;
use super::classify::{self, Treatment};
use super::core::Core;
use super::fpu;
use super::mode::Mode;
use super::residents::return_registers;
use super::translate::SiteKind;
use crate::bus::Bus;
use crate::exception::Exception;
use crate::memory::PAGE_SIZE;
use crate::paging::is_canonical;
use crate::state::{CpuState, control, rflags, seg};
use crate::system::availability::Unit;
use crate::system::{self, availability};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

impl Core {
    /// The exception that a host signal in translated code stands for; RIP and registers are the instruction's.
    pub fn host_fault(&mut self) -> Exception {
        // What the instruction would have stored is not to be stored with the next one.
        self.commit = None;
        // SAFETY: translated code is not running.
        let (vector, rip, flags, address) = unsafe {
            let b = &*self.block;
            (b.fault_vector, b.fault_rip, b.fault_flags, b.fault_address)
        };
        let faults = &self.t.faults;
        let found = faults.binary_search_by_key(&self.t.offset(rip), |f| f.0);
        let Ok(at) = found else {
            panic!("exception {vector} at {rip:#x} (address {address:#x}) in translated code without a fault site");
        };
        let index = faults[at as u32].1;
        let site = self.t.sites[index];
        let SiteKind::Fault { flags_in_host, borrowed, residents } = site.kind else { unreachable!("a fault site") };
        if flags_in_host {
            let state = self.state_mut();
            state.rflags = state.rflags & !rflags::STATUS | flags & rflags::STATUS;
        }
        // SAFETY: translated code is not running.
        let (temporary, evicted, distance) = unsafe {
            let b = &*self.block;
            (b.temporary, b.near.evicted, b.fault_distance)
        };
        let mut budget = self.budget();
        let elsewhere = |register, evicted: u64| match register {
            host::BUDGET => std::mem::replace(&mut budget, evicted as i64) as u64,
            _ => distance,
        };
        let gpr = &mut self.state_mut().gpr;
        return_registers(gpr, (borrowed, &temporary), (residents, &evicted), elsewhere);
        self.set_budget(budget);
        self.rewind(index);
        match vector {
            0 => Exception::DivideError,
            6 => Exception::InvalidOpcode,
            13 => Exception::GP0,
            16 => Exception::FloatingPoint,
            19 if self.state().cr4 & control::CR4_OSXMMEXCPT == 0 => Exception::InvalidOpcode,
            19 => Exception::Simd,
            _ => panic!("exception {vector} at {rip:#x}, address {address:#x}, in translated code"),
        }
    }

    /// The memory operand is refused for its alignment alone.
    fn is_misaligned(&self, instruction: &Instruction) -> bool {
        let state = self.state();
        let base = match instruction.memory_segment() {
            Register::FS => state.seg[seg::FS].base,
            Register::GS => state.seg[seg::GS].base,
            _ => 0,
        };
        let linear = base.wrapping_add(system::effective_offset(state, instruction));
        classify::must_be_aligned(instruction) && linear % instruction.memory_size().size() as u64 != 0
    }

    /// What a failed memory access of the instruction at RIP raises first: pending x87 errors come before the
    /// operand, its address before its alignment, and that before its page.
    pub fn first_exception(&mut self, exception: Exception) -> Exception {
        if !matches!(exception, Exception::PageFault { .. } | Exception::GP0 | Exception::AlignmentCheck) {
            return exception;
        }
        let Some(instruction) = self.instruction_at_rip() else { return exception };
        let waits = !matches!(instruction.mnemonic(), Mnemonic::Fnstcw | Mnemonic::Fnstsw);
        if availability::unit(&instruction) == Unit::X87 && waits && fpu::error_pending() {
            return Exception::FloatingPoint;
        }
        if exception == Exception::AlignmentCheck {
            return exception;
        }
        let operand = (0..instruction.op_count()).find(|i| instruction.op_kind(*i) == OpKind::Memory);
        if instruction.mnemonic() == Mnemonic::Pop && operand.is_some() {
            return self.first_of_pop(exception, &instruction);
        }
        let bit_string = classify::treatment(&instruction, Mode::of(self.state())) == Treatment::BitString;
        let address = |operand| match bit_string {
            true => system::bit_string_address(self.state(), &instruction),
            false => system::effective_address(self.state(), &instruction, operand),
        };
        match operand.map(address) {
            Some(Err(_)) if self.is_misaligned(&instruction) => Exception::GP0,
            Some(Err(address)) => address,
            Some(Ok(_)) => {
                if self.is_misaligned(&instruction) {
                    return Exception::GP0;
                }
                // Its own operand has an address: then it was the stack that had none.
                if exception == Exception::GP0 { Exception::StackFault { error: 0 } } else { exception }
            }
            None if exception == Exception::GP0 && instruction.is_stack_instruction() => {
                Exception::StackFault { error: 0 }
            }
            None => exception,
        }
    }

    /// POP to memory reads the stack before it computes an address, from the new RSP.
    fn first_of_pop(&self, exception: Exception, instruction: &Instruction) -> Exception {
        let state = self.state();
        let bytes = instruction.stack_pointer_increment() as u64;
        let wide = state.is_64bit();
        let rsp = if wide { state.gpr[4] } else { state.gpr[4] & 0xFFFF_FFFF };
        if wide && !(is_canonical(rsp) && is_canonical(rsp.wrapping_add(bytes - 1))) {
            return Exception::StackFault { error: 0 };
        }
        if let Exception::PageFault { address, .. } = exception
            && address.wrapping_sub(rsp) < bytes
        {
            return exception;
        }
        let mut popped = state.clone();
        popped.gpr[4] = rsp.wrapping_add(bytes);
        system::effective_address(&popped, instruction, 0).err().unwrap_or(exception)
    }

    /// The instruction at RIP, decoded again; None if it cannot be read any more.
    pub fn instruction_at_rip(&mut self) -> Option<Instruction> {
        let mode = Mode::of(self.state());
        let (rip, class) = (self.state().rip, mode.class());
        let mut bytes = [0u8; 15];
        let in_page = (PAGE_SIZE - rip % PAGE_SIZE).min(15) as usize;
        self.read_linear(rip, &mut bytes[..in_page], class).ok()?;
        let mut len = in_page;
        if in_page < 15 && self.read_linear(rip.wrapping_add(in_page as u64), &mut bytes[in_page..], class).is_ok() {
            len = 15;
        }
        let instruction = Decoder::with_ip(mode.bitness(), &bytes[..len], rip, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// Delivers an exception; Some if the run stops there.
    pub fn raise(&mut self, exception: Exception) -> Option<Stop> {
        self.statistics.exceptions += 1;
        self.state_mut().interrupt_shadow = false;
        let state: *mut CpuState = self.state_mut();
        // SAFETY: the state lives in the vCPU block, which the delivery reaches through this reference alone.
        let result = system::deliver_exception(unsafe { &mut *state }, exception, self);
        // What the delivery's own accesses hit is nobody's: it must not wait for whichever instruction is next.
        self.debug_hits = 0;
        if result.is_err() {
            return Some(Stop::TripleFault);
        }
        self.deliveries.note(self.now());
        // The instruction that raised it, or the delivery itself, may have used the bus.
        self.bus().attention().then_some(Stop::Attention)
    }

    pub fn can_nmi(&self) -> bool {
        let state = self.state();
        !state.nmi_blocked && !state.interrupt_shadow
    }

    /// Delivers an external interrupt between two instructions; without a vector, an NMI.
    pub fn interrupt(&mut self, vector: Option<u8>, bus: &mut dyn Bus) -> Result<(), Stop> {
        let accepted = if vector.is_some() { self.can_interrupt() } else { self.can_nmi() };
        assert!(accepted, "interrupts are delivered when the guest accepts them");
        let bus: *mut (dyn Bus + '_) = bus;
        // SAFETY: only the lifetime is forgotten; cleared below.
        self.bus = Some(unsafe { std::mem::transmute::<*mut (dyn Bus + '_), *mut (dyn Bus + 'static)>(bus) });
        let state: *mut CpuState = self.state_mut();
        // SAFETY: as in `raise`.
        let state = unsafe { &mut *state };
        state.halted = false;
        *self.statistics.interrupts.entry(vector.unwrap_or(2)).or_default() += 1;
        let result = match vector {
            Some(vector) => system::deliver_interrupt(state, vector, self),
            None => system::deliver_nmi(state, self),
        };
        self.debug_hits = 0;
        self.bus = None;
        result.map_err(|_| Stop::TripleFault)
    }
}
