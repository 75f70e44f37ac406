//! Draws short programs: straight lines, forward branches, counted loops, calls, jumps through registers and memory.
//!
//! An instruction's `ip` is only a label until the block encoder lays the program out.

use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, FlowControl, Instruction, InstructionBlock, InstructionInfoFactory,
    MemoryOperand, Mnemonic, OpAccess, Register,
};

use crate::case::{CODE, Case, DATA, PAGE, READ_ONLY, STACK};
use crate::generate::codes::{self, Class};
use crate::generate::operands::{Pointers, Setup, gpr_number, gpr64, target};
use crate::generate::{placement, registers};
use crate::rng::Rng;

/// Labels: the instruction with number n has ip LABEL + n.
const LABEL: u64 = 0x7000_0000;

struct Program<'a> {
    setup: Setup<'a>,
    instructions: Vec<Instruction>,
    subroutines: Vec<Vec<Instruction>>,
    next_label: u64,
    counters: Vec<usize>,
    info: InstructionInfoFactory,
    codes: &'a [Code],
    /// Codes in favour in this program, so that neighbours belong together.
    favourites: Vec<Code>,
}

/// Instructions that compilers emit most: drawn far more often than the alphabet of iced suggests.
fn is_common(code: Code) -> bool {
    use Mnemonic::*;
    matches!(
        code.mnemonic(),
        Add | Sub
            | And
            | Or
            | Xor
            | Cmp
            | Test
            | Mov
            | Movzx
            | Movsx
            | Movsxd
            | Lea
            | Inc
            | Dec
            | Neg
            | Not
            | Shl
            | Shr
            | Sar
            | Rol
            | Ror
            | Rcl
            | Rcr
            | Imul
            | Mul
            | Adc
            | Sbb
            | Cdq
            | Cqo
            | Push
            | Pop
            | Xchg
            | Cmpxchg
            | Xadd
            | Bt
            | Bts
            | Bsf
            | Bsr
            | Shld
            | Shrd
            | Lahf
            | Sahf
            | Pushfq
            | Cmc
            | Stc
            | Clc
            | Popcnt
            | Sete
            | Setb
            | Cmove
            | Cmovb
            | Cmovs
            | Seto
            | Movaps
            | Movups
            | Movdqa
            | Movdqu
            | Movq
            | Movd
            | Pxor
            | Addsd
            | Mulsd
            | Ucomisd
            | Comiss
            | Vzeroupper
            | Vmovdqu
            | Vpxor
            | Ldmxcsr
            | Stmxcsr
    )
}

impl Program<'_> {
    fn label(&mut self) -> u64 {
        self.next_label += 1;
        LABEL + self.next_label
    }

    fn add(&mut self, mut instruction: Instruction) -> u64 {
        let label = self.label();
        instruction.set_ip(label);
        self.instructions.push(instruction);
        label
    }

    /// True if the instruction leaves pointers, counters and the stack pointer alone.
    fn keeps_order(&mut self, instruction: &Instruction) -> bool {
        let pointers = self.setup.pointers.as_ref().expect("sequences have pointers");
        let counters = &self.counters;
        let stack_only = instruction.is_stack_instruction();
        let info = self.info.info(instruction);
        info.used_registers().iter().all(|used| {
            let writes = matches!(
                used.access(),
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            );
            match gpr_number(used.register()) {
                Some(4) if writes => stack_only,
                Some(n) if writes => !pointers.protects(n) && !counters.contains(&n),
                _ => true,
            }
        })
    }

    fn plain(&mut self) {
        for _ in 0..40 {
            let code = if !self.favourites.is_empty() && self.setup.rng.one_in(2) {
                self.setup.rng.pick(&self.favourites)
            } else {
                self.setup.rng.pick(self.codes)
            };
            if codes::is_near_branch(code) || codes::class(code) != Some(Class::Ordinary) {
                continue;
            }
            if !self.setup.rng.one_in(3) && !is_common(code) && !self.favourites.contains(&code) {
                continue;
            }
            use Mnemonic::*;
            if matches!(
                code.mnemonic(),
                Int3 | Ud0 | Ud1 | Ud2 | Enter | Leave | Xlatb | Wrfsbase | Wrgsbase | Cmpxchg16b
            ) || matches!(code.mnemonic(), Maskmovq | Maskmovdqu | Vmaskmovdqu | Popf | Popfq)
                || matches!(
                    code.mnemonic(),
                    Fnsave | Fnstenv | Fldenv | Frstor | Fxsave | Fxsave64 | Fxrstor | Fxrstor64
                )
                || matches!(code.mnemonic(), Xsave | Xsave64 | Xrstor | Xrstor64)
            {
                continue;
            }
            let Some(instruction) = self.setup.build(code) else {
                continue;
            };
            if instruction.is_string_instruction() {
                self.string(instruction);
                return;
            }
            // A wild bit offset leaves the operand.
            if matches!(instruction.mnemonic(), Bt | Bts | Btr | Btc)
                && instruction.op0_kind() == iced_x86::OpKind::Memory
                && instruction.op1_kind() == iced_x86::OpKind::Register
                && !self.setup.rng.one_in(8)
            {
                continue;
            }
            if !self.keeps_order(&instruction) || super::encode(&instruction, CODE.start).is_none() {
                continue;
            }
            self.add(instruction);
            return;
        }
    }

    fn string(&mut self, instruction: Instruction) {
        let Some(pointers) = self.setup.pointers.clone() else {
            return;
        };
        if [1, 6, 7].iter().any(|n| pointers.protects(*n) || self.counters.contains(n))
            || !self.keeps_order(&instruction)
        {
            return;
        }
        for register in [6usize, 7] {
            let (base, value) = self.setup.rng.pick(&pointers.bases);
            let to = target(self.setup.rng, 64, false);
            let operand = MemoryOperand::with_base_displ(gpr64(base), to.wrapping_sub(value) as i64);
            if let Ok(lea) = Instruction::with2(Code::Lea_r64_m, gpr64(register), operand) {
                self.add(lea);
            }
        }
        let count = self.setup.rng.below(20) as i32;
        if let Ok(mov) = Instruction::with2(Code::Mov_r32_imm32, Register::ECX, count) {
            self.add(mov);
        }
        self.add(instruction);
    }

    fn branch_code(&mut self) -> Code {
        let all = [
            Code::Jo_rel8_64,
            Code::Jno_rel8_64,
            Code::Jb_rel8_64,
            Code::Jae_rel8_64,
            Code::Je_rel8_64,
            Code::Jne_rel8_64,
            Code::Jbe_rel8_64,
            Code::Ja_rel8_64,
            Code::Js_rel32_64,
            Code::Jns_rel32_64,
            Code::Jp_rel8_64,
            Code::Jnp_rel8_64,
            Code::Jl_rel32_64,
            Code::Jge_rel8_64,
            Code::Jle_rel8_64,
            Code::Jg_rel8_64,
            Code::Jrcxz_rel8_64,
            Code::Jecxz_rel8_64,
            Code::Jmp_rel8_64,
            Code::Jmp_rel32_64,
        ];
        self.setup.rng.pick(&all)
    }

    /// `body` is generated between a branch and its target.
    fn skip(&mut self, depth: u32) {
        let code = self.branch_code();
        let at = self.instructions.len();
        let Ok(branch) = Instruction::with_branch(code, LABEL) else {
            return;
        };
        self.add(branch);
        let count = 1 + self.setup.rng.below(3);
        self.some(count, depth + 1);
        let landing = self.landing();
        self.instructions[at].set_near_branch64(landing);
    }

    /// A NOP to branch to.
    fn landing(&mut self) -> u64 {
        self.add(Instruction::with(Code::Nopd))
    }

    fn counted_loop(&mut self, depth: u32) {
        let pointers = self.setup.pointers.clone().unwrap_or_default();
        let classic = self.setup.rng.one_in(3);
        let counter = if classic { 1 } else { self.setup.rng.below(16) as usize };
        if counter == 4 || pointers.protects(counter) || self.counters.contains(&counter) {
            return;
        }
        let count = 1 + self.setup.rng.below(5) as i32;
        let Ok(mov) = Instruction::with2(Code::Mov_r32_imm32, Register::EAX + counter as u32, count) else {
            return;
        };
        self.add(mov);
        let top = self.landing();
        self.counters.push(counter);
        let body = 1 + self.setup.rng.below(4);
        self.some(body, depth + 1);
        self.counters.pop();
        if classic {
            let code =
                self.setup.rng.pick(&[Code::Loop_rel8_64_RCX, Code::Loope_rel8_64_RCX, Code::Loopne_rel8_64_RCX]);
            if let Ok(back) = Instruction::with_branch(code, top) {
                self.add(back);
            }
        } else {
            if let Ok(dec) = Instruction::with1(Code::Dec_rm64, gpr64(counter)) {
                self.add(dec);
            }
            if let Ok(back) = Instruction::with_branch(Code::Jne_rel32_64, top) {
                self.add(back);
            }
        }
    }

    fn call(&mut self, depth: u32) {
        let outer = std::mem::take(&mut self.instructions);
        let entry = self.landing();
        let body = 1 + self.setup.rng.below(3);
        self.some(body, depth + 1);
        if let Ok(ret) = Instruction::with1(Code::Retnq_imm16, 0) {
            let plain = !self.setup.rng.one_in(4);
            self.add(if plain { Instruction::with(Code::Retnq) } else { ret });
        }
        let subroutine = std::mem::replace(&mut self.instructions, outer);
        self.subroutines.push(subroutine);
        let scratch = self.scratch();
        match (scratch, self.setup.rng.below(3)) {
            (Some(register), 0) => {
                self.load_label(register, entry);
                if let Ok(call) = Instruction::with1(Code::Call_rm64, gpr64(register)) {
                    self.add(call);
                }
            }
            _ => {
                if let Ok(call) = Instruction::with_branch(Code::Call_rel32_64, entry) {
                    self.add(call);
                }
            }
        }
    }

    fn scratch(&mut self) -> Option<usize> {
        let pointers = self.setup.pointers.clone().unwrap_or_default();
        (0..8)
            .map(|_| self.setup.rng.below(16) as usize)
            .find(|n| *n != 4 && !pointers.protects(*n) && !self.counters.contains(n))
    }

    fn load_label(&mut self, register: usize, label: u64) {
        let operand = MemoryOperand::with_base_displ(Register::RIP, label as i64);
        if let Ok(lea) = Instruction::with2(Code::Lea_r64_m, gpr64(register), operand) {
            self.add(lea);
        }
    }

    /// A jump whose target comes from a register or from memory.
    fn indirect(&mut self, depth: u32) {
        let Some(register) = self.scratch() else {
            return;
        };
        let at = self.instructions.len();
        self.load_label(register, LABEL);
        let through_memory = self.setup.rng.one_in(2);
        if through_memory {
            let (base, _) = self.setup.pointers.as_ref().map_or((3, 0), |p| p.bases[0]);
            let slot = MemoryOperand::with_base_displ(gpr64(base), 64);
            if let (Ok(store), Ok(jump)) = (
                Instruction::with2(Code::Mov_rm64_r64, slot, gpr64(register)),
                Instruction::with1(Code::Jmp_rm64, slot),
            ) {
                self.add(store);
                self.add(jump);
            }
        } else if let Ok(jump) = Instruction::with1(Code::Jmp_rm64, gpr64(register)) {
            self.add(jump);
        }
        let count = self.setup.rng.below(3);
        self.some(count, depth + 1);
        let landing = self.landing();
        self.instructions[at].set_memory_displacement64(landing);
    }

    /// Code that changes the constant of an instruction ahead of it, or behind it in a loop.
    fn self_modifying(&mut self) {
        let (Some(victim), Some(pointer), Some(counter)) = (self.scratch(), self.scratch(), self.scratch()) else {
            return;
        };
        if victim == pointer || victim == counter || pointer == counter {
            return;
        }
        let constant = if victim >= 8 { 2 } else { 1 };
        let (old, new) = (self.setup.rng.next() as i32, self.setup.rng.next() as i32);
        let change = MemoryOperand::with_base_displ(gpr64(pointer), constant);
        let (Ok(change), Ok(load), Ok(count)) = (
            Instruction::with2(Code::Mov_rm32_imm32, change, new),
            Instruction::with2(Code::Mov_r32_imm32, Register::EAX + victim as u32, old),
            Instruction::with2(Code::Mov_r32_imm32, Register::EAX + counter as u32, 3),
        ) else {
            return;
        };
        if self.setup.rng.one_in(2) {
            let at = self.instructions.len();
            self.load_label(pointer, LABEL);
            self.add(change);
            for _ in 0..self.setup.rng.below(3) {
                self.plain();
            }
            let label = self.add(load);
            self.instructions[at].set_memory_displacement64(label);
            return;
        }
        self.add(count);
        self.counters.push(counter);
        let label = self.add(load);
        self.plain();
        self.load_label(pointer, label);
        self.add(change);
        self.counters.pop();
        if let (Ok(dec), Ok(back)) =
            (Instruction::with1(Code::Dec_rm64, gpr64(counter)), Instruction::with_branch(Code::Jne_rel32_64, label))
        {
            self.add(dec);
            self.add(back);
        }
    }

    fn some(&mut self, count: u64, depth: u32) {
        for _ in 0..count {
            match self.setup.rng.below(20) {
                0 | 1 if depth < 3 => self.skip(depth),
                2 if depth < 2 => self.counted_loop(depth),
                3 if depth < 2 => self.call(depth),
                4 if depth < 2 => self.indirect(depth),
                5 if self.setup.rng.one_in(3) => self.self_modifying(),
                _ => self.plain(),
            }
        }
    }
}

/// Lays the instructions out at an address: machine code with INT3 at the end of the main line and of everything.
pub fn assemble(instructions: &[Instruction], at: u64) -> Option<Vec<u8>> {
    let block = InstructionBlock::new(instructions, at);
    Some(BlockEncoder::encode(64, block, BlockEncoderOptions::NONE).ok()?.code_buffer)
}

/// Flags that may be undefined after running through the instructions in any order.
pub fn undefined_flags(instructions: &[Instruction]) -> u64 {
    instructions.iter().fold(0, |flags, i| flags | super::undefined_flags(i))
}

/// A case of a few instructions.
pub fn sequence(seed: u64, codes: &[Code]) -> Option<Case> {
    let rng = &mut Rng::new(seed ^ 0x5E90_0000_0000_0000);
    let mut start = registers(rng);
    start.gpr[4] |= if rng.one_in(3) { 0 } else { 8 };
    let mut pointers = Pointers::default();
    for _ in 0..1 + rng.below(3) {
        let n = rng.below(16) as usize;
        if n != 4 && !pointers.protects(n) {
            let value = (DATA.start + PAGE + rng.below(2 * PAGE)) & if rng.one_in(2) { !31 } else { !0 };
            start.gpr[n] = value;
            pointers.bases.push((n, value));
        }
    }
    if pointers.bases.is_empty() {
        start.gpr[3] = DATA.start + PAGE;
        pointers.bases.push((3, DATA.start + PAGE));
    }
    let n = rng.below(16) as usize;
    if n != 4 && !pointers.protects(n) {
        let value = rng.below(0x100).wrapping_sub(0x80);
        start.gpr[n] = value;
        pointers.index = Some((n, value));
    }
    // Often around a page boundary, sometimes the one behind which nothing can be written.
    pointers.focus = match rng.below(6) {
        0 | 1 => DATA.start + PAGE * (1 + rng.below(3)) - rng.below(0x180),
        2 if rng.one_in(2) => READ_ONLY.start - rng.below(0x200),
        _ => DATA.start + rng.below(3 * PAGE),
    };
    if rng.one_in(4) {
        start.gpr[4] = STACK.start + PAGE + 8 * rng.below(24);
    }
    let favourites = (0..rng.below(6)).map(|_| rng.pick(codes)).collect();
    let count = 2 + rng.below(14);
    let mut program = Program {
        setup: Setup {
            rng,
            registers: start,
            pokes: Vec::new(),
            ignored_memory: Vec::new(),
            bits: 64,
            pointers: Some(pointers),
        },
        instructions: Vec::new(),
        subroutines: Vec::new(),
        next_label: 0,
        counters: Vec::new(),
        info: InstructionInfoFactory::new(),
        codes,
        favourites,
    };
    program.some(count, 0);
    program.add(Instruction::with(Code::Int3));
    let mut instructions = std::mem::take(&mut program.instructions);
    for subroutine in std::mem::take(&mut program.subroutines) {
        instructions.extend(subroutine);
    }
    program.instructions = instructions;
    program.add(Instruction::with(Code::Int3));
    let Program { setup, instructions, .. } = program;
    let Setup { rng, registers, .. } = setup;
    from_instructions(seed, registers, |length| placement(rng, length), instructions)
}

/// Puts a program and its registers together; `place` chooses the address for a length in bytes.
pub fn from_instructions(
    seed: u64,
    mut registers: crate::case::Registers,
    place: impl FnOnce(u64) -> u64,
    instructions: Vec<Instruction>,
) -> Option<Case> {
    let length = assemble(&instructions, CODE.start)?.len() as u64;
    if length > PAGE {
        return None;
    }
    registers.rip = place(length);
    let code = assemble(&instructions, registers.rip)?;
    Some(Case {
        seed,
        bits: 64,
        undefined_flags: undefined_flags(&instructions),
        registers,
        code,
        pokes: Vec::new(),
        ignored_memory: Vec::new(),
        instructions,
    })
}

/// The same case without instruction `index`; branches to it go to the next one.
pub fn without(case: &Case, index: usize) -> Option<Case> {
    let mut instructions = case.instructions.clone();
    let removed = instructions.remove(index);
    let heir = instructions.get(index)?.ip();
    for instruction in &mut instructions {
        let branches = matches!(
            instruction.flow_control(),
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call
        );
        if branches && instruction.op0_kind() == iced_x86::OpKind::NearBranch64 {
            if instruction.near_branch64() == removed.ip() {
                instruction.set_near_branch64(heir);
            }
        } else if instruction.is_ip_rel_memory_operand() && instruction.memory_displacement64() == removed.ip() {
            instruction.set_memory_displacement64(heir);
        }
    }
    let at = case.registers.rip;
    let mut smaller = from_instructions(case.seed, case.registers.clone(), |_| at, instructions)?;
    smaller.pokes = case.pokes.clone();
    Some(smaller)
}
