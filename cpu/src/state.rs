//! The architectural state of the vCPU: everything that a snapshot must hold of it, and nothing of an engine.

/// Index of a general-purpose register in [`CpuState::gpr`], in encoding order.
pub mod gpr {
    #![allow(missing_docs)]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
    pub const R9: usize = 9;
    pub const R10: usize = 10;
    pub const R11: usize = 11;
    pub const R12: usize = 12;
    pub const R13: usize = 13;
    pub const R14: usize = 14;
    pub const R15: usize = 15;
}

/// Index of a segment register in [`CpuState::seg`], in encoding order.
pub mod seg {
    #![allow(missing_docs)]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Bits of RFLAGS.
pub mod rflags {
    #![allow(missing_docs)]
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const ID: u64 = 1 << 21;
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Bits of CR0, CR4, EFER and XCR0 that the model implements.
pub mod control {
    #![allow(missing_docs)]
    pub const CR0_PE: u64 = 1 << 0;
    pub const CR0_MP: u64 = 1 << 1;
    pub const CR0_EM: u64 = 1 << 2;
    pub const CR0_TS: u64 = 1 << 3;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_NE: u64 = 1 << 5;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_AM: u64 = 1 << 18;
    pub const CR0_NW: u64 = 1 << 29;
    pub const CR0_CD: u64 = 1 << 30;
    pub const CR0_PG: u64 = 1 << 31;

    pub const CR4_VME: u64 = 1 << 0;
    pub const CR4_PVI: u64 = 1 << 1;
    pub const CR4_TSD: u64 = 1 << 2;
    pub const CR4_DE: u64 = 1 << 3;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_MCE: u64 = 1 << 6;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_PCE: u64 = 1 << 8;
    pub const CR4_OSFXSR: u64 = 1 << 9;
    pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
    pub const CR4_UMIP: u64 = 1 << 11;
    pub const CR4_FSGSBASE: u64 = 1 << 16;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;

    pub const EFER_SCE: u64 = 1 << 0;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;

    pub const XCR0_X87: u64 = 1 << 0;
    pub const XCR0_SSE: u64 = 1 << 1;
    pub const XCR0_AVX: u64 = 1 << 2;
}

/// A segment register with its hidden part. `attributes` holds the descriptor's bits 40..=47 in bits 0..=7
/// (type, S, DPL, P) and bits 52..=55 in bits 8..=11 (AVL, L, D/B, G); `limit` is in bytes, already scaled.
/// A null selector has attributes 0 (not present).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Highest valid offset, in bytes.
    pub limit: u32,
    /// Visible selector.
    pub selector: u16,
    /// Descriptor attributes, see above.
    pub attributes: u16,
}

impl Segment {
    /// Descriptor type, 4 bits.
    pub fn kind(&self) -> u8 {
        (self.attributes & 0xF) as u8
    }
    /// S: code or data, not system.
    pub fn is_code_or_data(&self) -> bool {
        self.attributes & 0x10 != 0
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        ((self.attributes >> 5) & 3) as u8
    }
    /// P: present.
    pub fn present(&self) -> bool {
        self.attributes & 0x80 != 0
    }
    /// L: 64-bit code.
    pub fn long(&self) -> bool {
        self.attributes & 0x200 != 0
    }
    /// D/B: 32-bit default operand size or stack.
    pub fn default_big(&self) -> bool {
        self.attributes & 0x400 != 0
    }
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Highest valid offset, in bytes.
    pub limit: u16,
}

/// Bytes of an XSAVE image in the standard format with x87, SSE and AVX: legacy region, header, upper halves.
pub const XSAVE_SIZE: usize = 832;

/// Registers of x87, SSE and AVX as a standard-format XSAVE image (Intel SDM volume 1, section 13.4): legacy
/// region at 0, header at 512, upper halves of YMM at 576. The header always says that all three are present.
/// FIP, FDP and FOP are always zero.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct XsaveImage(pub [u8; XSAVE_SIZE]);

impl XsaveImage {
    /// The upper half of some YMM register is not zero.
    pub fn upper_in_use(&self) -> bool {
        self.0[576..] != [0; XSAVE_SIZE - 576]
    }
}

impl serde::Serialize for XsaveImage {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for XsaveImage {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<XsaveImage, D::Error> {
        struct Bytes;
        impl serde::de::Visitor<'_> for Bytes {
            type Value = XsaveImage;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                write!(f, "an XSAVE image of {XSAVE_SIZE} bytes")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<XsaveImage, E> {
                bytes.try_into().map(XsaveImage).map_err(|_| E::invalid_length(bytes.len(), &self))
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

/// The complete architectural state of the vCPU.
#[repr(C, align(64))]
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs)]
pub struct CpuState {
    /// General-purpose registers in encoding order, see [`gpr`].
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// Segment registers in encoding order, see [`seg`].
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// DR0..DR3, what a load of SS holds back of the traps behind it, one unused, DR6, DR7.
    pub dr: [u64; 8],
    pub xcr0: u64,
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    /// MTRRphysBase/Mask pairs 0..=7.
    pub mtrr_variable: [u64; 16],
    /// The eleven fixed-range MTRRs, in MSR order (0x250, 0x258, 0x259, 0x268..=0x26F).
    pub mtrr_fixed: [u64; 11],
    /// Guest TSC = machine TSC + this.
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
    /// IA32_SPEC_CTRL: kept for the guest to read back; the model does not speculate.
    pub spec_ctrl: u64,
    /// Current privilege level, 0..=3.
    pub cpl: u8,
    /// Interrupts are inhibited for the next instruction (after STI, MOV SS, POP SS).
    pub interrupt_shadow: bool,
    /// NMIs are blocked until the next IRET.
    pub nmi_blocked: bool,
    /// HLT has retired and no interrupt has woken the vCPU yet.
    pub halted: bool,
    /// x87, SSE and AVX registers.
    pub fpu: XsaveImage,
}

impl CpuState {
    /// True in 64-bit mode (long mode active and CS.L set).
    pub fn is_64bit(&self) -> bool {
        self.efer & control::EFER_LMA != 0 && self.seg[seg::CS].long()
    }
}

/// A saved state that no vCPU can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved vCPU's {register} is {value:#x}, which no vCPU can have")]
pub struct InvalidState {
    /// Which register.
    pub register: &'static str,
    /// Its value.
    pub value: u64,
}

impl CpuState {
    /// Checks what the engine relies on, before a state from outside is put into one. A state that passes may still be
    /// nonsense, but it can be executed.
    pub fn validate(&self) -> Result<(), InvalidState> {
        use control::*;
        const CR0_KNOWN: u64 =
            CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG;
        const CR4_KNOWN: u64 = 0xFFF | CR4_FSGSBASE | CR4_PCIDE | CR4_OSXSAVE | CR4_SMEP | CR4_SMAP;
        const EFER_KNOWN: u64 = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
        const RFLAGS_KNOWN: u64 = 0x0025_7FD7;
        let legacy = |at: usize| u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|byte| self.fpu.0[at + byte])));
        let (mxcsr, components) = (legacy(24), legacy(512));
        let paging = self.cr0 & CR0_PG != 0;
        let long = self.efer & EFER_LMA != 0;
        let checks = [
            ("CPL", u64::from(self.cpl), self.cpl <= 3),
            ("CR0", self.cr0, self.cr0 & !CR0_KNOWN == 0 && (!paging || self.cr0 & CR0_PE != 0)),
            ("CR3", self.cr3, self.cr3 >> 52 == 0),
            ("CR4", self.cr4, self.cr4 & !CR4_KNOWN == 0 && (!paging || self.cr4 & CR4_PAE != 0)),
            ("EFER", self.efer, self.efer & !EFER_KNOWN == 0 && long == paging && (!long || self.efer & EFER_LME != 0)),
            ("XCR0", self.xcr0, matches!(self.xcr0, 1 | 3 | 7)),
            ("RFLAGS", self.rflags, self.rflags & !RFLAGS_KNOWN == 0 && self.rflags & rflags::FIXED != 0),
            ("DR6", self.dr[6], self.dr[6] >> 32 == 0),
            ("DR7", self.dr[7], self.dr[7] >> 32 == 0),
            ("MXCSR", mxcsr, mxcsr >> 16 == 0),
            ("XSTATE_BV", components, components == 7 && self.fpu.0[516..576].iter().all(|byte| *byte == 0)),
        ];
        match checks.into_iter().find(|(.., valid)| !valid) {
            Some((register, value, _)) => Err(InvalidState { register, value }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_states_are_valid_and_others_are_not() {
        let good = CpuState::long_mode_boot(0x20_0000, 0, 0x7000, 0x9000, 0x500, 31);
        assert_eq!(good.validate(), Ok(()));
        let broken = |change: fn(&mut CpuState)| {
            let mut state = good.clone();
            change(&mut state);
            state.validate().expect_err("the state is broken").register
        };
        assert_eq!(broken(|s| s.cpl = 4), "CPL");
        assert_eq!(broken(|s| s.fpu.0[27] = 1), "MXCSR");
        assert_eq!(broken(|s| s.fpu.0[520] = 1), "XSTATE_BV");
        assert_eq!(broken(|s| s.efer = 0), "EFER");
        assert_eq!(broken(|s| s.rflags |= rflags::VM), "RFLAGS");
        assert_eq!(broken(|s| s.xcr0 = 5), "XCR0");
    }
}
