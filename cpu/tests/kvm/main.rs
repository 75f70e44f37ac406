//! KVM as an oracle for the engine: small guests in kernel mode and user mode are stepped on both sides, and after
//! every instruction all registers, segments, control registers, flags, x87, SSE and AVX registers and memory must
//! agree.
//!
//! `KVM_ORACLE_COUNT` multiplies the generated guests, `KVM_ORACLE_SEED` moves to others, `KVM_ORACLE_ONLY` (part of
//! a name) narrows the hand-written ones, and `KVM_ORACLE_TRACE` prints every instruction before it runs. Without
//! a usable /dev/kvm it says so and passes, or fails with `ORRERY_REQUIRE_KVM`.

// The rules for the vCPU (clippy.toml) do not bind its tests.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

#[allow(dead_code)]
#[path = "../oracle/case.rs"]
mod case;
mod differences;
mod flags;
#[allow(dead_code)]
#[path = "../oracle/generate/mod.rs"]
mod generate;
mod lockstep;
mod machine;
mod programs;
mod quirks;
#[allow(dead_code)]
#[path = "../oracle/rng.rs"]
mod rng;
#[allow(dead_code)]
#[path = "../oracle/values.rs"]
mod values;
mod vm;

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use case::Case;
use generate::codes::{self, Class};
use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind};
use lockstep::{Lockstep, Verdict};
use machine::Guest;
use rng::Rng;
use vm::{Unavailable, Vm};

fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// False for guests other than those that are asked for by the names that a report gives them.
fn is_wanted(guest: &str) -> bool {
    std::env::var("KVM_ORACLE_GUEST").map_or(true, |wanted| wanted.split(';').any(|wanted| guest == wanted))
}

/// What came of all guests.
#[derive(Default)]
struct Tally {
    guests: u64,
    agreed: u64,
    skipped: BTreeMap<String, u64>,
    /// Why KVM would not go on, with the instructions.
    refused: BTreeMap<String, BTreeSet<String>>,
    refusals: u64,
    /// Instructions that KVM refuses: guests with them are not tried again.
    refused_codes: BTreeSet<Code>,
    avoided: u64,
    differed: Vec<String>,
}

impl Tally {
    fn add(&mut self, verdict: Verdict) {
        self.guests += 1;
        match verdict {
            Verdict::Agreed => self.agreed += 1,
            Verdict::Refused(reason, instruction) => {
                self.refusals += 1;
                let name = instruction.map_or("?".to_string(), |i| format!("{:?}", i.mnemonic()).to_lowercase());
                self.refused.entry(reason).or_default().insert(name);
                self.refused_codes.extend(instruction.map(|i| i.code()));
            }
            Verdict::Skipped(reason) => *self.skipped.entry(reason).or_default() += 1,
            Verdict::Differed(report) => self.differed.push(report),
        }
    }

    /// True, and counted, if the case has an instruction that KVM refuses or does in a way of its own.
    fn avoids(&mut self, case: &Case, supervisor: bool) -> bool {
        let avoided = case
            .instructions
            .iter()
            .any(|i| self.refused_codes.contains(&i.code()) || supervisor && is_emulated_otherwise(i.code()))
            || has_narrow_repetition(case);
        self.avoided += u64::from(avoided);
        avoided
    }

    fn print(&self, title: &str) {
        let skipped: u64 = self.refusals + self.skipped.values().sum::<u64>();
        println!(
            "{title}: {} guests, {} agreed to the end, {skipped} left early, {} differ",
            self.guests,
            self.agreed,
            self.differed.len()
        );
        for (reason, count) in &self.skipped {
            println!("  left early {count}: {reason}");
        }
        for (reason, names) in &self.refused {
            let names: Vec<_> = names.iter().map(String::as_str).collect();
            println!("  left early, KVM: {reason} on {}", names.join(" "));
        }
        if self.avoided > 0 {
            println!("  not tried for these instructions: {}", self.avoided);
        }
        for report in self.differed.iter().take(20) {
            print!("{report}");
        }
    }
}

fn hand_written(lockstep: &mut Lockstep) -> Tally {
    let only = std::env::var("KVM_ORACLE_ONLY").unwrap_or_default();
    let mut tally = Tally::default();
    for (name, code) in programs::all() {
        if name.contains(&only) && is_wanted(name) {
            let verdict = lockstep.run(name, &Guest::Kernel(code.to_vec(), [0; 10]), true);
            let word = match &verdict {
                Verdict::Agreed => "agrees to the end",
                Verdict::Differed(_) => "DIFFERS",
                _ => "left early",
            };
            println!("  {name}: {word}");
            if std::env::var_os("KVM_ORACLE_TRACE").is_some() {
                println!("{verdict:?}");
            }
            tally.add(verdict);
        }
    }
    tally
}

/// True for pieces that a KVM without help of the processor does not get through: see `quirks`.
fn needs_processor(piece: &str) -> bool {
    matches!(
        piece,
        "bad_returns"
            | "interrupts"
            | "page_attributes"
            | "time_stamp_auxiliary"
            | "user_alignment"
            | "user_interrupts"
            | "user_reaches_for_the_kernel"
            | "user_segments"
    )
}

/// True for pieces that consist of what QEMU's emulation of a processor does otherwise: see `quirks`.
fn differs_in_qemu(piece: &str) -> bool {
    matches!(
        piece,
        "bad_returns"
            | "not_canonical"
            | "user_alignment"
            | "user_faults"
            | "user_images"
            | "user_segments"
            | "user_stack_faults"
            | "user_x87"
    )
}

/// Guests made of pieces in random order, each from random registers.
fn assembled(lockstep: &mut Lockstep, count: u64) -> Tally {
    let only = std::env::var("KVM_ORACLE_ONLY").unwrap_or_default();
    let pieces: Vec<_> = programs::pieces().into_iter().filter(|(name, _)| name.contains(&only)).collect();
    let mut tally = Tally::default();
    let first = environment("KVM_ORACLE_SEED", 0) << 32;
    for seed in first..first + count * environment("KVM_ORACLE_COUNT", 1) {
        if pieces.is_empty() {
            break;
        }
        let mut rng = Rng::new(seed ^ 0xA55E_0000_0000_0000);
        let registers = std::array::from_fn(|_| values::interesting_u64(&mut rng));
        let (mut code, mut names, mut changes_tables) = (Vec::new(), String::new(), false);
        let mut left = 1 + rng.below(24);
        while left > 0 {
            let (name, piece) = rng.pick(&pieces);
            let avoided = lockstep.emulates_kernel() && needs_processor(name)
                || lockstep.emulated_processor() && differs_in_qemu(name);
            if avoided && pieces.len() > 1 && !rng.one_in(64) {
                continue;
            }
            // The program has one page more than it needs, for code that is written to and for a last HLT.
            if code.len() + piece.len() > 3 * 4096 {
                break;
            }
            code.extend_from_slice(piece);
            changes_tables |= matches!(name, "changed_tables" | "accessed_and_dirty" | "exchanged_pages");
            names += name;
            names.push(' ');
            left -= 1;
        }
        code.push(0xF4);
        if is_wanted(&format!("pieces {seed}")) {
            let name = format!("pieces {seed}: {names}");
            tally.add(lockstep.run(&name, &Guest::Kernel(code, registers), changes_tables));
        }
    }
    tally
}

/// True for what QEMU's emulated processor lacks: the second encoding of TEST, and SHA. The engine would meet that on
/// its own side, too.
fn is_missing_in_qemu(code: Code) -> bool {
    use Mnemonic::*;
    matches!(
        code,
        Code::Test_rm8_imm8_F6r1 | Code::Test_rm16_imm16_F7r1 | Code::Test_rm32_imm32_F7r1 | Code::Test_rm64_imm32_F7r1
    ) || matches!(code.mnemonic(), Sha1msg1 | Sha1msg2 | Sha1nexte | Sha1rnds4 | Sha256msg1 | Sha256msg2 | Sha256rnds2)
}

/// True for what KVM's emulation does otherwise than a processor: ENTER with another size, TZCNT and LZCNT as BSF
/// and BSR, MOVBE not with every prefix, FXRSTOR without a check of its address, FXSAVE with the reserved bytes.
fn is_emulated_otherwise(code: Code) -> bool {
    use Mnemonic::*;
    matches!(code.mnemonic(), Enter | Tzcnt | Lzcnt | Movbe | Fxsave | Fxsave64 | Fxrstor | Fxrstor64)
}

/// True for a repeated string instruction with 32-bit addresses: with ECX = 0 vendors differ about the rest of RCX,
/// and KVM goes by the vendor's name, where the engine does as its host.
fn has_narrow_repetition(case: &Case) -> bool {
    use iced_x86::OpKind::{MemoryESEDI, MemorySegEDI, MemorySegESI};
    let narrow = |i: &Instruction| i.op_kinds().any(|kind| matches!(kind, MemoryESEDI | MemorySegEDI | MemorySegESI));
    case.instructions.iter().any(narrow)
}

/// The host oracle's instructions and programs, at CPL 3 or 0.
fn generated(lockstep: &mut Lockstep, supervisor: bool, singles: u64, sequences: u64) -> Tally {
    let mut tally = Tally::default();
    let mut codes = codes::all();
    if lockstep.emulated_processor() {
        codes.retain(|code| !is_missing_in_qemu(*code));
    }
    if supervisor {
        // CS and SS are others there, and SYSCALL goes elsewhere.
        codes.retain(|code| {
            codes::class(*code) == Some(Class::Ordinary)
                && !is_emulated_otherwise(*code)
                && !code.op_code().op_kinds().contains(&OpCodeOperandKind::seg_reg)
        });
    }
    // INT3, with which a case ends, is not for every KVM at CPL 0.
    let emulated_processor = lockstep.emulated_processor();
    let prepare = |mut case: Case| {
        if emulated_processor {
            // QEMU does not check alignment.
            case.registers.rflags &= !generate::ALIGNMENT_CHECK;
        }
        if supervisor && let Some(last) = case.code.last_mut() {
            *last = 0xF4;
            // PVM clears AC at exceptions; in kernel mode it means nothing here.
            case.registers.rflags &= !generate::ALIGNMENT_CHECK;
        }
        Guest::Case(Box::new(case), supervisor)
    };
    let scale = environment("KVM_ORACLE_COUNT", 1);
    let first = environment("KVM_ORACLE_SEED", 0) << 32;
    for seed in first..first + singles * scale {
        let code = codes[(seed % codes.len() as u64) as usize];
        if let Some(case) = generate::single(seed, code).filter(|case| !tally.avoids(case, supervisor)) {
            let name = format!("single {seed}, supervisor {supervisor}");
            if is_wanted(&name) {
                tally.add(lockstep.run(&name, &prepare(case), false));
            }
        }
    }
    // Programs are drawn from what KVM has not refused.
    codes.retain(|code| !tally.refused_codes.contains(code));
    for seed in first..first + sequences * scale * environment("KVM_ORACLE_SEQUENCES", 1) {
        if let Some(case) = generate::sequence::sequence(seed, &codes).filter(|case| !tally.avoids(case, supervisor)) {
            let name = format!("sequence {seed}, supervisor {supervisor}");
            if is_wanted(&name) {
                tally.add(lockstep.run(&name, &prepare(case), false));
            }
        }
    }
    tally
}

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    let vm = match Vm::new() {
        Ok(vm) => vm,
        Err(Unavailable(reason)) => {
            let required = std::env::var_os("ORRERY_REQUIRE_KVM").is_some();
            println!("KVM oracle skipped: {reason}");
            return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let mut lockstep = Lockstep::new(vm);
    let tallies = [
        ("hand-written", hand_written(&mut lockstep)),
        ("assembled", assembled(&mut lockstep, 40)),
        ("generated, CPL 3", generated(&mut lockstep, false, 1_000, 200)),
        ("generated, CPL 0", generated(&mut lockstep, true, 500, 200)),
    ];
    for (title, tally) in &tallies {
        tally.print(title);
    }
    let differed: usize = tallies.iter().map(|(_, tally)| tally.differed.len()).sum();
    println!(
        "KVM oracle: {} steps compared ({} instructions, {} different ones), {differed} differences",
        lockstep.comparisons,
        lockstep.steps,
        lockstep.executed.len()
    );
    if differed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
