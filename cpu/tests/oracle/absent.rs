//! Instructions of features that the CPU model does not have must raise #UD, whatever the host can do.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind};

use crate::case::{CODE, Case, Executor};
use crate::compare;
use crate::generate::{self, codes, operands::Setup};
use crate::guest::Guest;
use crate::rng::Rng;

/// Absent features whose encodings are hints, or other instructions of the model, where the feature is missing.
fn falls_back(code: Code) -> bool {
    use CpuidFeature::*;
    let feature = code.cpuid_features().iter().any(|f| {
        matches!(
            f,
            MPX | CET_IBT
                | CET_SS
                | CLDEMOTE
                | PREFETCHWT1
                | PREFETCHITI
                | WBNOINVD
                | HLE
                | HLE_or_RTM
                | CLFLUSHOPT
                | CLWB
                | PCOMMIT
                | LZCNT
                | BMI1
                | RDPMC
                | TSE
                | LKGS
                | MSRLIST
                | WRMSRNS
        )
    });
    // Operating-system instructions, which CPL 3 may find privileged first.
    let system = matches!(code.mnemonic(), Mnemonic::Rsm | Mnemonic::Getsec | Mnemonic::Pconfig);
    feature || system
}

/// A case of an instruction that the model lacks, if `code` is one.
fn case(code: Code, seed: u64) -> Option<Case> {
    let op = code.op_code();
    if !op.is_instruction() || !op.mode64() || codes::class(code).is_some() || falls_back(code) {
        return None;
    }
    if code.cpuid_features().iter().all(|f| codes::in_model(*f) || codes::is_system_feature(*f)) {
        return None;
    }
    if !matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::XOP | EncodingKind::D3NOW) {
        return None;
    }
    if op.op_kinds().iter().any(|k| matches!(k, OpCodeOperandKind::xbegin_2 | OpCodeOperandKind::xbegin_4)) {
        return None;
    }
    let mut rng = Rng::new(seed);
    let mut registers = generate::registers(&mut rng);
    registers.rip = CODE.start + 0x100;
    let mut setup =
        Setup { rng: &mut rng, registers, pokes: Vec::new(), ignored_memory: Vec::new(), bits: 64, pointers: None };
    let instruction = setup.build(code)?;
    let registers = setup.registers;
    let mut bytes = generate::encode(&instruction, registers.rip)?;
    let decoded = iced_x86::Decoder::with_ip(64, &bytes, registers.rip, 0).decode();
    if decoded.code() != code {
        return None;
    }
    bytes.push(0xCC);
    Some(Case {
        seed,
        bits: 64,
        registers,
        code: bytes,
        pokes: Vec::new(),
        ignored_memory: Vec::new(),
        undefined_flags: 0,
        instructions: vec![decoded],
    })
}

/// Runs all of them; returns what went wrong.
pub fn check(guest: &mut Guest) -> (u64, String) {
    let (mut count, mut report) = (0, String::new());
    for code in Code::values() {
        for seed in 0..3 {
            let Some(case) = case(code, seed) else {
                continue;
            };
            count += 1;
            match guest.run(&case) {
                Ok(outcome) if outcome.ending.vector == 6 && outcome.registers.rip == case.registers.rip => {}
                Ok(outcome) => {
                    report += &format!("{code:?}: vector {}\n{}", outcome.ending.vector, compare::describe(&case));
                }
                Err(refusal) => report += &format!("{code:?}: {refusal:?}\n{}", compare::describe(&case)),
            }
        }
    }
    (count, report)
}
