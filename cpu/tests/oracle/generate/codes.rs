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

/// Instructions whose result is the machine's own business, or that would leave the test's little world.
fn is_excluded(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        // System calls and far transfers.
        Syscall | Sysenter | Sysexit | Sysexitq | Sysret | Sysretq | Int | Int1 | Into | Call | Jmp | Retf | Iret
            | Iretd | Iretq
            // Time, identity, randomness.
            | Cpuid | Rdtsc | Rdtscp | Rdrand | Rdseed | Xgetbv | Rdpmc | Rdpid
            // Descriptor tables differ; UMIP is emulated by the host's kernel.
            | Lar | Lsl | Verr | Verw | Str | Sldt | Sgdt | Sidt | Smsw | Lds | Les | Lfs | Lgs | Lss
            // The host has more components, and these know which.
            | Xsaveopt | Xsaveopt64
            // Two instructions in one for iced.
            | Fstenv | Fsave
            // Approximations: vendors differ.
            | Rcpps | Rcpss | Rsqrtps | Rsqrtss | Vrcpps | Vrcpss | Vrsqrtps | Vrsqrtss
            // Emulated by hypervisors in ways of their own.
            | Wbinvd | Invd
    )
}

fn is_transcendental(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, F2xm1 | Fyl2x | Fyl2xp1 | Fptan | Fpatan | Fsin | Fcos | Fsincos)
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
    let op = code.op_code();
    if !op.is_instruction() || !op.mode64() {
        return None;
    }
    class_in(code, 64)
}

/// How `code` takes part in compatibility mode, if it does.
pub fn class_32(code: Code) -> Option<Class> {
    let op = code.op_code();
    if !op.is_instruction() || !op.compatibility_mode() {
        return None;
    }
    class_in(code, 32)
}

fn class_in(code: Code, bits: u32) -> Option<Class> {
    let op = code.op_code();
    if !matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return None;
    }
    if !code.cpuid_features().iter().all(|f| in_model(*f)) {
        return None;
    }
    if is_near_branch(code) || bits == 32 && is_near_branch_32(code) {
        // With 16-bit operands vendors differ.
        let narrow = op.op_kinds().iter().any(|k| matches!(k, OpCodeOperandKind::br16_1 | OpCodeOperandKind::br16_2));
        return (!narrow).then_some(Class::Ordinary);
    }
    // With a register operand vendors differ: #UD or NOP.
    if matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    ) {
        return None;
    }
    if is_excluded(code.mnemonic()) || is_transcendental(code.mnemonic()) {
        return None;
    }
    let unsupported_operand = op.op_kinds().iter().any(|k| {
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
    if unsupported_operand {
        return None;
    }
    // Near branches with 16-bit operands: vendors differ.
    if bits == 64 && matches!(code, Code::Retnw | Code::Retnw_imm16 | Code::Retnd | Code::Retnd_imm16) {
        return None;
    }
    // Loading a segment register needs equal descriptor tables.
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
    if loads_segment {
        return None;
    }
    Some(if is_privileged(code) { Class::Privileged } else { Class::Ordinary })
}

/// All instructions that take part in compatibility mode.
pub fn all_32() -> Vec<Code> {
    Code::values().filter(|code| class_32(*code).is_some()).collect()
}

/// All instructions that take part.
pub fn all() -> Vec<Code> {
    Code::values().filter(|code| class(*code).is_some()).collect()
}
