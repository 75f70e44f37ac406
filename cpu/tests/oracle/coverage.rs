//! Which opcodes of the CPU model were compared with the host, and why others were not.

use std::collections::BTreeMap;

use iced_x86::{Code, Mnemonic};

use crate::generate::codes::{self, Class};

/// By code, how often it was compared and how often it ran without an exception.
pub type Counts = BTreeMap<Code, [u64; 2]>;

/// Instructions that do nothing but raise an exception.
fn always_faults(code: Code) -> bool {
    matches!(code.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2)
        // To below 64 KiB, where nothing is.
        || matches!(code, Code::Retnw | Code::Retnw_imm16)
        || codes::class(code) == Some(Class::Privileged)
        || codes::class_32(code) == Some(Class::Privileged)
}

#[derive(Default)]
struct Row {
    opcodes: u64,
    covered: u64,
    cases: u64,
}

/// Prints the table by feature; what an opcode lacks that is advertised, takes part and was not compared (or never
/// ran without an exception) is returned.
pub fn print(counts: &Counts) -> Vec<Code> {
    let mut features: BTreeMap<String, Row> = BTreeMap::new();
    let mut reasons: BTreeMap<&str, u64> = BTreeMap::new();
    let mut missing = Vec::new();
    for code in Code::values() {
        let in_modes = [codes::participation(code, 64), codes::participation(code, 32)];
        let Some(part) = in_modes[0].filter(|part| part.is_ok()).or(in_modes[1]).or(in_modes[0]) else {
            continue;
        };
        if let Err(reason) = part {
            *reasons.entry(reason).or_default() += 1;
            continue;
        }
        let names: Vec<_> = code.cpuid_features().iter().map(|f| format!("{f:?}")).collect();
        let row = features.entry(names.join("+")).or_default();
        let [compared, executed] = counts.get(&code).copied().unwrap_or_default();
        row.opcodes += 1;
        row.cases += compared;
        if executed > 0 || compared > 0 && always_faults(code) {
            row.covered += 1;
        } else {
            missing.push(code);
        }
    }
    println!("{:>24} {:>8} {:>8} {:>12}", "feature", "opcodes", "covered", "comparisons");
    for (name, row) in &features {
        println!("{name:>24} {:>8} {:>8} {:>12}", row.opcodes, row.covered, row.cases);
    }
    println!("advertised opcodes that do not take part:");
    for (reason, count) in &reasons {
        println!("  {count:>4}  {reason}");
    }
    missing
}
