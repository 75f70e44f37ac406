//! Flags that fade: they leave the host before others take their place, and between the two only cold code looks at them.
//! Operands that would be gone by then are kept, so that cold code can have the flags again: a store or two, where
//! saving flags takes three instructions.

use super::status::{inverse, moves_stack, read_homes};
use super::*;

/// Which of an instruction's two operands are kept.
pub(super) type Kept = [bool; 2];

impl Translator {
    /// Says whether the flags of instruction `i` fade, and which of the registers that it reads are gone by then.
    pub(super) fn fade(
        &mut self,
        list: &[(Instruction, Treatment)],
        i: usize,
        crosses: impl Fn(usize) -> bool,
    ) -> Option<u32> {
        let giver = &list[i].0;
        if list[i].1 != Treatment::Plain || !gives_by_operands(giver) {
            return None;
        }
        let registers = (0..2).filter(|operand| giver.op_kind(*operand) == OpKind::Register);
        let read = registers
            .fold(0u32, |mask, operand| gpr_number(giver.op_register(operand)).map_or(mask, |guest| mask | 1 << guest));
        let (mut lost, mut gone) = (false, 0);
        for (at, (ins, treatment)) in list.iter().enumerate().skip(i + 1) {
            lost |= crosses(at) || self.plan.clobbers(at, ins, *treatment);
            let needed = self.needs[at].in_host || classify::may_fault(ins);
            if treatment.ends_block() && at + 1 == list.len() || needed && lost {
                return None;
            }
            if self.needs[at].live == 0 || ins.rflags_modified() & STATUS != 0 {
                return (lost && !needed).then_some(gone);
            }
            for used in self.info.info(ins).used_registers().iter().filter(|used| writes(used.access())) {
                gone |= gpr_number(used.register()).map_or(0, |guest| read & 1 << guest);
            }
            if moves_stack(ins, *treatment) {
                gone &= !(1 << gpr::RSP);
            }
        }
        None
    }

    /// Keeps what will be gone of the operands of an instruction whose flags fade, with its memory operand at `at`. One in
    /// memory is RAX from then on.
    pub(super) fn keep_operands(
        &mut self,
        ins: &Instruction,
        out: &mut Instruction,
        at: Operand,
        memory: &mut Option<(u32, OpAccess)>,
    ) -> Option<Kept> {
        let gone = self.fades?;
        let mut kept = [false; 2];
        let mut homes = [host::RAX; 2];
        for (i, operand) in (0..).zip(&mut kept) {
            match ins.op_kind(i) {
                OpKind::Register => {
                    let guest = gpr_number(ins.op_register(i))?;
                    homes[i as usize] = self.home[guest as usize]?;
                    *operand = gone & 1 << guest != 0 || is_shift(ins) && i == 0;
                }
                OpKind::Memory => *operand = true,
                _ => {}
            }
        }
        // Without that, their result gives the same flags.
        let needs_none =
            kept == [false; 2] || matches!(ins.mnemonic(), Mnemonic::And | Mnemonic::Or | Mnemonic::Xor) && !kept[0];
        if needs_none || self.mends_flags || again(out, kept).is_none() {
            return None;
        }
        if let Some((operand, _)) = memory.take() {
            let size = ins.memory_size().size();
            match size {
                1 => {
                    let mut load = Instruction::with2(Code::Movzx_r32_rm8, Register::EAX, Register::AL).ok()?;
                    load.set_op1_kind(OpKind::Memory);
                    set_memory(&mut load, at);
                    self.emit(&load).expect("a load has an encoding");
                }
                _ => self.a.load(size, host::RAX, at),
            }
            self.scratch.forget(host::RAX);
            out.set_op_kind(operand, OpKind::Register);
            out.set_op_register(operand, of_size(size));
        }
        for i in (0..2).filter(|i| kept[*i as usize]) {
            self.a.store_field(homes[i as usize], field::operand(i));
        }
        Some(kept)
    }
}

impl Source {
    /// What gives the flags of `out`, a renamed instruction, with the operands that were kept.
    pub(super) fn with_kept(out: &Instruction, kept: Kept, homes: &Homes) -> Option<Source> {
        let (instruction, loads) = again(out, kept)?;
        let undo = if gives_result(out) && !kept[0] { Some(inverse(&instruction)?) } else { None };
        let reads = read_homes(&instruction, homes, loads)?;
        Some(Source { instruction, loads, undo, reads, popped: 0 })
    }
}

/// The instruction with operands from where they were kept: one may be there, another has to be in RAX. Says which.
fn again(out: &Instruction, kept: Kept) -> Option<(Instruction, Option<u32>)> {
    let rm = if is_shift(out) { 0 } else { rm_operand(out.code())? };
    let (mut instruction, mut loads) = (*out, None);
    for i in (0..2).filter(|i| kept[*i as usize]) {
        if i == rm && (i != 0 || !gives_result(out)) {
            instruction.set_op_kind(i, OpKind::Memory);
            set_memory(&mut instruction, Assembler::field(field::operand(i)));
        } else if loads.is_none() && instruction.op_kind(i) == OpKind::Register {
            instruction.set_op_register(i, sized(instruction.op_register(i), host::RAX));
            loads = Some(i);
        } else {
            return None;
        }
    }
    Some((instruction, loads))
}

/// The instruction gives flags that could be had again from its two operands.
fn gives_by_operands(ins: &Instruction) -> bool {
    use Mnemonic::*;
    let to_register = ins.op0_kind() == OpKind::Register;
    match ins.mnemonic() {
        Cmp | Test => ins.op_count() == 2,
        Add | Sub | And | Or | Xor => ins.op_count() == 2 && to_register,
        _ => is_shift(ins) && to_register && matches!(ins.op0_register().size(), 4 | 8) && flags::overwritten(ins) != 0,
    }
}

/// A shift by a constant.
fn is_shift(ins: &Instruction) -> bool {
    use Mnemonic::{Sal, Sar, Shl, Shr};
    matches!(ins.mnemonic(), Shl | Sal | Shr | Sar) && ins.op1_kind() == OpKind::Immediate8
}

/// The first operand is written.
fn gives_result(ins: &Instruction) -> bool {
    !matches!(ins.mnemonic(), Mnemonic::Cmp | Mnemonic::Test)
}

/// The operand in the r/m position.
fn rm_operand(code: Code) -> Option<u32> {
    use Code::*;
    match code {
        Cmp_rm8_imm8 | Cmp_rm8_r8 | Test_rm8_imm8 | Test_rm8_r8 => Some(0),
        Cmp_r8_rm8 => Some(1),
        _ => homeless::form(code).map(|form| form.rm),
    }
}

/// RAX, as long as an operand in memory.
fn of_size(size: usize) -> Register {
    match size {
        1 => Register::AL,
        4 => Register::EAX,
        _ => Register::RAX,
    }
}
