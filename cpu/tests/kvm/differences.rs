//! What differs between two states of a processor, in words.

use std::fmt::Write as _;

use orrery_cpu::state::{CpuState, Segment, rflags, seg};

/// Bits of RFLAGS that are compared: all but RF, which says whether a stepped instruction had retired.
const COMPARED_FLAGS: u64 = rflags::STATUS
    | rflags::TF
    | rflags::IF
    | rflags::DF
    | rflags::IOPL
    | rflags::NT
    | rflags::VM
    | rflags::AC
    | rflags::ID
    | rflags::FIXED;

/// Adds a line to a report.
pub fn add(report: &mut String, what: &str, kvm: impl std::fmt::LowerHex, engine: impl std::fmt::LowerHex) {
    let _ = writeln!(report, "  {what}: KVM {kvm:#x}, engine {engine:#x}");
}

fn segment(report: &mut String, name: &str, kvm: &Segment, engine: &Segment) {
    let null = engine.attributes & 0x80 == 0;
    let base_counts = !null || matches!(name, "fs" | "gs");
    if kvm.selector != engine.selector || base_counts && kvm.base != engine.base {
        add(report, name, kvm.selector, engine.selector);
        add(report, &format!("{name} base"), kvm.base, engine.base);
    } else if !(null && engine.selector < 4) && (kvm.attributes != engine.attributes || kvm.limit != engine.limit) {
        add(report, &format!("{name} attributes"), kvm.attributes, engine.attributes);
        add(report, &format!("{name} limit"), kvm.limit, engine.limit);
    }
}

/// Everything that differs between two states, in words; empty if nothing does.
pub fn differences(kvm: &CpuState, engine: &CpuState, ignored_flags: u64) -> String {
    let mut report = String::new();
    for n in 0..16 {
        if kvm.gpr[n] != engine.gpr[n] {
            add(&mut report, &format!("gpr {n}"), kvm.gpr[n], engine.gpr[n]);
        }
    }
    if (kvm.rflags ^ engine.rflags) & COMPARED_FLAGS & !ignored_flags != 0 {
        add(&mut report, "rflags", kvm.rflags, engine.rflags);
    }
    for (n, name) in ["es", "cs", "ss", "ds", "fs", "gs"].into_iter().enumerate() {
        segment(&mut report, name, &kvm.seg[n], &engine.seg[n]);
    }
    segment(&mut report, "ldtr", &kvm.ldtr, &engine.ldtr);
    segment(&mut report, "tr", &kvm.tr, &engine.tr);
    for (name, k, e) in [
        ("rip", kvm.rip, engine.rip),
        ("gdtr base", kvm.gdtr.base, engine.gdtr.base),
        ("gdtr limit", kvm.gdtr.limit.into(), engine.gdtr.limit.into()),
        ("idtr base", kvm.idtr.base, engine.idtr.base),
        ("idtr limit", kvm.idtr.limit.into(), engine.idtr.limit.into()),
        ("cr0", kvm.cr0, engine.cr0),
        ("cr2", kvm.cr2, engine.cr2),
        ("cr3", kvm.cr3, engine.cr3),
        ("cr4", kvm.cr4, engine.cr4),
        ("efer", kvm.efer, engine.efer),
        ("xcr0", kvm.xcr0, engine.xcr0),
        ("star", kvm.star, engine.star),
        ("lstar", kvm.lstar, engine.lstar),
        ("cstar", kvm.cstar, engine.cstar),
        ("sfmask", kvm.sfmask, engine.sfmask),
        ("kernel gs base", kvm.kernel_gs_base, engine.kernel_gs_base),
        ("sysenter cs", kvm.sysenter_cs, engine.sysenter_cs),
        ("sysenter esp", kvm.sysenter_esp, engine.sysenter_esp),
        ("sysenter eip", kvm.sysenter_eip, engine.sysenter_eip),
        ("pat", kvm.pat, engine.pat),
        ("tsc aux", kvm.tsc_aux, engine.tsc_aux),
        ("dr0", kvm.dr[0], engine.dr[0]),
        ("dr1", kvm.dr[1], engine.dr[1]),
        ("dr2", kvm.dr[2], engine.dr[2]),
        ("dr3", kvm.dr[3], engine.dr[3]),
        ("dr6", kvm.dr[6], engine.dr[6]),
        ("dr7", kvm.dr[7], engine.dr[7]),
    ] {
        if k != e {
            add(&mut report, name, k, e);
        }
    }
    // The privilege level shows in CS where SS is null.
    if kvm.seg[seg::CS].selector & 3 != u16::from(engine.cpl) {
        add(&mut report, "cpl", kvm.seg[seg::CS].selector & 3, engine.cpl);
    }
    for at in (0..kvm.fpu.0.len()).step_by(16) {
        let (k, e) = (&kvm.fpu.0[at..at + 16], &engine.fpu.0[at..at + 16]);
        if k != e {
            let _ = writeln!(report, "  fpu image at {at}: KVM {k:02x?}, engine {e:02x?}");
        }
    }
    report
}
