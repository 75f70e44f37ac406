//! Which instructions take part: user-mode instructions of the CPU model whose outcome the host processor and the
//! manual alone decide.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind};

/// What may be done with an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Compared with the host.
    Ordinary,
    /// Raises #GP or #UD at CPL 3 and must not be tried elsewhere.
    Privileged,
}

/// Features of the model whose instructions user-mode code can execute.
pub fn in_model(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        INTEL8086
            | INTEL186
            | INTEL286
            | INTEL386
            | INTEL486
            | X64
            | CMOV
            | CX8
            | CMPXCHG16B
            | CPUID
            | FPU
            | FPU287
            | FPU387
            | MMX
            | SSE
            | SSE2
            | SSE3
            | SSSE3
            | SSE4_1
            | SSE4_2
            | AVX
            | AVX2
            | FMA
            | F16C
            | BMI1
            | BMI2
            | LZCNT
            | POPCNT
            | MOVBE
            | AES
            | PCLMULQDQ
            | SHA
            | MULTIBYTENOP
            | PAUSE
            | FSGSBASE
            | CLFSH
            | PREFETCHW
            | MSR
            | TSC
            | SMAP
            | INVPCID
            | FXSR
            | XSAVE
    )
}

/// Features of the model that only the system uses, or that the oracle leaves out.
pub fn is_system_feature(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(feature, SYSCALL | SEP | RDTSCP | RDRAND | RDSEED | CLFLUSHOPT | CLWB | MONITOR | SMM | UDBG | RDPMC)
}

/// Why an instruction of the model does not take part.
fn exclusion(code: Code) -> Option<&'static str> {
    use Mnemonic::*;
    Some(match code.mnemonic() {
        Syscall | Sysenter | Sysexit | Sysexitq | Sysret | Sysretq | Int | Int1 | Into | Call | Jmp | Retf | Iret
        | Iretd | Iretq => "leaves the case: far transfers and system calls (KVM oracle)",
        Cpuid | Rdtsc | Rdtscp | Rdrand | Rdseed | Xgetbv | Rdpmc | Rdpid => "the machine's own answer (unit tests)",
        // UMIP is emulated by the host's kernel.
        Lar | Lsl | Verr | Verw | Str | Sldt | Sgdt | Sidt | Smsw | Lds | Les | Lfs | Lgs | Lss => {
            "depends on descriptor tables (KVM oracle)"
        }
        // The host has more components, and these know which.
        Xsaveopt | Xsaveopt64 => "not in the model",
        Fstenv | Fsave => "two instructions, both of which take part",
        Rcpps | Rcpss | Rsqrtps | Rsqrtss | Vrcpps | Vrcpss | Vrsqrtps | Vrsqrtss | F2xm1 | Fyl2x | Fyl2xp1 | Fptan
        | Fpatan | Fsin | Fcos | Fsincos => "approximation: processors differ (unit tests)",
        Wbinvd | Invd | Clflushopt | Clwb | Monitor | Mwait | Rsm => "system (unit tests)",
        _ => return None,
    })
}

/// Near transfers of control; far ones are excluded.
pub fn is_near_branch(code: Code) -> bool {
    use Code::*;
    code.is_jcc_short_or_near()
        || code.is_jcx_short()
        || code.is_loop()
        || code.is_loopcc()
        || matches!(code, Jmp_rel8_64 | Jmp_rel32_64 | Jmp_rm64 | Call_rel32_64 | Call_rm64 | Retnq | Retnq_imm16)
}

/// Near transfers of control of 32-bit code.
pub fn is_near_branch_32(code: Code) -> bool {
    use Code::*;
    matches!(code, Jmp_rel8_32 | Jmp_rel32_32 | Jmp_rm32 | Call_rel32_32 | Call_rm32 | Retnd | Retnd_imm16)
}

fn is_privileged(code: Code) -> bool {
    use Mnemonic::*;
    matches!(
        code.mnemonic(),
        Cli | Sti
            | Hlt
            | In
            | Out
            | Insb
            | Insw
            | Insd
            | Outsb
            | Outsw
            | Outsd
            | Lgdt
            | Lidt
            | Lldt
            | Ltr
            | Lmsw
            | Clts
            | Invlpg
            | Invpcid
            | Rdmsr
            | Wrmsr
            | Swapgs
            | Clac
            | Stac
            | Xsetbv
    ) || code
        .op_code()
        .op_kinds()
        .iter()
        .any(|k| matches!(k, OpCodeOperandKind::cr_reg | OpCodeOperandKind::dr_reg | OpCodeOperandKind::tr_reg))
}

/// How `code` takes part, if it does.
pub fn class(code: Code) -> Option<Class> {
    participation(code, 64).and_then(Result::ok)
}

/// How `code` takes part in compatibility mode, if it does.
pub fn class_32(code: Code) -> Option<Class> {
    participation(code, 32).and_then(Result::ok)
}

/// How `code` takes part in a mode, or why not. None if the mode or the model does not have it.
pub fn participation(code: Code, bits: u32) -> Option<Result<Class, &'static str>> {
    let op = code.op_code();
    let in_mode = if bits == 64 { op.mode64() } else { op.compatibility_mode() };
    let encoded = matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    if !op.is_instruction() || !in_mode || !encoded {
        return None;
    }
    if !code.cpuid_features().iter().all(|f| in_model(*f) || is_system_feature(*f)) {
        return None;
    }
    Some(match excluded(code, bits) {
        Some(reason) => Err(reason),
        None if is_privileged(code) => Ok(Class::Privileged),
        None => Ok(Class::Ordinary),
    })
}

fn excluded(code: Code, bits: u32) -> Option<&'static str> {
    let op = code.op_code();
    if is_near_branch(code) || bits == 32 && is_near_branch_32(code) {
        let narrow = op.op_kinds().iter().any(|k| matches!(k, OpCodeOperandKind::br16_1 | OpCodeOperandKind::br16_2));
        return narrow.then_some("16-bit near branch: vendors differ");
    }
    if matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    ) {
        return Some("0F 0D with a register: #UD or NOP, vendors differ");
    }
    if code == Code::Ud0 {
        return Some("decodes as the form with operands");
    }
    if let Some(reason) = exclusion(code) {
        return Some(reason);
    }
    if code.cpuid_features().iter().any(|f| is_system_feature(*f)) {
        return Some("system (unit tests)");
    }
    let of_another_size = op.op_kinds().iter().any(|k| {
        use OpCodeOperandKind::*;
        matches!(
            k,
            farbr2_2
                | farbr4_2
                | br16_1
                | br16_2
                | br32_1
                | br32_4
                | br64_1
                | br64_4
                | xbegin_2
                | xbegin_4
                | brdisp_2
                | brdisp_4
                | mem_mpx
                | mem_mib
        )
    });
    let near_return = matches!(code, Code::Retnw | Code::Retnw_imm16 | Code::Retnd | Code::Retnd_imm16);
    if of_another_size || bits == 64 && near_return {
        return Some("16-bit near branch: vendors differ");
    }
    let loads_segment = matches!(code.mnemonic(), Mnemonic::Mov | Mnemonic::Pop)
        && matches!(
            op.op_kind(0),
            OpCodeOperandKind::seg_reg
                | OpCodeOperandKind::fs
                | OpCodeOperandKind::gs
                | OpCodeOperandKind::ss
                | OpCodeOperandKind::ds
                | OpCodeOperandKind::es
        );
    loads_segment.then_some("depends on descriptor tables (KVM oracle)")
}

/// All instructions that take part in compatibility mode.
pub fn all_32() -> Vec<Code> {
    Code::values().filter(|code| class_32(*code).is_some()).collect()
}

/// All instructions that take part.
pub fn all() -> Vec<Code> {
    Code::values().filter(|code| class(*code).is_some()).collect()
}
