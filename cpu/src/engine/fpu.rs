//! Moves x87, SSE and AVX registers between the architectural image, the host's registers and the vCPU block.
//!
//! While the engine runs, x87 state, MXCSR and the control words are live in the host; the vector registers are
//! in the vCPU block whenever Rust runs.

use crate::state::XsaveImage;
use std::arch::asm;

const XMM: usize = 160;
const YMM_HIGH: usize = 576;
const MXCSR_MASK: u32 = 0x0000_FFFF;

/// 512 bytes for FXSAVE.
#[repr(C, align(64))]
struct Legacy([u8; 512]);

/// Image to host and block.
pub fn load(image: &XsaveImage, ymm: &mut [[u8; 32]; 16]) {
    for (i, register) in ymm.iter_mut().enumerate() {
        register[..16].copy_from_slice(&image.0[XMM + 16 * i..][..16]);
        register[16..].copy_from_slice(&image.0[YMM_HIGH + 16 * i..][..16]);
    }
    let mut legacy = Legacy([0; 512]);
    legacy.0.copy_from_slice(&image.0[..512]);
    // Reserved MXCSR bits would fault; the image never has them, a restored snapshot might.
    legacy.0[26] = 0;
    legacy.0[27] = 0;
    // SAFETY: the image is 512 aligned bytes with a valid MXCSR; x87 and vector registers are declared clobbered.
    unsafe {
        asm!("fxrstor64 [{}]", in(reg) legacy.0.as_ptr(), options(nostack),
             out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
             out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
             out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _);
    }
}

/// Host and block to image. What processors leave behind differently (FIP, FDP, FOP, reserved bytes) is zero.
pub fn store(image: &mut XsaveImage, ymm: &[[u8; 32]; 16]) {
    let mut legacy = Legacy([0; 512]);
    // SAFETY: the buffer is 512 aligned bytes.
    unsafe { asm!("fxsave64 [{}]", in(reg) legacy.0.as_mut_ptr(), options(nostack)) };
    image.0 = [0; crate::state::XSAVE_SIZE];
    image.0[..5].copy_from_slice(&legacy.0[..5]); // FCW, FSW, FTW
    image.0[24..28].copy_from_slice(&legacy.0[24..28]); // MXCSR
    image.0[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    for i in 0..8 {
        let at = 32 + 16 * i;
        image.0[at..at + 10].copy_from_slice(&legacy.0[at..at + 10]);
    }
    for (i, register) in ymm.iter().enumerate() {
        image.0[XMM + 16 * i..][..16].copy_from_slice(&register[..16]);
        image.0[YMM_HIGH + 16 * i..][..16].copy_from_slice(&register[16..]);
    }
    image.0[512] = 7; // XSTATE_BV: x87, SSE, AVX
}

/// The image in the form of `store` from one in the standard form of XSAVE, where components in their initial state may
/// be absent.
pub fn normalise(image: &mut XsaveImage, area: &[u8]) {
    let present = area[512];
    image.0 = [0; crate::state::XSAVE_SIZE];
    image.0[..2].copy_from_slice(&0x037Fu16.to_le_bytes()); // FCW
    if present & 1 != 0 {
        image.0[..5].copy_from_slice(&area[..5]);
        for i in 0..8 {
            let at = 32 + 16 * i;
            image.0[at..at + 10].copy_from_slice(&area[at..at + 10]);
        }
    }
    image.0[24..28].copy_from_slice(&area[24..28]);
    image.0[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    for (bit, start) in [(2, XMM), (4, YMM_HIGH)] {
        if present & bit != 0 {
            image.0[start..start + 256].copy_from_slice(&area[start..start + 256]);
        }
    }
    image.0[512] = 7; // XSTATE_BV: x87, SSE, AVX
}

/// True if an unmasked x87 exception waits in the host's x87 state to be reported.
pub fn error_pending() -> bool {
    let status: u16;
    // SAFETY: FNSTSW does not wait and changes nothing.
    unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
    status & 0x80 != 0
}

/// Gives the host's floating-point environment back to Rust.
pub fn reset_host() {
    let mxcsr: u32 = 0x1F80;
    // SAFETY: the default environment of the System V ABI.
    unsafe { asm!("fninit", "ldmxcsr [{}]", in(reg) &mxcsr, options(nostack)) };
}
