//! What a translation depends on besides the bytes: the parts of the vCPU's state that change what they mean.

use super::block::Class;
use crate::state::{CpuState, control, rflags, seg};

/// Translation mode, packed so that it can be part of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(pub u16);

impl Mode {
    const CODE64: u16 = 1 << 2;
    const CODE32: u16 = 1 << 3;
    const X87: u16 = 1 << 4;
    const SSE: u16 = 1 << 5;
    const AVX: u16 = 1 << 6;
    const FLAT: u16 = 1 << 7;
    const RING0: u16 = 1 << 8;
    const DIRECT: u16 = 1 << 9;
    const FSGSBASE: u16 = 1 << 10;

    /// The mode of the current state.
    pub fn of(state: &CpuState) -> Mode {
        let class = class(state);
        let mut mode = class as u16;
        let code = &state.seg[seg::CS];
        if state.cpl == 0 {
            mode |= Mode::RING0;
        }
        if state.is_64bit() {
            mode |= Mode::CODE64 | Mode::FLAT;
        } else {
            if code.default_big() {
                mode |= Mode::CODE32;
            }
            let flat = |s: usize| {
                let s = &state.seg[s];
                s.base == 0 && s.limit == u32::MAX && s.kind() & 4 == 0
            };
            let flat_code = code.base == 0 && code.limit == u32::MAX;
            if flat_code && flat(seg::DS) && flat(seg::ES) && flat(seg::SS) && state.seg[seg::SS].default_big() {
                mode |= Mode::FLAT;
            }
        }
        if state.cr0 & (control::CR0_TS | control::CR0_EM) == 0 {
            mode |= Mode::X87;
            if state.cr4 & control::CR4_OSFXSR != 0 {
                mode |= Mode::SSE;
            }
        }
        let avx = control::XCR0_SSE | control::XCR0_AVX;
        if state.cr0 & control::CR0_TS == 0 && state.cr4 & control::CR4_OSXSAVE != 0 && state.xcr0 & avx == avx {
            mode |= Mode::AVX;
        }
        if state.cr4 & control::CR4_FSGSBASE != 0 {
            mode |= Mode::FSGSBASE;
        }
        Mode(mode)
    }

    /// The same, but for 32-bit code in flat segments.
    pub fn flat32(self) -> Mode {
        Mode(self.0 & !Mode::CODE64 | Mode::CODE32 | Mode::FLAT)
    }

    /// The same, for user code whose addresses the processor translates (`kvm`).
    pub fn direct(self) -> Mode {
        Mode(self.0 | Mode::DIRECT)
    }

    /// The code runs where guest addresses are addresses.
    pub fn is_direct(self) -> bool {
        self.0 & Mode::DIRECT != 0
    }

    /// The access class.
    pub fn class(self) -> Class {
        match self.0 & 3 {
            0 => Class::User,
            1 => Class::Kernel,
            _ => Class::KernelAc,
        }
    }

    /// 64-bit code.
    pub fn is_64bit(self) -> bool {
        self.0 & Mode::CODE64 != 0
    }

    /// Decoder bitness: 64, 32 or 16.
    pub fn bitness(self) -> u32 {
        match self.0 & (Mode::CODE64 | Mode::CODE32) {
            0 => 16,
            Mode::CODE32 => 32,
            _ => 64,
        }
    }

    /// CS, DS, ES and SS span the whole address space from 0.
    pub fn is_flat(self) -> bool {
        self.0 & Mode::FLAT != 0
    }

    /// CPL 0.
    pub fn ring0(self) -> bool {
        self.0 & Mode::RING0 != 0
    }

    /// RDFSBASE and its like may execute, in 64-bit code.
    pub fn fsgsbase(self) -> bool {
        self.0 & Mode::FSGSBASE != 0
    }

    /// x87 and MMX instructions may execute.
    pub fn x87(self) -> bool {
        self.0 & Mode::X87 != 0
    }

    /// SSE instructions may execute.
    pub fn sse(self) -> bool {
        self.0 & Mode::SSE != 0
    }

    /// AVX instructions may execute.
    pub fn avx(self) -> bool {
        self.0 & Mode::AVX != 0
    }
}

/// The access class of the current privilege level and RFLAGS.AC.
pub fn class(state: &CpuState) -> Class {
    if state.cpl == 3 {
        Class::User
    } else if state.rflags & rflags::AC != 0 {
        Class::KernelAc
    } else {
        Class::Kernel
    }
}
