//! Measures which flags and results that the manual leaves undefined the host's processor leaves as the CPU model
//! says: instructions of each kind are executed by the processor and by the emulation, from the same registers. The
//! answer is a property of the processor, so it is found once in a process. It decides who computes, not what.

use super::region::Region;
use super::undefined::{Undefined, has_undefined_result};
use crate::Icount;
use crate::bus::Bus;
use crate::exception::Exception;
use crate::model::ModelFeatures;
use crate::state::{CpuState, gpr, rflags};
use crate::system::{self, Flush, Privilege, System};
use iced_x86::{Decoder, DecoderOptions, Encoder, Instruction, OpKind};
use std::sync::OnceLock;

/// What the trial instructions use: RAX, RBX, RCX, RDX, RSI and RFLAGS.
type Trial = [u64; 6];

/// Where the first five of a trial are in the state.
const REGISTERS: [usize; 5] = [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX, gpr::RSI];

const VALUES: [u64; 13] = [
    0,
    1,
    2,
    3,
    0x7F,
    0x80,
    0x7FFF_8000,
    0x8000_0000,
    0xFFFF_FFFF,
    1 << 63,
    u64::MAX,
    0x0123_4567_89AB_CDEF,
    0xFEDC_BA98_7654_3210,
];

/// Trials of an instruction: all counts of bits, and a few more; with a constant, all values.
fn trials(ins: &Instruction) -> u64 {
    let by_constant = ins.op_count() > 1 && ins.op_kind(ins.op_count() - 1) == OpKind::Immediate8;
    if by_constant { VALUES.len() as u64 } else { 67 }
}

/// The kinds that the host executes otherwise than the model says.
pub fn unlike_the_model() -> Undefined {
    static MEASURED: OnceLock<Undefined> = OnceLock::new();
    // Without executable memory there is no engine either.
    *MEASURED.get_or_init(|| measure().unwrap_or(Undefined::ALL))
}

fn measure() -> std::io::Result<Undefined> {
    let page = Region::new(4096, None)?;
    page.make_executable(0, 4096)?;
    let mut unlike = Undefined::NONE;
    let mut state = CpuState::long_mode_boot(0, 0, 0, 0, 0, 0);
    for ins in instructions() {
        place(&page, &ins);
        for number in 0..trials(&ins) {
            let before = trial(number);
            let Some(expected) = emulate(&mut state, &ins, before) else { continue };
            let mut got = before;
            // SAFETY: `place` has put a function there that loads and stores the trial and saves RBX. Its instruction
            // accesses registers only, and the emulation has just shown that it does not fault.
            unsafe {
                let run: extern "sysv64" fn(*mut Trial) = std::mem::transmute(page.at(0));
                run(&mut got);
            }
            got[5] &= rflags::STATUS;
            if got != expected {
                unlike = unlike.and(differing(&ins, &expected, &got));
            }
        }
    }
    Ok(unlike)
}

/// The kinds to blame: of a bit scan that leaves the right registers, only its flags.
fn differing(ins: &Instruction, expected: &Trial, got: &Trial) -> Undefined {
    let kinds = Undefined::of(ins);
    let scan_of_zero = Undefined::ALL.kinds().last().map_or(Undefined::NONE, |(_, kind)| kind);
    let same_zero_flag = (expected[5] ^ got[5]) & rflags::ZF == 0;
    if kinds.meets(scan_of_zero) && expected[..5] == got[..5] && same_zero_flag {
        kinds.without(scan_of_zero)
    } else {
        kinds
    }
}

/// Trial `number`: registers in which every value meets every count, and flags.
fn trial(number: u64) -> Trial {
    let value = |n: u64| VALUES[(n % VALUES.len() as u64) as usize];
    let mixed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let first = if number.is_multiple_of(3) { mixed } else { value(number) };
    // So that most divisions have a result.
    let above = if number.is_multiple_of(2) { ((first as i64) >> 63) as u64 } else { value(mixed >> 60) };
    let flags = [0, rflags::STATUS, mixed >> 20 & rflags::STATUS][(number % 3) as usize];
    [first, value(mixed >> 32), number, above, value(number / 13), 0x202 | flags]
}

/// What the model says, with the status flags alone; None if the instruction raises an exception.
fn emulate(state: &mut CpuState, ins: &Instruction, before: Trial) -> Option<Trial> {
    for (register, value) in REGISTERS.into_iter().zip(before) {
        state.gpr[register] = value;
    }
    state.rflags = before[5];
    system::execute(state, ins, &mut Nothing).ok()?;
    let mut after = REGISTERS.map(|register| state.gpr[register]).into_iter();
    let mut trial = [0; 6].map(|_: u64| after.next().unwrap_or(state.rflags));
    trial[5] &= rflags::STATUS;
    Some(trial)
}

/// Every form of every kind, with operands in registers: the first is RAX (RBX if there is one only), then RBX, RSI.
fn instructions() -> Vec<Instruction> {
    const COUNTS: [u8; 7] = [2, 7, 8, 9, 16, 17, 33];
    let mut all = Vec::new();
    let mut add = |bytes: &[u8]| all.push(Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode());
    // Operands of 8, 16, 32 and 64 bits: prefixes, and what the opcode of the wider ones adds to that of bytes.
    const SIZES: [(&[u8], u8); 4] = [(&[], 0), (&[0x66], 1), (&[], 1), (&[0x48], 1)];
    for (prefix, wide) in SIZES {
        // Rotates and shifts are told apart by bits 5:3 of ModRM; 6 is SHL again.
        for modrm in [0xC0, 0xC8, 0xD0, 0xD8, 0xE0, 0xE8, 0xF0, 0xF8] {
            add(&[prefix, &[0xD0 + wide, modrm]].concat());
            add(&[prefix, &[0xD2 + wide, modrm]].concat());
            COUNTS.iter().for_each(|count| add(&[prefix, &[0xC0 + wide, modrm, *count]].concat()));
        }
        // MUL, IMUL, DIV, IDIV
        [0xE3, 0xEB, 0xF3, 0xFB].iter().for_each(|modrm| add(&[prefix, &[0xF6 + wide, *modrm]].concat()));
    }
    for (prefix, _) in &SIZES[1..] {
        // SHLD, SHRD
        add(&[prefix, &[0x0F, 0xA5, 0xD8][..]].concat());
        add(&[prefix, &[0x0F, 0xAD, 0xD8][..]].concat());
        COUNTS.iter().for_each(|count| add(&[prefix, &[0x0F, 0xA4, 0xD8, *count][..]].concat()));
        COUNTS.iter().for_each(|count| add(&[prefix, &[0x0F, 0xAC, 0xD8, *count][..]].concat()));
        // IMUL, BSF, BSR, TZCNT, LZCNT
        add(&[prefix, &[0x0F, 0xAF, 0xC3][..]].concat());
        add(&[prefix, &[0x6B, 0xC3, 0x83][..]].concat());
        add(&[prefix, &[0x69, 0xC3, 0x81, 0x7F, 0x00, 0x00][..]].concat());
        add(&[prefix, &[0x0F, 0xBC, 0xC3][..]].concat());
        add(&[prefix, &[0x0F, 0xBD, 0xC3][..]].concat());
        // The prefix that is part of the opcode stands before REX.
        add(&[&[0xF3], *prefix, &[0x0F, 0xBC, 0xC3]].concat());
        add(&[&[0xF3], *prefix, &[0x0F, 0xBD, 0xC3]].concat());
    }
    for wide in [0, 0x80] {
        // ANDN rax, rbx, rsi; BEXTR and BZHI rax, rbx, rcx; BLSR, BLSMSK, BLSI rax, rbx
        add(&[0xC4, 0xE2, 0x60 | wide, 0xF2, 0xC6]);
        add(&[0xC4, 0xE2, 0x70 | wide, 0xF7, 0xC3]);
        add(&[0xC4, 0xE2, 0x70 | wide, 0xF5, 0xC3]);
        [0xCB, 0xD3, 0xDB].iter().for_each(|modrm| add(&[0xC4, 0xE2, 0x78 | wide, 0xF3, *modrm]));
    }
    all.retain(|ins| Undefined::ALL.meets(Undefined::of(ins)) && !has_undefined_result(ins));
    all
}

/// Puts a function on the page that loads the trial RDI points to, executes the instruction and stores the trial.
#[rustfmt::skip]
fn place(page: &Region, ins: &Instruction) {
    const BEFORE: [u8; 24] = [
        0x53, // push rbx
        0x48, 0x8B, 0x07, // mov rax, [rdi]
        0x48, 0x8B, 0x5F, 0x08, // mov rbx, [rdi + 8]
        0x48, 0x8B, 0x4F, 0x10, // mov rcx, [rdi + 16]
        0x48, 0x8B, 0x57, 0x18, // mov rdx, [rdi + 24]
        0x48, 0x8B, 0x77, 0x20, // mov rsi, [rdi + 32]
        0xFF, 0x77, 0x28, 0x9D, // push [rdi + 40]; popfq
    ];
    const AFTER: [u8; 25] = [
        0x9C, 0x8F, 0x47, 0x28, // pushfq; pop [rdi + 40]
        0x48, 0x89, 0x07, // mov [rdi], rax
        0x48, 0x89, 0x5F, 0x08, // mov [rdi + 8], rbx
        0x48, 0x89, 0x4F, 0x10, // mov [rdi + 16], rcx
        0x48, 0x89, 0x57, 0x18, // mov [rdi + 24], rdx
        0x48, 0x89, 0x77, 0x20, // mov [rdi + 32], rsi
        0x5B, 0xC3, // pop rbx; ret
    ];
    let mut encoder = Encoder::new(64);
    encoder.encode(ins, 0).expect("it has been encoded before");
    let code = [&BEFORE[..], &encoder.take_buffer(), &AFTER].concat();
    // SAFETY: the page is writable and larger than that; nobody else knows it.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), page.at(0), code.len()) };
}

/// The surroundings of instructions that use none.
struct Nothing;

impl System for Nothing {
    fn read(&mut self, _: &mut CpuState, _: u64, _: &mut [u8], _: Privilege) -> Result<(), Exception> {
        Err(Exception::GP0)
    }
    fn write(&mut self, _: &mut CpuState, _: u64, _: &[u8], _: Privilege) -> Result<(), Exception> {
        Err(Exception::GP0)
    }
    fn page_pointer(
        &mut self,
        _: &mut CpuState,
        _: u64,
        _: usize,
        _: bool,
        _: Privilege,
    ) -> Result<Option<*mut u8>, Exception> {
        Err(Exception::GP0)
    }
    fn flush(&mut self, _: Flush) {}
    fn bus(&mut self) -> &mut dyn Bus {
        unreachable!("integer instructions know no devices")
    }
    fn now(&self) -> Icount {
        Icount(0)
    }
    fn features(&self) -> &ModelFeatures {
        unreachable!("integer instructions are in every model")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::system::availability::in_model;
    use iced_x86::{Code, Mnemonic, OpCodeOperandKind};

    #[test]
    fn every_form_of_every_kind_is_tried() {
        let all = instructions();
        for code in Code::values() {
            let mut ins = Instruction::default();
            ins.set_code(code);
            let wanted = Undefined::ALL.meets(Undefined::of(&ins)) && in_model(&ins) && code.op_code().mode64();
            // Of these some results are undefined as well: they are always emulated.
            let result = matches!(code, Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL);
            let rotates = matches!(ins.mnemonic(), Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr);
            let defined = rotates && code.op_code().op_kind(1) == OpCodeOperandKind::imm8_const_1;
            assert_eq!(all.iter().any(|ins| ins.code() == code), wanted && !result && !defined, "{code:?}");
        }
        let mut state = CpuState::long_mode_boot(0, 0, 0, 0, 0, 0);
        for ins in all {
            let completed =
                (0..trials(&ins)).filter(|number| emulate(&mut state, &ins, trial(*number)).is_some()).count();
            assert!(completed > 12, "{:?} completed {completed} times", ins.code());
        }
    }

    #[test]
    fn measuring_again_gives_the_same() {
        assert_eq!(measure().expect("executable memory"), Undefined::measured());
    }
}
