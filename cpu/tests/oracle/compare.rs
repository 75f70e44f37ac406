//! Compares what two executors made of a case, and says so in words.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use iced_x86::{Formatter, Instruction, IntelFormatter, Mnemonic, OpKind, Register};

use crate::case::{Case, Executor, Outcome, PAGE, pages};

/// Flags that a case can see and the two sides must agree on: status, DF, RF of the pushed image, ID, AC, NT.
const COMPARED_FLAGS: u64 = 0x8D5 | 0x400 | 1 << 16 | 1 << 18 | 1 << 14 | 1 << 21;

const GPR_NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// How strictly to compare.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tolerance {
    /// Flags the manual leaves undefined need not agree.
    pub undefined_flags: bool,
    /// The U bit of #PF's error code need not agree (the second side runs at CPL 0).
    pub user_bit: bool,
}

/// One disagreement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What differs, without values: cases with the same differences have the same cause.
    pub what: String,
    /// The two values.
    pub detail: String,
}

struct Report(Vec<Difference>);

impl Report {
    fn add(&mut self, what: impl Into<String>, expected: impl std::fmt::LowerHex, got: impl std::fmt::LowerHex) {
        let what = what.into();
        let detail = format!("{what}: expected {expected:#x}, got {got:#x}");
        self.0.push(Difference { what, detail });
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn wide(bytes: &[u8]) -> u128 {
    let mut buffer = [0; 16];
    buffer[..bytes.len()].copy_from_slice(bytes);
    u128::from_le_bytes(buffer)
}

/// True if the host did what other processors do not: took MXCSR bits that the model reserves (AMD's mask of
/// misaligned exceptions), or refused an offset that is not canonical although its sum with the segment base is.
pub fn left_the_model(case: &Case, expected: &Outcome, got: &Outcome, memory: &dyn Executor) -> bool {
    let based = instruction_at(case, expected.registers.rip)
        .is_some_and(|i| matches!(i.segment_prefix(), Register::FS | Register::GS));
    u16_at(&expected.registers.fpu.0, 26) != 0
        || based && expected.ending.vector == 13 && matches!(got.ending.vector, 14 | 17)
        || refused_the_mask(case, got, memory)
        || faulted_for_nothing(case, expected)
}

/// True if the host has faulted on a masked store of bytes that selects none: the manual leaves that to it.
fn faulted_for_nothing(case: &Case, expected: &Outcome) -> bool {
    use Mnemonic::*;
    let image = &expected.registers.fpu.0;
    let top = usize::from(image[3] >> 3 & 7);
    let mask = match instruction_at(case, expected.registers.rip) {
        Some(i) if i.mnemonic() == Maskmovq => &image[32 + (i.op2_register().number() + 8 - top) % 8 * 16..][..8],
        Some(i) if matches!(i.mnemonic(), Maskmovdqu | Vmaskmovdqu) => {
            &image[160 + i.op2_register().number() * 16..][..16]
        }
        _ => return false,
    };
    matches!(expected.ending.vector, 12..=14 | 17) && mask.iter().all(|byte| byte & 0x80 == 0)
}

/// True if the engine has refused a value for MXCSR of which the manual reserves AMD's mask alone. The host may have
/// loaded it, and something else later. `memory` is the engine's.
fn refused_the_mask(case: &Case, got: &Outcome, memory: &dyn Executor) -> bool {
    use Mnemonic::*;
    let Some(instruction) = instruction_at(case, got.registers.rip).filter(|_| got.ending.vector == 13) else {
        return false;
    };
    let offset = match instruction.mnemonic() {
        Ldmxcsr | Vldmxcsr => 0,
        Fxrstor | Fxrstor64 | Xrstor | Xrstor64 => 24,
        _ => return false,
    };
    let register = |register: Register, _, _| match register {
        Register::FS => Some(got.registers.fs_gs_base[0]),
        Register::GS => Some(got.registers.fs_gs_base[1]),
        segment if segment.is_segment_register() => Some(0),
        register => {
            let value = got.registers.gpr[register.full_register().number()];
            Some(if register.size() == 4 { value & 0xFFFF_FFFF } else { value })
        }
    };
    let Some(address) = instruction.virtual_address(0, 0, register) else { return false };
    let byte = |at: u64| {
        let is_there = pages().any(|(page, _)| page == at & !(PAGE - 1));
        is_there.then(|| memory.page(at)[(at % PAGE) as usize])
    };
    // Bits 16 to 23; the others are what the manual defines, or nothing.
    [(2, 0b10), (3, 0)].iter().all(|(n, value)| byte(address.wrapping_add(offset + n)) == Some(*value))
}

/// The instruction accesses several elements one by one, or an operand of ten bytes in two parts.
fn is_in_any_order(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let ten_bytes = instruction.memory_size().size() == 10;
    let two_strings =
        instruction.is_string_instruction() && matches!(instruction.mnemonic(), Cmpsb | Cmpsw | Cmpsd | Cmpsq);
    // Which is no address, from a stack that cannot be written: the manual begins with one, the host with the other.
    let call = instruction.mnemonic() == Call;
    ten_bytes
        || call
        || two_strings
        || matches!(
            instruction.mnemonic(),
            Fldenv
                | Fnstenv
                | Frstor
                | Fnsave
                | Fxsave
                | Fxsave64
                | Fxrstor
                | Fxrstor64
                | Xsave
                | Xsave64
                | Xrstor
                | Xrstor64
                | Maskmovq
                | Maskmovdqu
                | Vmaskmovdqu
                | Vmaskmovps
                | Vmaskmovpd
                | Vpmaskmovd
                | Vpmaskmovq
        )
}

/// MASKMOVQ and its like with a 32-bit address.
fn is_string_of_32(instruction: &Instruction) -> bool {
    instruction.op_kinds().any(|kind| kind == OpKind::MemorySegEDI)
}

/// All disagreements about registers, the ending and the count.
pub fn outcomes(case: &Case, expected: &Outcome, got: &Outcome, tolerance: Tolerance) -> Vec<Difference> {
    let mut report = Report(Vec::new());
    let (e, g) = (&expected.ending, &got.ending);
    // Microcode goes through images of processor state, and through selected bytes, in an order of its own: of
    // several faults, any may come first.
    let ended_by = instruction_at(case, expected.registers.rip);
    let any_order = ended_by.is_some_and(|i| is_in_any_order(&i));
    let addresses = |vector: u8| matches!(vector, 12..=14 | 17);
    if e.vector != g.vector && !(any_order && addresses(e.vector) && addresses(g.vector)) {
        report.add("vector", e.vector, g.vector);
    }
    // The host's kernel hides from user mode whether its own addresses are mapped, and says that they are. Its own
    // begin a page below the end of the lower half.
    let mut ignored = if e.vector == 14 && e.address >= (1 << 47) - PAGE { 1 } else { 0 };
    if tolerance.user_bit && e.vector == 14 {
        ignored |= 4;
    }
    if e.vector == g.vector && (e.error_code | ignored) != (g.error_code | ignored) {
        report.add("error code", e.error_code, g.error_code);
    }
    let mut distance = e.address.wrapping_sub(g.address) as i64;
    if ended_by.is_some_and(|i| case.bits == 64 && (i.memory_base().size() == 4 || is_string_of_32(&i))) {
        // Behind 4 GiB, or at 0 again: processors differ, and do so from instruction to instruction.
        distance = i64::from(distance as i32);
    }
    let same_operand = any_order && distance.unsigned_abs() < PAGE;
    if e.vector == g.vector && e.address != g.address && !same_operand {
        report.add("cr2", e.address, g.address);
    }
    let (a, b) = (&expected.registers, &got.registers);
    // The host makes MMX state of the x87 registers before it looks whether MASKMOVQ faults.
    let turned = e.vector != 3 && ended_by.is_some_and(|i| i.mnemonic() == Mnemonic::Maskmovq);
    if a.rip != b.rip {
        report.add("rip", a.rip, b.rip);
    }
    for (index, name) in GPR_NAMES.iter().enumerate() {
        if (a.gpr[index] ^ b.gpr[index]) & (u64::MAX >> (64 - case.bits)) != 0 {
            report.add(*name, a.gpr[index], b.gpr[index]);
        }
    }
    let mut mask = COMPARED_FLAGS;
    // Processors differ about the flags of a repeated comparison that faults on the way.
    let compares = ended_by.is_some_and(|i| i.is_string_instruction() && i.rflags_written() != 0);
    if e.vector != 3 && compares {
        mask &= !0x8D5;
    }
    // The decimal adjustments are emulated, and do as one processor does.
    let decimal = case.instructions.iter().any(|i| {
        matches!(
            i.mnemonic(),
            Mnemonic::Aaa | Mnemonic::Aas | Mnemonic::Aad | Mnemonic::Aam | Mnemonic::Daa | Mnemonic::Das
        )
    });
    if tolerance.undefined_flags || decimal {
        mask &= !case.undefined_flags;
    }
    if (a.rflags ^ b.rflags) & mask != 0 {
        let undefined = (a.rflags ^ b.rflags) & mask & !case.undefined_flags == 0;
        report.add(if undefined { "undefined rflags" } else { "rflags" }, a.rflags & mask, b.rflags & mask);
    }
    for (index, name) in ["fs base", "gs base"].iter().enumerate() {
        if a.fs_gs_base[index] != b.fs_gs_base[index] {
            report.add(*name, a.fs_gs_base[index], b.fs_gs_base[index]);
        }
    }
    fpu(&a.fpu.0, &b.fpu.0, turned, &mut report);
    if let (Some(expected), Some(got)) = (expected.retired, got.retired)
        && expected != got
    {
        report.add("retired", expected, got);
    }
    report.0
}

/// The instruction of the case's code at an address.
fn instruction_at(case: &Case, rip: u64) -> Option<Instruction> {
    let mut decoder = iced_x86::Decoder::with_ip(case.bits, &case.code, case.registers.rip, 0);
    while decoder.can_decode() {
        let instruction = decoder.decode();
        if instruction.ip() == rip {
            return Some(instruction);
        }
    }
    None
}

fn fpu(a: &[u8], b: &[u8], turned: bool, report: &mut Report) {
    for (name, at) in [("fcw", 0), ("fsw", 2)] {
        if u16_at(a, at) != u16_at(b, at) && !turned {
            report.add(name, u16_at(a, at), u16_at(b, at));
        }
    }
    if a[4] != b[4] && !turned {
        report.add("ftw", a[4], b[4]);
    }
    if b[5..24].iter().any(|byte| *byte != 0) {
        report.add("fop, fip or fdp", 0, wide(&b[8..24]));
    }
    if a[24..28] != b[24..28] {
        report.add("mxcsr", wide(&a[24..28]), wide(&b[24..28]));
    }
    for n in 0..8 {
        let at = 32 + n * 16;
        if a[at..at + 10] != b[at..at + 10] && !turned {
            report.add(format!("st{n}"), wide(&a[at..at + 10]), wide(&b[at..at + 10]));
        }
    }
    for n in 0..16 {
        let at = 160 + n * 16;
        if a[at..at + 16] != b[at..at + 16] {
            report.add(format!("xmm{n}"), wide(&a[at..at + 16]), wide(&b[at..at + 16]));
        }
        let at = 576 + n * 16;
        if a[at..at + 16] != b[at..at + 16] {
            report.add(format!("ymm{n} upper half"), wide(&a[at..at + 16]), wide(&b[at..at + 16]));
        }
    }
}

/// All disagreements about memory, one per page.
pub fn memory(case: &Case, expected: &dyn Executor, got: &dyn Executor) -> Vec<Difference> {
    let mut report = Report(Vec::new());
    for (page, _) in pages() {
        let (a, b) = (expected.page(page), got.page(page));
        if a == b {
            continue;
        }
        let ignored =
            |at: usize| case.ignored_memory.iter().any(|(start, len)| (page + at as u64).wrapping_sub(*start) < *len);
        let Some(first) = a.iter().zip(b).enumerate().position(|(at, (x, y))| x != y && !ignored(at)) else {
            continue;
        };
        let first = first & !7;
        let end = (first + 16).min(PAGE as usize);
        let what = format!("memory at {:#x}", page + first as u64);
        report.add(what, wide(&a[first..end]), wide(&b[first..end]));
    }
    report.0
}

/// The case in words: code, registers that matter, memory.
pub fn describe(case: &Case) -> String {
    let mut text = String::new();
    let mut formatter = IntelFormatter::new();
    let bytes: String = case.code.iter().map(|b| format!("{b:02x}")).collect();
    let _ = writeln!(text, "seed {} at {:#x}: {bytes}", case.seed, case.registers.rip);
    let mut decoder = iced_x86::Decoder::with_ip(case.bits, &case.code, case.registers.rip, 0);
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let mut line = String::new();
        formatter.format(&instruction, &mut line);
        let _ = writeln!(text, "  {:#x}  {line}", instruction.ip());
    }
    let r = &case.registers;
    for (row, names) in GPR_NAMES.chunks(4).enumerate() {
        let cells: Vec<_> =
            names.iter().enumerate().map(|(i, name)| format!("{name}={:#x}", r.gpr[row * 4 + i])).collect();
        let _ = writeln!(text, "  {}", cells.join(" "));
    }
    let f = &r.fpu.0;
    let _ = writeln!(
        text,
        "  rflags={:#x} fs={:#x} gs={:#x} mxcsr={:#x} fcw={:#x} fsw={:#x} ftw={:#x}",
        r.rflags,
        r.fs_gs_base[0],
        r.fs_gs_base[1],
        wide(&f[24..28]),
        u16_at(f, 0),
        u16_at(f, 2),
        f[4]
    );
    let used: BTreeSet<usize> = case
        .instructions
        .iter()
        .flat_map(|i| (0..i.op_count()).map(|op| i.op_register(op)).chain([i.memory_index()]))
        .filter(|register| register.is_vector_register())
        .map(|register| register.number())
        .collect();
    for n in used {
        let (low, high) = (wide(&f[160 + n * 16..][..16]), wide(&f[576 + n * 16..][..16]));
        let _ = writeln!(text, "  ymm{n}={high:032x}_{low:032x}");
    }
    for (address, bytes) in &case.pokes {
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let _ = writeln!(text, "  [{address:#x}] = {hex}");
    }
    text
}

/// A name under which differences with the same cause gather.
pub fn class_of(case: &Case, differences: &[Difference]) -> String {
    let mut whats: Vec<String> = differences
        .iter()
        .map(|d| {
            let what = d.what.split(" at ").next().unwrap_or(&d.what);
            match what {
                w if GPR_NAMES.contains(&w) => "gpr".to_string(),
                w if w.starts_with("xmm") || w.starts_with("ymm") => "vector register".to_string(),
                w if w.starts_with("st") => "st".to_string(),
                w => w.to_string(),
            }
        })
        .collect();
    whats.sort();
    whats.dedup();
    // A wrong vector has the same cause whatever the instruction; a wrong result seldom has.
    if let Some(vector) = differences.iter().find(|d| d.what == "vector") {
        if std::env::var_os("ORACLE_DETAIL").is_some() {
            let last = case.instructions.first().map(|i| format!("{:?} {:?}", i.mnemonic(), i.memory_size()));
            return format!("{} {}", vector.detail, last.unwrap_or_default());
        }
        return vector.detail.clone();
    }
    if whats == ["cr2"] {
        return whats.join(", ");
    }
    let mnemonics: Vec<String> = match case.instructions.as_slice() {
        [one] => vec![format!("{:?}", one.code())],
        many => many
            .iter()
            .filter(|i| !matches!(i.mnemonic(), Mnemonic::Nop | Mnemonic::Int3))
            .map(|i| format!("{:?}", i.mnemonic()))
            .take(6)
            .collect(),
    };
    format!("{}: {}", mnemonics.join("+"), whats.join(", "))
}
