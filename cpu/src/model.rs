//! The CPU model `orrery-v1`: what CPUID says, which MSRs exist and what they accept, and the state at power-on.
//!
//! Everything here is a table or a pure function. No field comes from the host; the few instruction sets that a
//! host may lack are named in [`ModelFeatures`], which is part of the machine description. The reasons behind
//! the choices are in `docs/cpu-model.md`.

use crate::bus::{Bus, MsrRefused};
use crate::state::{CpuState, Segment, TableRegister, XSAVE_SIZE, XsaveImage, control, gpr, seg};
use crate::{Icount, paging};

/// Frequency of the local APIC's timer before its divider, and of the "crystal" in CPUID leaf 0x15, in Hz.
pub const APIC_BUS_HZ: u32 = 1_000_000_000;

/// Default frequency of the time-stamp counter, in kHz.
pub const DEFAULT_TSC_KHZ: u32 = 1_000_000;

/// What may differ between machines of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct ModelFeatures {
    /// AES-NI.
    pub aes: bool,
    /// PCLMULQDQ.
    pub pclmulqdq: bool,
    /// SHA extensions.
    pub sha: bool,
    /// Frequency of the time-stamp counter, in kHz; not zero.
    pub tsc_khz: u32,
}

impl Default for ModelFeatures {
    fn default() -> ModelFeatures {
        ModelFeatures { aes: true, pclmulqdq: true, sha: true, tsc_khz: DEFAULT_TSC_KHZ }
    }
}

/// The four registers that CPUID returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// What CPUID depends on besides leaf, subleaf and features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidContext {
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// XCR0.
    pub xcr0: u64,
    /// Initial local APIC identifier.
    pub apic_id: u32,
}

impl CpuidContext {
    /// The context of a vCPU. There is one, with APIC identifier 0.
    pub fn of(state: &CpuState) -> CpuidContext {
        CpuidContext { osxsave: state.cr4 & control::CR4_OSXSAVE != 0, xcr0: state.xcr0, apic_id: 0 }
    }
}

const MAX_BASIC_LEAF: u32 = 0x16;
const MAX_EXTENDED_LEAF: u32 = 0x8000_0008;
const MAX_HYPERVISOR_LEAF: u32 = 0x4000_0010;
const VENDOR: &[u8; 12] = b"GenuineIntel";
const HYPERVISOR: &[u8; 12] = b"OrreryOrrery";
const BRAND: &[u8; 48] = b"Orrery v1 deterministic processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// Family 6, model 0xF0, stepping 1: a model number that no processor and no kernel table has.
const SIGNATURE: u32 = 0x000F_0601;

fn word(text: &[u8], index: usize) -> u32 {
    text.chunks_exact(4).nth(index).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn bits(list: &[u32]) -> u32 {
    list.iter().fold(0, |value, bit| value | 1 << bit)
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// CPUID (Intel SDM volume 2A). Beyond the highest leaf it answers as the highest basic leaf does.
pub fn cpuid(leaf: u32, subleaf: u32, features: &ModelFeatures, context: &CpuidContext) -> CpuidResult {
    let result = |eax, ebx, ecx, edx| CpuidResult { eax, ebx, ecx, edx };
    match leaf {
        0 => result(MAX_BASIC_LEAF, word(VENDOR, 0), word(VENDOR, 2), word(VENDOR, 1)),
        1 => version_and_features(features, context),
        // One descriptor: the caches are described by leaf 4.
        2 => result(0x0000_FF01, 0, 0, 0),
        4 => cache(subleaf),
        // ARAT: the APIC timer never stops.
        6 => result(bits(&[2]), 0, 0, 0),
        7 => structured_features(subleaf, features),
        0xB => topology(subleaf, context),
        0xD => xsave_area(subleaf, context),
        0x15 => {
            let common = gcd(features.tsc_khz.max(1), APIC_BUS_HZ / 1000);
            result(APIC_BUS_HZ / 1000 / common, features.tsc_khz / common, APIC_BUS_HZ, 0)
        }
        MAX_BASIC_LEAF => result(features.tsc_khz / 1000, features.tsc_khz / 1000, 100, 0),
        3 | 5 | 8..=0xA | 0xC | 0xE..=0x14 => CpuidResult::default(),
        0x4000_0000 => result(MAX_HYPERVISOR_LEAF, word(HYPERVISOR, 0), word(HYPERVISOR, 1), word(HYPERVISOR, 2)),
        0x4000_0010 => result(features.tsc_khz, APIC_BUS_HZ / 1000, 0, 0),
        0x4000_0001..=0x4FFF_FFFF => CpuidResult::default(),
        0x8000_0000 => result(MAX_EXTENDED_LEAF, 0, 0, 0),
        // LAHF64, LZCNT, PREFETCHW; SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
        0x8000_0001 => result(0, 0, bits(&[0, 5, 8]), bits(&[11, 20, 26, 27, 29])),
        0x8000_0002..=0x8000_0004 => {
            let first = (leaf - 0x8000_0002) as usize * 4;
            result(word(BRAND, first), word(BRAND, first + 1), word(BRAND, first + 2), word(BRAND, first + 3))
        }
        0x8000_0005 => CpuidResult::default(),
        // L2: 1024 KiB, 16-way, lines of 64 bytes.
        0x8000_0006 => result(0, 0, 1024 << 16 | 8 << 12 | 64, 0),
        // Invariant TSC.
        0x8000_0007 => result(0, 0, 0, bits(&[8])),
        0x8000_0008 => result(paging::PHYSICAL_ADDRESS_BITS | paging::LINEAR_ADDRESS_BITS << 8, 0, 0, 0),
        _ => cpuid(MAX_BASIC_LEAF, 0, features, context),
    }
}

fn version_and_features(features: &ModelFeatures, context: &CpuidContext) -> CpuidResult {
    // SSE3, SSSE3, FMA, CX16, PCID, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT, TSC-deadline, XSAVE, AVX, F16C,
    // RDRAND, hypervisor.
    let mut ecx = bits(&[0, 9, 12, 13, 17, 19, 20, 21, 22, 23, 24, 26, 28, 29, 30, 31]);
    ecx |= u32::from(features.pclmulqdq) << 1 | u32::from(features.aes) << 25 | u32::from(context.osxsave) << 27;
    // FPU, DE, PSE, TSC, MSR, PAE, CX8, APIC, SEP, MTRR, PGE, CMOV, PAT, PSE-36, CLFSH, MMX, FXSR, SSE, SSE2.
    let edx = bits(&[0, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 16, 17, 19, 23, 24, 25, 26]);
    // CLFLUSH lines of 64 bytes, one logical processor.
    CpuidResult { eax: SIGNATURE, ebx: context.apic_id << 24 | 1 << 16 | 8 << 8, ecx, edx }
}

fn structured_features(subleaf: u32, features: &ModelFeatures) -> CpuidResult {
    if subleaf != 0 {
        return CpuidResult::default();
    }
    // FSGSBASE, TSC_ADJUST, BMI1, AVX2, SMEP, BMI2, ERMS, INVPCID, zero FCS/FDS, RDSEED, SMAP, CLFLUSHOPT, CLWB.
    let mut ebx = bits(&[0, 1, 3, 5, 7, 8, 9, 10, 13, 18, 20, 23, 24]);
    ebx |= u32::from(features.sha) << 29;
    // FSRM, IBRS and IBPB, STIBP, ARCH_CAPABILITIES.
    CpuidResult { eax: 0, ebx, ecx: bits(&[2]), edx: bits(&[4, 26, 27, 29]) }
}

fn cache(subleaf: u32) -> CpuidResult {
    // Type and level, ways, sets; lines of 64 bytes; not shared.
    let (kind, level, ways, sets) = match subleaf {
        0 => (1, 1, 8, 64),
        1 => (2, 1, 8, 64),
        2 => (3, 2, 16, 1024),
        3 => (3, 3, 16, 16384),
        _ => return CpuidResult::default(),
    };
    CpuidResult { eax: kind | level << 5 | 1 << 8, ebx: (ways - 1) << 22 | 63, ecx: sets - 1, edx: 0 }
}

fn topology(subleaf: u32, context: &CpuidContext) -> CpuidResult {
    match subleaf {
        0 => CpuidResult { eax: 0, ebx: 1, ecx: 1 << 8, edx: context.apic_id },
        1 => CpuidResult { eax: 0, ebx: 1, ecx: 2 << 8 | 1, edx: context.apic_id },
        _ => CpuidResult { eax: 0, ebx: 0, ecx: subleaf & 0xFF, edx: context.apic_id },
    }
}

fn xsave_area(subleaf: u32, context: &CpuidContext) -> CpuidResult {
    let all = (control::XCR0_X87 | control::XCR0_SSE | control::XCR0_AVX) as u32;
    let size = XSAVE_SIZE as u32;
    match subleaf {
        0 => {
            let enabled = if context.xcr0 & control::XCR0_AVX != 0 { size } else { 576 };
            CpuidResult { eax: all, ebx: enabled, ecx: size, edx: 0 }
        }
        2 => CpuidResult { eax: 256, ebx: 576, ecx: 0, edx: 0 },
        _ => CpuidResult::default(),
    }
}

/// MSR addresses of the model (Intel SDM volume 4).
pub mod msr {
    #![allow(missing_docs)]
    pub const TIME_STAMP_COUNTER: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1B;
    pub const TSC_ADJUST: u32 = 0x3B;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_SIGN_ID: u32 = 0x8B;
    pub const MTRR_CAP: u32 = 0xFE;
    pub const ARCH_CAPABILITIES: u32 = 0x10A;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MISC_ENABLE: u32 = 0x1A0;
    pub const DEBUGCTL: u32 = 0x1D9;
    pub const MTRR_PHYS_BASE0: u32 = 0x200;
    pub const MTRR_PHYS_MASK7: u32 = 0x20F;
    pub const MTRR_FIX64K: u32 = 0x250;
    pub const MTRR_FIX16K_80000: u32 = 0x258;
    pub const MTRR_FIX16K_A0000: u32 = 0x259;
    pub const MTRR_FIX4K_C0000: u32 = 0x268;
    pub const MTRR_FIX4K_F8000: u32 = 0x26F;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2FF;
    pub const TSC_DEADLINE: u32 = 0x6E0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x8FF;
    pub const EFER: u32 = 0xC000_0080;
    pub const STAR: u32 = 0xC000_0081;
    pub const LSTAR: u32 = 0xC000_0082;
    pub const CSTAR: u32 = 0xC000_0083;
    pub const SFMASK: u32 = 0xC000_0084;
    pub const FS_BASE: u32 = 0xC000_0100;
    pub const GS_BASE: u32 = 0xC000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    pub const TSC_AUX: u32 = 0xC000_0103;
}

/// IA32_ARCH_CAPABILITIES: none of the speculation weaknesses, because nothing is speculated. RDCL_NO, IBRS_ALL,
/// SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO,
/// GDS_NO, RFDS_NO, ITS_NO.
const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;
/// IBRS and STIBP.
const SPEC_CTRL_BITS: u64 = 3;
/// Eight variable ranges, fixed ranges, write-combining.
const MTRR_CAPABILITIES: u64 = 8 | 1 << 8 | 1 << 10;
/// Fast strings; no BTS; no PEBS.
const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;
/// PAT at reset (Intel SDM volume 3, section 12.12.4).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// Microcode revision, in the upper half of IA32_BIOS_SIGN_ID.
const MICROCODE_REVISION: u64 = 1 << 32;
const EFER_BITS: u64 = control::EFER_SCE | control::EFER_LME | control::EFER_LMA | control::EFER_NXE;

/// True for the MSRs that belong to the machine: IA32_APIC_BASE, IA32_TSC_DEADLINE, x2APIC.
pub fn is_bus_msr(index: u32) -> bool {
    matches!(index, msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST)
}

fn fixed_mtrr(index: u32) -> Option<usize> {
    match index {
        msr::MTRR_FIX64K => Some(0),
        msr::MTRR_FIX16K_80000 => Some(1),
        msr::MTRR_FIX16K_A0000 => Some(2),
        msr::MTRR_FIX4K_C0000..=msr::MTRR_FIX4K_F8000 => Some((index - msr::MTRR_FIX4K_C0000) as usize + 3),
        _ => None,
    }
}

/// The guest's time-stamp counter at `now`.
pub fn guest_tsc(state: &CpuState, bus: &mut dyn Bus, now: Icount) -> u64 {
    bus.tsc(now).wrapping_add(state.tsc_offset)
}

/// RDMSR. An MSR that the model does not have is refused: #GP(0).
pub fn read_msr(state: &CpuState, bus: &mut dyn Bus, now: Icount, index: u32) -> Result<u64, MsrRefused> {
    Ok(match index {
        msr::FS_BASE => state.seg[seg::FS].base,
        msr::GS_BASE => state.seg[seg::GS].base,
        msr::KERNEL_GS_BASE => state.kernel_gs_base,
        _ if is_bus_msr(index) => return bus.msr_read(now, index),
        msr::TIME_STAMP_COUNTER => guest_tsc(state, bus, now),
        msr::TSC_ADJUST => state.tsc_adjust,
        msr::TSC_AUX => state.tsc_aux,
        msr::EFER => state.efer,
        msr::STAR => state.star,
        msr::LSTAR => state.lstar,
        msr::CSTAR => state.cstar,
        msr::SFMASK => state.sfmask,
        msr::SYSENTER_CS => state.sysenter_cs,
        msr::SYSENTER_ESP => state.sysenter_esp,
        msr::SYSENTER_EIP => state.sysenter_eip,
        msr::SPEC_CTRL => state.spec_ctrl,
        msr::ARCH_CAPABILITIES => ARCH_CAPABILITIES,
        msr::PLATFORM_ID | msr::DEBUGCTL => 0,
        msr::BIOS_SIGN_ID => MICROCODE_REVISION,
        msr::MISC_ENABLE => state.misc_enable,
        msr::PAT => state.pat,
        msr::MTRR_CAP => MTRR_CAPABILITIES,
        msr::MTRR_DEF_TYPE => state.mtrr_def_type,
        msr::MTRR_PHYS_BASE0..=msr::MTRR_PHYS_MASK7 => state.mtrr_variable[(index - msr::MTRR_PHYS_BASE0) as usize],
        _ => state.mtrr_fixed[fixed_mtrr(index).ok_or(MsrRefused)?],
    })
}

/// What the engine must do after WRMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrEffect {
    /// Nothing.
    None,
    /// Forget all cached translations.
    FlushTranslations,
}

/// WRMSR. Refused (#GP(0)) for an absent or read-only MSR, a reserved bit, a non-canonical address.
pub fn write_msr(
    state: &mut CpuState,
    bus: &mut dyn Bus,
    now: Icount,
    index: u32,
    value: u64,
) -> Result<MsrEffect, MsrRefused> {
    let require = |condition: bool| if condition { Ok(()) } else { Err(MsrRefused) };
    let canonical = || require(paging::is_canonical(value));
    match index {
        msr::FS_BASE => {
            canonical()?;
            state.seg[seg::FS].base = value;
        }
        msr::GS_BASE => {
            canonical()?;
            state.seg[seg::GS].base = value;
        }
        msr::KERNEL_GS_BASE => {
            canonical()?;
            state.kernel_gs_base = value;
        }
        _ if is_bus_msr(index) => bus.msr_write(now, index, value)?,
        msr::TIME_STAMP_COUNTER => {
            let delta = value.wrapping_sub(guest_tsc(state, bus, now));
            state.tsc_offset = state.tsc_offset.wrapping_add(delta);
            state.tsc_adjust = state.tsc_adjust.wrapping_add(delta);
        }
        msr::TSC_ADJUST => {
            let delta = value.wrapping_sub(state.tsc_adjust);
            state.tsc_offset = state.tsc_offset.wrapping_add(delta);
            state.tsc_adjust = value;
        }
        msr::TSC_AUX => {
            require(value >> 32 == 0)?;
            state.tsc_aux = value;
        }
        msr::EFER => return write_efer(state, value),
        msr::STAR => state.star = value,
        msr::LSTAR => {
            canonical()?;
            state.lstar = value;
        }
        msr::CSTAR => {
            canonical()?;
            state.cstar = value;
        }
        msr::SFMASK => {
            require(value >> 32 == 0)?;
            state.sfmask = value;
        }
        msr::SYSENTER_CS => state.sysenter_cs = value & 0xFFFF_FFFF,
        msr::SYSENTER_ESP => {
            canonical()?;
            state.sysenter_esp = value;
        }
        msr::SYSENTER_EIP => {
            canonical()?;
            state.sysenter_eip = value;
        }
        msr::SPEC_CTRL => {
            require(value & !SPEC_CTRL_BITS == 0)?;
            state.spec_ctrl = value;
        }
        // IBPB: there is no predictor to forget anything.
        msr::PRED_CMD => require(value & !1 == 0)?,
        // Written with zero before CPUID loads the revision into it.
        msr::BIOS_SIGN_ID => {}
        msr::DEBUGCTL => require(value == 0)?,
        msr::MISC_ENABLE => {
            // Only the fast-strings bit can change; no feature can be hidden from CPUID.
            require((value ^ MISC_ENABLE_RESET) & !1 == 0)?;
            state.misc_enable = value;
        }
        msr::PAT => {
            require(value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)))?;
            state.pat = value;
        }
        msr::MTRR_DEF_TYPE => {
            require(value & !0xC07 == 0 && is_mtrr_type(value as u8 & 7))?;
            state.mtrr_def_type = value;
        }
        msr::MTRR_PHYS_BASE0..=msr::MTRR_PHYS_MASK7 => {
            let reserved = !paging::PHYSICAL_ADDRESS_MASK | if index & 1 == 0 { 0xF00 } else { 0x7FF };
            require(value & reserved == 0 && (index & 1 == 1 || is_mtrr_type(value as u8)))?;
            state.mtrr_variable[(index - msr::MTRR_PHYS_BASE0) as usize] = value;
        }
        _ => {
            let fixed = fixed_mtrr(index).ok_or(MsrRefused)?;
            require(value.to_le_bytes().iter().all(|kind| is_mtrr_type(*kind)))?;
            state.mtrr_fixed[fixed] = value;
        }
    }
    Ok(MsrEffect::None)
}

fn is_mtrr_type(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

fn write_efer(state: &mut CpuState, value: u64) -> Result<MsrEffect, MsrRefused> {
    let lme_changes = (value ^ state.efer) & control::EFER_LME != 0;
    if value & !EFER_BITS != 0 || (lme_changes && state.cr0 & control::CR0_PG != 0) {
        return Err(MsrRefused);
    }
    // LMA is the processor's own; a write to it is ignored.
    let value = value & !control::EFER_LMA | state.efer & control::EFER_LMA;
    let effect =
        if (value ^ state.efer) & control::EFER_NXE != 0 { MsrEffect::FlushTranslations } else { MsrEffect::None };
    state.efer = value;
    Ok(effect)
}

/// Attributes of the flat segments, see [`Segment`].
pub(crate) mod attributes {
    /// Code, execute/read, accessed, S, present, L, G; DPL 0.
    pub const CODE64: u16 = 0xA9B;
    /// Code, execute/read, accessed, S, present, D, G; DPL 0.
    pub const CODE32: u16 = 0xC9B;
    /// Data, read/write, accessed, S, present, B, G; DPL 0.
    pub const DATA: u16 = 0xC93;
    /// Busy 64-bit (or 32-bit) TSS, present.
    pub const TSS_BUSY: u16 = 0x8B;
    /// LDT, present.
    pub const LDT: u16 = 0x82;
}

/// An x87, SSE and AVX image in the initial configuration: FCW 0x37F, MXCSR 0x1F80, all registers empty or zero.
pub(crate) fn initial_fpu() -> XsaveImage {
    let mut image = XsaveImage([0; XSAVE_SIZE]);
    image.0[0..2].copy_from_slice(&0x037Fu16.to_le_bytes());
    image.0[24..28].copy_from_slice(&0x1F80u32.to_le_bytes());
    image.0[28..32].copy_from_slice(&0xFFFFu32.to_le_bytes());
    image.0[512] = 7;
    image
}

impl CpuState {
    /// The state after a hardware reset (Intel SDM volume 3, table 10-1), but for x87, which is initialised.
    pub fn power_on() -> CpuState {
        let data = Segment { base: 0, limit: 0xFFFF, selector: 0, attributes: 0x93 };
        let mut state = CpuState {
            gpr: [0; 16],
            rip: 0xFFF0,
            rflags: 2,
            seg: [data; 6],
            ldtr: Segment { attributes: attributes::LDT, ..data },
            tr: Segment { attributes: attributes::TSS_BUSY, ..data },
            gdtr: TableRegister { base: 0, limit: 0xFFFF },
            idtr: TableRegister { base: 0, limit: 0xFFFF },
            cr0: control::CR0_CD | control::CR0_NW | control::CR0_ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            dr: [0, 0, 0, 0, 0, 0, 0xFFFF_0FF0, 0x400],
            xcr0: control::XCR0_X87,
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            tsc_aux: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            pat: PAT_RESET,
            misc_enable: MISC_ENABLE_RESET,
            mtrr_def_type: 0,
            mtrr_variable: [0; 16],
            mtrr_fixed: [0; 11],
            tsc_offset: 0,
            tsc_adjust: 0,
            spec_ctrl: 0,
            cpl: 0,
            interrupt_shadow: false,
            nmi_blocked: false,
            halted: false,
            fpu: initial_fpu(),
        };
        state.gpr[gpr::RDX] = u64::from(SIGNATURE);
        state.seg[seg::CS] = Segment { base: 0xFFFF_0000, limit: 0xFFFF, selector: 0xF000, attributes: 0x9B };
        state
    }

    /// The state at the 64-bit entry point of a Linux kernel (Documentation/arch/x86/boot.rst, section 1.15):
    /// long mode with the caller's identity page tables at `cr3`, CS 0x10 and data segments 0x18 of the GDT at
    /// `gdt_base`, interrupts off, RSI the address of the zero page, memory write-back by default.
    pub fn long_mode_boot(rip: u64, rsi: u64, rsp: u64, cr3: u64, gdt_base: u64, gdt_limit: u16) -> CpuState {
        let mut state = CpuState::power_on();
        let flat = |selector, attributes| Segment { base: 0, limit: u32::MAX, selector, attributes };
        state.gpr = [0; 16];
        state.gpr[gpr::RSI] = rsi;
        state.gpr[gpr::RSP] = rsp;
        state.rip = rip;
        state.seg = [flat(0x18, attributes::DATA); 6];
        state.seg[seg::CS] = flat(0x10, attributes::CODE64);
        state.gdtr = TableRegister { base: gdt_base, limit: gdt_limit };
        state.idtr = TableRegister { base: 0, limit: 0 };
        state.cr0 = control::CR0_PE | control::CR0_ET | control::CR0_NE | control::CR0_PG;
        state.cr3 = cr3;
        state.cr4 = control::CR4_PAE;
        state.efer = control::EFER_LME | control::EFER_LMA;
        // MTRRs on, everything write-back.
        state.mtrr_def_type = 1 << 11 | 6;
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXT: CpuidContext = CpuidContext { osxsave: true, xcr0: 7, apic_id: 0 };

    struct NoBus;

    impl Bus for NoBus {
        fn port_read(&mut self, _: Icount, _: u16, _: usize) -> u32 {
            0
        }
        fn port_write(&mut self, _: Icount, _: u16, _: usize, _: u32) {}
        fn mmio_read(&mut self, _: Icount, _: u64, _: &mut [u8]) {}
        fn mmio_write(&mut self, _: Icount, _: u64, _: &[u8]) {}
        fn msr_read(&mut self, _: Icount, _: u32) -> Result<u64, MsrRefused> {
            Err(MsrRefused)
        }
        fn msr_write(&mut self, _: Icount, _: u32, _: u64) -> Result<(), MsrRefused> {
            Err(MsrRefused)
        }
        fn task_priority(&mut self, _: Icount) -> u8 {
            0
        }
        fn set_task_priority(&mut self, _: Icount, _: u8) {}
        fn tsc(&mut self, _: Icount) -> u64 {
            100
        }
        fn random(&mut self) -> u64 {
            0
        }
        fn attention(&self) -> bool {
            false
        }
    }

    #[test]
    fn frequencies_agree() {
        for tsc_khz in [1_000_000, 2_400_000, 999_999, 1] {
            let features = ModelFeatures { tsc_khz, ..ModelFeatures::default() };
            let leaf = cpuid(0x15, 0, &features, &CONTEXT);
            let hz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax);
            assert_eq!(hz, u64::from(tsc_khz) * 1000);
            assert_eq!(cpuid(0x4000_0010, 0, &features, &CONTEXT).eax, tsc_khz);
        }
    }

    #[test]
    fn leaves_beyond_the_last_answer_as_the_last_basic_one() {
        let features = ModelFeatures::default();
        let last = cpuid(MAX_BASIC_LEAF, 0, &features, &CONTEXT);
        for leaf in [0x17, 0x1000, 0x8000_0009, 0xFFFF_FFFF] {
            assert_eq!(cpuid(leaf, 5, &features, &CONTEXT), last);
        }
    }

    #[test]
    fn features_can_be_dropped() {
        let none = ModelFeatures { aes: false, pclmulqdq: false, sha: false, ..ModelFeatures::default() };
        let (with, without) = (cpuid(1, 0, &ModelFeatures::default(), &CONTEXT), cpuid(1, 0, &none, &CONTEXT));
        assert_eq!(with.ecx ^ without.ecx, 1 << 1 | 1 << 25);
        let (with, without) = (cpuid(7, 0, &ModelFeatures::default(), &CONTEXT), cpuid(7, 0, &none, &CONTEXT));
        assert_eq!(with.ebx ^ without.ebx, 1 << 29);
    }

    #[test]
    fn msrs_refuse_what_the_manual_refuses() {
        let mut state = CpuState::long_mode_boot(0, 0, 0, 0, 0, 0);
        let mut write = |index, value| write_msr(&mut state, &mut NoBus, Icount(0), index, value);
        let non_canonical = 1 << 47;
        for index in [msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE, msr::LSTAR, msr::SYSENTER_ESP] {
            assert_eq!(write(index, non_canonical), Err(MsrRefused));
            assert_eq!(write(index, 0xFFFF_8000_0000_0000), Ok(MsrEffect::None));
        }
        for (index, value) in [
            (msr::EFER, 1 << 12),
            (msr::EFER, 0),
            (msr::PAT, 2),
            (msr::MTRR_DEF_TYPE, 3),
            (msr::MTRR_PHYS_BASE0, 1 << 46),
            (msr::ARCH_CAPABILITIES, 0),
            (msr::SPEC_CTRL, 4),
            (msr::DEBUGCTL, 1),
            (0xC001_0015, 0),
        ] {
            assert_eq!(write(index, value), Err(MsrRefused), "{index:#x}");
        }
        let long = control::EFER_LME | control::EFER_LMA;
        assert_eq!(write(msr::EFER, long | control::EFER_NXE), Ok(MsrEffect::FlushTranslations));
        assert_eq!(write(msr::TSC_ADJUST, 50), Ok(MsrEffect::None));
        assert_eq!(read_msr(&state, &mut NoBus, Icount(0), msr::TIME_STAMP_COUNTER), Ok(150));
    }
}
