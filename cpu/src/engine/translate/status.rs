//! Where the guest's status flags are while a block is emitted, and how they get where they are needed.

use super::*;

/// Where the guest's status flags are at a point of the emitted code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) enum Flags {
    Slot,
    Host(Overflow),
    Both,
    /// Nowhere, but `Translator::source` gives them again.
    Source,
}

/// What is known of OF.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) enum Overflow {
    Any,
    Clear,
}

impl Overflow {
    /// Behind an instruction that gives the flags.
    fn behind(ins: &Instruction) -> Overflow {
        if ins.rflags_cleared() & RflagsBits::OF != 0 { Overflow::Clear } else { Overflow::Any }
    }
}

/// A host instruction without operand in guest memory that gives the flags that an earlier one gave, while the guest
/// registers that it reads are what they were.
#[derive(Clone, Copy)]
pub(in crate::engine) struct Source {
    pub(super) instruction: Instruction,
    /// The operand that is in RAX for it, from where it was kept.
    pub(super) loads: Option<u32>,
    /// Takes back what the instruction did, so that it can be done again.
    pub(super) undo: Option<Instruction>,
    /// Guest registers that it reads, as a bit mask.
    pub(super) reads: u32,
    /// What has been added to RSP since.
    pub(super) popped: i32,
}

/// The guest registers, as a bit mask, whose homes the register operands of an instruction are, but for one operand.
pub(super) fn read_homes(out: &Instruction, homes: &Homes, but: Option<u32>) -> Option<u32> {
    let registers = (0..out.op_count()).filter(|i| out.op_kind(*i) == OpKind::Register && but != Some(*i));
    registers.map(|i| gpr_number(out.op_register(i))).try_fold(0, |mask, home| {
        // RAX and RCX are the translator's own.
        let home = home?;
        Some(mask | 1 << homes.iter().position(|place| *place == Some(home))?)
    })
}

impl Translator {
    /// Makes sure that the slot holds the flags, and the host, too, if it did. Uses RAX.
    pub(super) fn save_flags(&mut self) {
        if self.flags == Flags::Source {
            self.repeat();
        }
        if let Flags::Host(overflow) = self.flags {
            self.store_flags(overflow);
            self.scratch.forget(host::RAX);
            self.flags = Flags::Both;
        }
    }

    /// Makes sure that the host's flags are the guest's. Uses RAX.
    pub(super) fn need_flags(&mut self) {
        match self.flags {
            Flags::Source => self.repeat(),
            Flags::Slot => {
                match self.source {
                    Some(_) => self.repeat(),
                    None => {
                        self.a.restore_flags(field::FLAGS);
                        self.scratch.forget(host::RAX);
                    }
                }
                self.flags = Flags::Both;
            }
            Flags::Host(_) | Flags::Both => {}
        }
    }

    /// The host's flags are about to be lost, in a place that may be left only through [`Translator::lookup_range`] or
    /// [`Translator::lookup_constant`].
    pub(super) fn clobber_flags(&mut self) {
        self.flags = match self.flags {
            Flags::Host(_) if self.source.is_some() => Flags::Source,
            Flags::Source => Flags::Source,
            Flags::Host(_) | Flags::Both | Flags::Slot => {
                self.save_flags();
                Flags::Slot
            }
        };
    }

    /// The host's flags are about to be lost; the slot holds them.
    pub(in crate::engine) fn put_flags_away(&mut self) {
        self.save_flags();
        self.flags = Flags::Slot;
    }

    /// Gives the host its flags once more.
    pub(super) fn repeat(&mut self) {
        let source = self.source.expect("flags that are nowhere have a source");
        self.emit_source(&source);
        self.flags = Flags::Host(Overflow::behind(&source.instruction));
    }

    /// The host's flags to the slot. Uses RAX.
    pub(super) fn store_flags(&mut self, overflow: Overflow) {
        match overflow {
            Overflow::Any => self.a.save_flags(field::FLAGS),
            Overflow::Clear => self.a.save_flags_without_overflow(field::FLAGS),
        }
    }

    /// Before an instruction at which the host may fault: the flags are in the host or in the slot.
    pub(super) fn leave_source(&mut self) {
        if self.flags == Flags::Source {
            self.save_flags();
        }
    }

    /// In cold code: puts flags that are nowhere into the slot. Uses RAX.
    pub(super) fn settle(&mut self, source: Option<Source>) {
        if let Some(source) = source {
            self.emit_source(&source);
            self.store_flags(Overflow::behind(&source.instruction));
        }
    }

    fn emit_source(&mut self, source: &Source) {
        let wide = self.mode.is_64bit();
        let moved = source.reads & 1 << gpr::RSP != 0 && source.popped != 0;
        if moved {
            self.a.lea(wide, host::RSP, Some(host::RSP), None, -source.popped);
        }
        if let Some(operand) = source.loads {
            self.a.load_field(host::RAX, field::operand(operand));
            self.scratch.forget(host::RAX);
        }
        for instruction in source.undo.iter().chain([&source.instruction]) {
            self.emit(instruction).expect("what was encoded once can be encoded again");
        }
        if moved {
            self.a.lea(wide, host::RSP, Some(host::RSP), None, source.popped);
        }
    }

    /// RSP is about to change by a constant, and the flags are not.
    pub(super) fn popped(&mut self, by: i32) {
        if let Some(source) = &mut self.source {
            source.popped += by;
        }
    }

    /// The source of the flags reads a register of these, a bit mask.
    pub(super) fn source_reads(&self, registers: u32) -> bool {
        self.source.is_some_and(|source| source.reads & registers != 0)
    }

    /// The instruction that cold code must repeat to have the flags.
    pub(super) fn source_in_need(&self) -> Option<Source> {
        self.source.filter(|_| self.flags == Flags::Source)
    }

    /// Status flags behind the current instruction that someone may look at.
    pub(super) fn live_behind(&self) -> u32 {
        self.needs.get(self.position + 1).map_or(STATUS, |need| need.live)
    }

    /// Before an instruction: it may change what the source of the flags reads.
    pub(super) fn keep_source(&mut self, ins: &Instruction, treatment: Treatment) {
        if self.source.is_none() {
            return;
        }
        let mut written = 0;
        for used in self.info.info(ins).used_registers() {
            if let Some(number) = gpr_number(used.register()).filter(|_| writes(used.access())) {
                written |= 1 << number;
            }
        }
        if moves_stack(ins, treatment) {
            written &= !(1 << gpr::RSP);
        }
        if self.source_reads(written) {
            if self.needs[self.position].live != 0 {
                self.save_flags();
            }
            if self.flags == Flags::Source {
                self.flags = Flags::Slot;
            }
            self.source = None;
        }
    }

    /// Behind an instruction that was emitted as `out`: its flags are in the host, and can perhaps be had again.
    pub(super) fn flags_from(&mut self, ins: &Instruction, out: &Instruction) {
        self.flags = Flags::Host(Overflow::behind(ins));
        self.source = if self.mode.is_direct() { None } else { source(ins, out, &self.home) };
    }
}

/// The instruction adds a constant to RSP by [`Translator::adjust_rsp`], and does not change it otherwise.
pub(super) fn moves_stack(ins: &Instruction, treatment: Treatment) -> bool {
    use Treatment::*;
    match treatment {
        Push | PushFlags | Call | FollowedCall | IndirectCall | Return | FollowedReturn => true,
        Pop => ins.op0_register() != Register::RSP,
        _ => false,
    }
}

/// The memory operand of a renamed instruction is a field of the vCPU block.
fn is_in_block(out: &Instruction) -> bool {
    out.memory_base() == Register::RAX + u32::from(host::BLOCK)
}

/// What gives the flags that `out` gives, the renamed form of `ins`, again behind it.
pub(super) fn source(ins: &Instruction, out: &Instruction, homes: &Homes) -> Option<Source> {
    use Mnemonic::{Add, And, Cmp, Or, Sub, Test, Xor};
    let mut repeated = *out;
    let mut undo = None;
    match ins.mnemonic() {
        Cmp | Test => {}
        // Their results give the same flags again.
        And | Or | Xor if out.op0_kind() == OpKind::Register && matches!(out.op0_register().size(), 4 | 8) => {
            let code = if out.op0_register().size() == 8 { Code::Test_rm64_r64 } else { Code::Test_rm32_r32 };
            repeated = Instruction::with2(code, out.op0_register(), out.op0_register()).ok()?;
        }
        Add | Sub => undo = Some(inverse(out)?),
        _ => return None,
    }
    let mut reads = read_homes(&repeated, homes, None)?;
    for i in 0..repeated.op_count() {
        match repeated.op_kind(i) {
            // A register that lives in the vCPU block.
            OpKind::Memory if ins.op_kind(i) == OpKind::Register || is_in_block(&repeated) => {
                reads |= (0..16).filter(|guest| homes[*guest].is_none()).fold(0, |mask, guest| mask | 1 << guest);
            }
            OpKind::Memory => return None,
            _ => {}
        }
    }
    Some(Source { instruction: repeated, loads: None, undo, reads, popped: 0 })
}

/// What takes back an addition or subtraction of 32 or 64 bits, if its operands are two.
pub(super) fn inverse(out: &Instruction) -> Option<Instruction> {
    use Code::*;
    let code = match out.code() {
        Add_rm32_r32 => Sub_rm32_r32,
        Add_r32_rm32 => Sub_r32_rm32,
        Add_rm64_r64 => Sub_rm64_r64,
        Add_r64_rm64 => Sub_r64_rm64,
        Add_rm32_imm8 => Sub_rm32_imm8,
        Add_rm32_imm32 => Sub_rm32_imm32,
        Add_rm64_imm8 => Sub_rm64_imm8,
        Add_rm64_imm32 => Sub_rm64_imm32,
        Sub_rm32_r32 => Add_rm32_r32,
        Sub_r32_rm32 => Add_r32_rm32,
        Sub_rm64_r64 => Add_rm64_r64,
        Sub_r64_rm64 => Add_r64_rm64,
        Sub_rm32_imm8 => Add_rm32_imm8,
        Sub_rm32_imm32 => Add_rm32_imm32,
        Sub_rm64_imm8 => Add_rm64_imm8,
        Sub_rm64_imm32 => Add_rm64_imm32,
        _ => return None,
    };
    let same = out.op1_kind() == OpKind::Register && out.op0_register() == out.op1_register();
    let mut inverse = *out;
    inverse.set_code(code);
    (!same).then_some(inverse)
}
