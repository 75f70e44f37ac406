//! Draws cases: one instruction, or a short program, with everything it starts from.

pub mod codes;
mod implicit;
pub mod operands;
pub mod sequence;
mod state_images;

use iced_x86::{Code, Encoder, Instruction, Mnemonic, OpKind};

use crate::case::{CODE, Case, DATA, PAGE, Registers, STACK};
use crate::rng::Rng;
use crate::values::{interesting_f80, interesting_integer, interesting_vector};
use implicit::mxcsr;
use operands::{Setup, set_vector};

const STATUS_AND_DIRECTION: u64 = 0xCD5;
const INT3: u8 = 0xCC;
/// RFLAGS.AC
pub const ALIGNMENT_CHECK: u64 = 1 << 18;

/// RFLAGS bits behind a set of iced's.
pub fn rflags_of(bits: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    let pairs = [
        (B::OF, 1 << 11),
        (B::SF, 1 << 7),
        (B::ZF, 1 << 6),
        (B::AF, 1 << 4),
        (B::CF, 1 << 0),
        (B::PF, 1 << 2),
        (B::DF, 1 << 10),
        (B::IF, 1 << 9),
    ];
    pairs.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, flag)| *flag).sum()
}

/// Flags that the manual leaves undefined after the instruction.
pub fn undefined_flags(instruction: &Instruction) -> u64 {
    // A rotation through carry by whole turns counts as none for iced, but its count is not 0.
    let rotation = matches!(instruction.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr);
    let overflow = if rotation { 1 << 11 } else { 0 };
    rflags_of(instruction.rflags_undefined()) | overflow
}

fn x87_state(rng: &mut Rng, image: &mut [u8]) {
    let mut control: u16 = 0x37F;
    if rng.one_in(3) {
        control = (control & !0xF00) | rng.pick(&[0x000, 0x200, 0x300]) | (rng.below(4) as u16) << 10;
    }
    if rng.one_in(6) {
        control &= !(rng.next() as u16 & 0x3F);
    }
    let mut status = 0u16;
    if rng.one_in(2) {
        status = (rng.below(8) as u16) << 11 | (rng.next() as u16 & 0x4700);
        if rng.one_in(2) {
            status |= rng.next() as u16 & 0x7F;
        }
    }
    // A pending unmasked exception is consistent: ES and B.
    if status & !control & 0x3F != 0 {
        if rng.one_in(4) {
            status |= 0x8080;
        } else {
            status &= !(!control & 0x3F);
        }
    }
    let tags: u8 = match rng.below(4) {
        0 => 0,
        1 => rng.next() as u8,
        _ => 0xFF,
    };
    image[0..2].copy_from_slice(&control.to_le_bytes());
    image[2..4].copy_from_slice(&status.to_le_bytes());
    image[4] = tags;
    for register in 0..8 {
        image[32 + register * 16..][..10].copy_from_slice(&interesting_f80(rng));
    }
}

/// Random registers, with the stack pointer in the stack.
pub fn registers(rng: &mut Rng) -> Registers {
    let mut r = Registers::default();
    for value in &mut r.gpr {
        *value = match rng.below(8) {
            0 => DATA.start + rng.below(DATA.pages * PAGE),
            1 => rng.next(),
            _ => interesting_integer(rng),
        };
    }
    r.gpr[4] = (STACK.start + PAGE + rng.below(0x800)).wrapping_sub(0x400) & if rng.one_in(4) { !0 } else { !15 };
    if rng.one_in(40) {
        r.gpr[4] = STACK.start + rng.below(24);
    }
    r.rflags = 0x202 | rng.next() & STATUS_AND_DIRECTION;
    if !rng.one_in(8) {
        r.rflags &= !0x400;
    }
    if rng.one_in(16) {
        r.rflags |= ALIGNMENT_CHECK;
    }
    for base in &mut r.fs_gs_base {
        *base = match rng.below(5) {
            0 => 0,
            1 => DATA.start + rng.below(0x1000),
            2 => rng.next() >> 17,
            3 => rng.below(0x1000_0000),
            _ => ((rng.next() << 16) as i64 >> 16) as u64,
        };
    }
    x87_state(rng, &mut r.fpu.0);
    let control = mxcsr(rng);
    r.fpu.0[24..28].copy_from_slice(&control.to_le_bytes());
    for n in 0..16 {
        set_vector(&mut r, n, &interesting_vector(rng));
    }
    r
}

/// Where `length` bytes of code go: mostly somewhere in a page, sometimes across two, seldom right at the end of
/// what is mapped (INT3 then does not fit).
fn placement(rng: &mut Rng, length: u64) -> u64 {
    match rng.below(40) {
        0..=3 => CODE.start + PAGE * (1 + rng.below(CODE.pages - 1)) - rng.below(length.max(2)),
        4 => CODE.start + PAGE * CODE.pages - rng.below(length + 1),
        _ => CODE.start + 128 + rng.below(CODE.pages * PAGE - 256 - length.min(PAGE)),
    }
}

/// A case of one instruction.
pub fn single(seed: u64, code: Code) -> Option<Case> {
    single_in(seed, code, 64)
}

/// A case of one instruction in compatibility mode.
pub fn single_32(seed: u64, code: Code) -> Option<Case> {
    single_in(seed, code, 32)
}

fn single_in(seed: u64, code: Code, bits: u32) -> Option<Case> {
    let class = |code| if bits == 64 { codes::class(code) } else { codes::class_32(code) };
    let rng = &mut Rng::new(seed ^ (code as u64) << 48);
    let mut start = registers(rng);
    start.rip = placement(rng, 12);
    if bits == 32 {
        start.gpr.iter_mut().for_each(|value| *value &= 0xFFFF_FFFF);
    }
    let mut setup =
        Setup { rng, registers: start, pokes: Vec::new(), ignored_memory: Vec::new(), bits, pointers: None };
    let mut instruction = setup.build(code)?;
    let (mut registers, pokes, ignored_memory) = (setup.registers, setup.pokes, setup.ignored_memory);
    let mut encoder = Encoder::new(bits);
    encoder.encode(&instruction, registers.rip).ok()?;
    let mut bytes = encoder.take_buffer();
    if rng.one_in(12) {
        bytes = with_idle_prefix(rng, bytes, bits);
    }
    registers.rip = registers.rip.min(CODE.start + CODE.pages * PAGE - 1);
    // What was asked for is what the decoder sees.
    let mut decoder = iced_x86::Decoder::with_ip(bits, &bytes, registers.rip, 0);
    let decoded = decoder.decode();
    if decoded.is_invalid() || class(decoded.code()) != class(code) || decoded.len() != bytes.len() {
        return None;
    }
    instruction = decoded;
    // Which of two faults comes first differs, and with 16-bit addresses neither operand is anywhere.
    let compares = matches!(instruction.mnemonic(), Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd);
    if compares && instruction.op_kinds().any(|kind| kind == OpKind::MemorySegSI) {
        return None;
    }
    // AMD reads 32 bits, Intel 16: that shows in what must be aligned, and where it faults.
    if instruction.code() == Code::Movsxd_r16_rm16 && instruction.op1_kind() == OpKind::Memory {
        return None;
    }
    // With these prefixes, vendors differ about near branches.
    let odd = |byte: &u8| matches!(byte, 0x66 | 0xF2 | 0xF3);
    if (codes::is_near_branch(code) || codes::is_near_branch_32(code)) && bytes[..bytes.len() - 1].iter().any(odd) {
        return None;
    }
    // Is it XCHG R8 with an idle prefix?
    if instruction.mnemonic() == Mnemonic::Pause && bytes.len() > 2 {
        return None;
    }
    // Whether UD0 and UD1 have operands that must be fetched, too.
    let end = CODE.start + CODE.pages * PAGE;
    if matches!(instruction.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1) && instruction.next_ip() > end {
        return None;
    }
    bytes.push(INT3);
    Some(Case {
        seed,
        bits,
        registers,
        code: bytes,
        pokes,
        ignored_memory,
        undefined_flags: undefined_flags(&instruction),
        instructions: vec![instruction],
    })
}

/// Adds a prefix that changes nothing, or makes the instruction another one.
fn with_idle_prefix(rng: &mut Rng, bytes: Vec<u8>, bits: u32) -> Vec<u8> {
    let prefixes = [0x66u8, 0x67, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x40, 0x48];
    let prefix = rng.pick(&prefixes[..if bits == 64 { 10 } else { 8 }]);
    let mut longer = vec![prefix];
    longer.extend_from_slice(&bytes);
    longer
}

/// Encodes one instruction at an address.
pub fn encode(instruction: &Instruction, at: u64) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, at).ok()?;
    Some(encoder.take_buffer())
}
