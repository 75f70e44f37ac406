//! Whether an instruction may execute at all: whether the CPU model has it, and whether CR0, CR4 and XCR0 permit
//! its unit (Intel SDM volume 3, sections 2.5 and 13.1; volume 2, section 2.4 for VEX).

use crate::exception::Exception;
use crate::state::{CpuState, control};
use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};

/// True if the model has a feature. What is absent raises #UD.
fn in_model(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
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
            | RDPMC
    )
}

fn has_operand(instr: &Instruction, test: impl Fn(iced_x86::Register) -> bool) -> bool {
    (0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Register && test(instr.op_register(i)))
}

/// The exception that an x87, MMX, SSE or AVX instruction raises before it looks at its operands: #UD or #NM.
/// Also #UD for an instruction that the model does not have. None if it may execute.
pub(super) fn refused(state: &CpuState, instr: &Instruction) -> Option<Exception> {
    let features = instr.cpuid_features();
    if !features.iter().all(|feature| in_model(*feature)) {
        return Some(Exception::InvalidOpcode);
    }
    if instr.encoding() == EncodingKind::VEX {
        if features.iter().all(|f| matches!(f, CpuidFeature::BMI1 | CpuidFeature::BMI2)) {
            return None;
        }
        return avx_refused(state);
    }
    if has_operand(instr, |register| register.is_xmm())
        || matches!(instr.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr)
    {
        return sse_refused(state);
    }
    let x87 = features
        .iter()
        .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX));
    if has_operand(instr, |register| register.is_mm()) {
        return mmx_refused(state);
    }
    if x87 || matches!(instr.mnemonic(), Mnemonic::Fisttp) {
        // WAIT looks at TS only together with MP.
        if instr.mnemonic() == Mnemonic::Wait {
            let both = control::CR0_MP | control::CR0_TS;
            return (state.cr0 & both == both).then_some(Exception::DeviceNotAvailable);
        }
        return x87_refused(state);
    }
    None
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
