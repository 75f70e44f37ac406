//! Whether an instruction may execute at all: whether the CPU model has it, and whether CR0, CR4 and XCR0 permit
//! its unit (Intel SDM volume 3, sections 2.5 and 13.1; volume 2, section 2.4 for VEX).

use crate::exception::Exception;
use crate::state::{CpuState, control};
use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};

/// Which unit an instruction belongs to, for the checks on CR0, CR4 and XCR0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// General-purpose registers only.
    Integer,
    /// x87 or MMX.
    X87,
    /// SSE with legacy encoding.
    Sse,
    /// VEX-encoded vector instructions.
    Avx,
}

/// The unit of an instruction.
pub(crate) fn unit(ins: &Instruction) -> Unit {
    use CpuidFeature::*;
    use Mnemonic::{
        Cldemote, Clflush, Crc32, Fisttp, Lfence, Mfence, Movnti, Pause, Popcnt, Prefetch, Prefetchnta, Prefetcht0,
        Prefetcht1, Prefetcht2, Prefetchw, Prefetchwt1, Sfence, Wait,
    };
    if ins.encoding() == EncodingKind::VEX {
        let integer = ins.cpuid_features().iter().all(|f| matches!(f, BMI1 | BMI2));
        return if integer { Unit::Integer } else { Unit::Avx };
    }
    let touches_mmx = (0..ins.op_count()).any(|i| ins.op_kind(i) == OpKind::Register && ins.op_register(i).is_mm());
    if touches_mmx || matches!(ins.mnemonic(), Fisttp | Wait) {
        return Unit::X87;
    }
    let mut unit = Unit::Integer;
    for feature in ins.cpuid_features() {
        match feature {
            FPU | FPU287 | FPU387 | MMX => unit = Unit::X87,
            SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | AES | PCLMULQDQ | SHA => {
                // These came with SSE, but use general registers only.
                let integer = matches!(
                    ins.mnemonic(),
                    Cldemote
                        | Clflush
                        | Crc32
                        | Lfence
                        | Mfence
                        | Movnti
                        | Pause
                        | Popcnt
                        | Prefetch
                        | Prefetchnta
                        | Prefetcht0
                        | Prefetcht1
                        | Prefetcht2
                        | Prefetchw
                        | Prefetchwt1
                        | Sfence
                );
                if !integer {
                    unit = Unit::Sse;
                }
            }
            _ => {}
        }
    }
    unit
}

/// True if the CPU model has everything that the instruction needs.
pub(crate) fn in_model(ins: &Instruction) -> bool {
    use CpuidFeature::*;
    // Of control-flow enforcement there are only the parts that are no-operations where it is missing.
    let hint = matches!(ins.mnemonic(), Mnemonic::Endbr32 | Mnemonic::Endbr64 | Mnemonic::Rdsspd | Mnemonic::Rdsspq);
    ins.cpuid_features().iter().all(|f| match f {
        CET_IBT | CET_SS => hint,
        _ => matches!(
            f,
            INTEL8086
                | INTEL8086_ONLY
                | INTEL186
                | INTEL286
                | INTEL286_ONLY
                | INTEL386
                | INTEL386_ONLY
                | INTEL486
                | X64
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
                | CMOV
                | CX8
                | CMPXCHG16B
                | FXSR
                | XSAVE
                | CPUID
                | TSC
                | MSR
                | SYSCALL
                | SEP
                | RDTSCP
                | RDRAND
                | RDSEED
                | FSGSBASE
                | INVPCID
                | CLFSH
                | CLFLUSHOPT
                | CLWB
                | SMAP
                | PAUSE
                | MULTIBYTENOP
                | PREFETCHW
                | MONITOR
                | SMM
                | UDBG
                | RDPMC
                | CLDEMOTE
                | PREFETCHITI
        ),
    })
}

/// The exception that an instruction raises before it looks at its operands: #UD for what the model does not have,
/// #UD or #NM for an x87, MMX, SSE or AVX instruction whose unit is not switched on. None if it may execute.
pub(crate) fn refused(state: &CpuState, instr: &Instruction) -> Option<Exception> {
    if instr.is_invalid() || !in_model(instr) {
        return Some(Exception::InvalidOpcode);
    }
    match unit(instr) {
        Unit::Integer => None,
        Unit::X87 if instr.mnemonic() == Mnemonic::Wait => {
            // WAIT looks at TS only together with MP.
            let both = control::CR0_MP | control::CR0_TS;
            (state.cr0 & both == both).then_some(Exception::DeviceNotAvailable)
        }
        Unit::X87 if (0..instr.op_count()).any(|i| instr.op_register(i).is_mm()) => mmx_refused(state),
        Unit::X87 => x87_refused(state),
        Unit::Sse => sse_refused(state),
        Unit::Avx => avx_refused(state),
    }
}

/// x87: #NM if CR0.EM or CR0.TS is set.
pub(super) fn x87_refused(state: &CpuState) -> Option<Exception> {
    (state.cr0 & (control::CR0_EM | control::CR0_TS) != 0).then_some(Exception::DeviceNotAvailable)
}

/// MMX: #UD if CR0.EM is set, #NM if CR0.TS is.
fn mmx_refused(state: &CpuState) -> Option<Exception> {
    if state.cr0 & control::CR0_EM != 0 {
        Some(Exception::InvalidOpcode)
    } else {
        (state.cr0 & control::CR0_TS != 0).then_some(Exception::DeviceNotAvailable)
    }
}

/// SSE: #UD without CR4.OSFXSR or with CR0.EM, #NM with CR0.TS.
pub(super) fn sse_refused(state: &CpuState) -> Option<Exception> {
    if state.cr4 & control::CR4_OSFXSR == 0 { Some(Exception::InvalidOpcode) } else { mmx_refused(state) }
}

/// AVX: #UD unless CR4.OSXSAVE and XCR0 enable SSE and AVX, #NM with CR0.TS.
pub(super) fn avx_refused(state: &CpuState) -> Option<Exception> {
    let needed = control::XCR0_SSE | control::XCR0_AVX;
    if state.cr4 & control::CR4_OSXSAVE == 0 || state.xcr0 & needed != needed || state.cr0 & control::CR0_PE == 0 {
        return Some(Exception::InvalidOpcode);
    }
    (state.cr0 & control::CR0_TS != 0).then_some(Exception::DeviceNotAvailable)
}

/// XSAVE, XRSTOR: #UD without CR4.OSXSAVE, #NM with CR0.TS.
pub(super) fn xsave_refused(state: &CpuState) -> Option<Exception> {
    if state.cr4 & control::CR4_OSXSAVE == 0 {
        return Some(Exception::InvalidOpcode);
    }
    (state.cr0 & control::CR0_TS != 0).then_some(Exception::DeviceNotAvailable)
}
