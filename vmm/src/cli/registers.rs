//! `orrery registers`.

use orrery_cpu::CpuState;
use orrery_cpu::state::Segment;
use serde_json::{Map, Value, json};

use super::args::RegistersArgs;
use super::exit::Failure;
use super::place;
use crate::inspect::Inspector;

const GENERAL: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

pub(super) fn registers(arguments: RegistersArgs) -> Result<u8, Failure> {
    let (_place, moment) = place::open(&arguments.at)?;
    let machine = &moment.machine;
    let cpu = machine.cpu();
    if arguments.json {
        let mut all = as_json(cpu);
        all.insert("icount".into(), json!(machine.icount().0));
        all.insert("virtual_ns".into(), json!(machine.time().0));
        super::say(Value::Object(all));
        return Ok(0);
    }
    let inspector = Inspector::new(machine);
    let symbol = inspector.symbolize(cpu.rip).map_or(String::new(), |symbol| super::ps::printable(&symbol.to_string()));
    say!("icount {} virtual {} ns", machine.icount().0, machine.time().0);
    say!("{:<12} {:016x} {symbol}", "rip", cpu.rip);
    say!("{:<12} {:016x} {}", "rflags", cpu.rflags, flag_names(cpu.rflags));
    say!(
        "{:<12} {}{}{}",
        "cpl",
        cpu.cpl,
        if cpu.halted { " halted" } else { "" },
        if cpu.interrupt_shadow { " interrupt-shadow" } else { "" }
    );
    for (name, value) in GENERAL.iter().zip(cpu.gpr) {
        say!("{name:<12} {value:016x}");
    }
    let segment = |name: &str, segment: &Segment| {
        let (base, limit, attributes) = (segment.base, segment.limit, segment.attributes);
        say!("{name:<12} {:04x} base {base:016x} limit {limit:08x} attributes {attributes:03x}", segment.selector);
    };
    SEGMENTS.iter().zip(&cpu.seg).for_each(|(name, value)| segment(name, value));
    segment("ldtr", &cpu.ldtr);
    segment("tr", &cpu.tr);
    say!("{:<12} base {:016x} limit {:04x}", "gdtr", cpu.gdtr.base, cpu.gdtr.limit);
    say!("{:<12} base {:016x} limit {:04x}", "idtr", cpu.idtr.base, cpu.idtr.limit);
    for (name, value) in system(cpu) {
        say!("{name:<12} {value:016x}");
    }
    let fpu = Fpu::of(cpu);
    say!("{:<12} control {:04x} status {:04x} tags {:02x}", "x87", fpu.control, fpu.status, fpu.tags);
    for (number, value) in fpu.stack.iter().enumerate() {
        say!("{:<12} {value}", format!("st{number}"));
    }
    say!("{:<12} {:08x}", "mxcsr", fpu.mxcsr);
    for (number, value) in fpu.vectors.iter().enumerate() {
        say!("{:<12} {value}", format!("ymm{number}"));
    }
    Ok(0)
}

/// Everything, by name; numbers as hexadecimal text, because JSON's numbers have 53 bits.
pub(super) fn as_json(cpu: &CpuState) -> Map<String, Value> {
    let mut all = Map::new();
    let mut put = |name: &str, value: u64| all.insert(name.into(), json!(format!("{value:#x}")));
    put("rip", cpu.rip);
    put("rflags", cpu.rflags);
    GENERAL.iter().zip(cpu.gpr).for_each(|(name, value)| {
        put(name, value);
    });
    system(cpu).iter().for_each(|(name, value)| {
        put(name, *value);
    });
    let segment = |segment: &Segment| {
        json!({
            "selector": format!("{:#x}", segment.selector),
            "base": format!("{:#x}", segment.base),
            "limit": format!("{:#x}", segment.limit),
            "attributes": format!("{:#x}", segment.attributes),
        })
    };
    for (name, value) in SEGMENTS.iter().zip(&cpu.seg) {
        all.insert((*name).into(), segment(value));
    }
    all.insert("ldtr".into(), segment(&cpu.ldtr));
    all.insert("tr".into(), segment(&cpu.tr));
    for (name, table) in [("gdtr", cpu.gdtr), ("idtr", cpu.idtr)] {
        let value = json!({ "base": format!("{:#x}", table.base), "limit": format!("{:#x}", table.limit) });
        all.insert(name.into(), value);
    }
    all.insert("cpl".into(), json!(cpu.cpl));
    all.insert("halted".into(), json!(cpu.halted));
    all.insert("interrupt_shadow".into(), json!(cpu.interrupt_shadow));
    all.insert("nmi_blocked".into(), json!(cpu.nmi_blocked));
    let fpu = Fpu::of(cpu);
    all.insert("fcw".into(), json!(format!("{:#x}", fpu.control)));
    all.insert("fsw".into(), json!(format!("{:#x}", fpu.status)));
    all.insert("ftw".into(), json!(format!("{:#x}", fpu.tags)));
    all.insert("mxcsr".into(), json!(format!("{:#x}", fpu.mxcsr)));
    all.insert("st".into(), json!(fpu.stack));
    all.insert("ymm".into(), json!(fpu.vectors));
    all
}

/// Control, debug and model-specific registers.
fn system(cpu: &CpuState) -> Vec<(String, u64)> {
    let mut all: Vec<(String, u64)> = [
        ("cr0", cpu.cr0),
        ("cr2", cpu.cr2),
        ("cr3", cpu.cr3),
        ("cr4", cpu.cr4),
        ("dr0", cpu.dr[0]),
        ("dr1", cpu.dr[1]),
        ("dr2", cpu.dr[2]),
        ("dr3", cpu.dr[3]),
        ("dr6", cpu.dr[6]),
        ("dr7", cpu.dr[7]),
        ("xcr0", cpu.xcr0),
        ("efer", cpu.efer),
        ("star", cpu.star),
        ("lstar", cpu.lstar),
        ("cstar", cpu.cstar),
        ("sfmask", cpu.sfmask),
        ("kernel_gs_base", cpu.kernel_gs_base),
        ("tsc_aux", cpu.tsc_aux),
        ("tsc_offset", cpu.tsc_offset),
        ("tsc_adjust", cpu.tsc_adjust),
        ("sysenter_cs", cpu.sysenter_cs),
        ("sysenter_esp", cpu.sysenter_esp),
        ("sysenter_eip", cpu.sysenter_eip),
        ("pat", cpu.pat),
        ("misc_enable", cpu.misc_enable),
        ("spec_ctrl", cpu.spec_ctrl),
        ("mtrr_def_type", cpu.mtrr_def_type),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect();
    for (number, value) in cpu.mtrr_variable.iter().enumerate() {
        let part = if number % 2 == 0 { "base" } else { "mask" };
        all.push((format!("mtrr_{part}{}", number / 2), *value));
    }
    all.extend(cpu.mtrr_fixed.iter().enumerate().map(|(number, value)| (format!("mtrr_fixed{number}"), *value)));
    all
}

/// x87, SSE and AVX registers, out of the XSAVE image (Intel SDM volume 1, 13.4).
struct Fpu {
    control: u16,
    status: u16,
    tags: u8,
    mxcsr: u32,
    stack: Vec<String>,
    vectors: Vec<String>,
}

impl Fpu {
    fn of(cpu: &CpuState) -> Fpu {
        let image = &cpu.fpu.0;
        let hex = |bytes: &[u8]| bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect::<String>();
        Fpu {
            control: u16::from_le_bytes([image[0], image[1]]),
            status: u16::from_le_bytes([image[2], image[3]]),
            tags: image[4],
            mxcsr: u32::from_le_bytes([image[24], image[25], image[26], image[27]]),
            stack: (0..8).map(|number| hex(&image[32 + 16 * number..][..10])).collect(),
            vectors: (0..16)
                .map(|number| hex(&image[576 + 16 * number..][..16]) + &hex(&image[160 + 16 * number..][..16]))
                .collect(),
        }
    }
}

fn flag_names(rflags: u64) -> String {
    const NAMES: [(u32, &str); 15] = [
        (0, "CF"),
        (2, "PF"),
        (4, "AF"),
        (6, "ZF"),
        (7, "SF"),
        (8, "TF"),
        (9, "IF"),
        (10, "DF"),
        (11, "OF"),
        (14, "NT"),
        (16, "RF"),
        (17, "VM"),
        (18, "AC"),
        (19, "VIF"),
        (21, "ID"),
    ];
    let set = NAMES.iter().filter(|(bit, _)| rflags >> bit & 1 != 0).map(|(_, name)| *name);
    set.collect::<Vec<_>>().join(" ")
}
