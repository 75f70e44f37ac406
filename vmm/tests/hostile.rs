//! Kernels that nobody should boot: errors with words, never a panic.
#![allow(missing_docs)]

mod common;

use common::*;
use orrery_vmm::boot::{BootError, Kernel, load};
use orrery_vmm::ram;
use proptest::prelude::*;

fn try_load(kernel: &[u8], initramfs: &[u8], command_line: &str) -> Result<(), BootError> {
    let memory = ram::create(16 << 20).unwrap();
    load(&memory, &Kernel { kernel, initramfs, command_line, rsdp: None }).map(|_| ())
}

/// A bzImage whose protected-mode part is `code`.
fn bzimage(code: &[u8], init_size: u32) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[0x1F1] = 1; // setup sectors
    file[0x1F4..0x1F8].copy_from_slice(&(code.len() as u32 / 16).to_le_bytes());
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20Fu16.to_le_bytes());
    file[0x211] = 1; // loaded high
    file[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    file[0x236] = 1; // 64-bit entry point
    file[0x238..0x23C].copy_from_slice(&255u32.to_le_bytes());
    file[0x22C..0x230].copy_from_slice(&0x7FFF_FFFFu32.to_le_bytes());
    file[0x258..0x260].copy_from_slice(&0x20_0000u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
    file.extend(code);
    file
}

#[test]
fn each_defect_has_its_own_error() {
    let good = bzimage(&[0x90; 4096], 1 << 20);
    assert_eq!(try_load(&good, b"cpio", "console=ttyS0"), Ok(()));
    assert_eq!(try_load(&[], b"", ""), Err(BootError::NoKernel));
    assert!(matches!(try_load(b"#!/bin/sh\n", b"", ""), Err(BootError::NotAKernel { .. })));
    assert!(matches!(try_load(&good[..3000], b"", ""), Err(BootError::Truncated { expected: 5120, actual: 3000 })));
    assert!(matches!(try_load(&good, b"", &"x".repeat(300)), Err(BootError::CommandLineTooLong { limit: 255, .. })));
    assert_eq!(try_load(&good, b"", "a\0b"), Err(BootError::CommandLineZero));
    assert!(matches!(try_load(&good, &[0; 14 << 20], ""), Err(BootError::InitramfsTooLarge { .. })));
    let large = bzimage(&[0x90; 4096], 1 << 30);
    assert!(matches!(try_load(&large, b"", ""), Err(BootError::KernelTooLarge { .. })));
    let mut old = good.clone();
    old[0x236] = 0;
    assert!(matches!(try_load(&old, b"", ""), Err(BootError::No64BitEntry { version: 0x20F })));
    let mut arm = elf(&[0xF4]);
    arm[18] = 183;
    assert_eq!(try_load(&arm, b"", ""), Err(BootError::WrongArchitecture { machine: 183, class: 2 }));
    let mut far = elf(&[0xF4]);
    far[32..40].copy_from_slice(&(u64::MAX - 9).to_le_bytes());
    assert_eq!(try_load(&far, b"", ""), Err(BootError::Truncated { expected: u64::MAX, actual: far.len() as u64 }));
    let mut low = elf(&[0xF4]);
    low[88..96].copy_from_slice(&0x1000u64.to_le_bytes());
    assert!(matches!(try_load(&low, b"", ""), Err(BootError::KernelTooLarge { start: 0x1000, .. })));
}

fn damaged(mut file: Vec<u8>, damage: &[(u16, u8)], cut: u16) -> Vec<u8> {
    for (at, byte) in damage {
        let at = usize::from(*at) % file.len();
        file[at] = *byte;
    }
    file.truncate(file.len().saturating_sub(usize::from(cut) % 2048));
    file
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_elf_never_panics(damage in prop::collection::vec((0u16..128, any::<u8>()), 0..6), cut in 0u16..64) {
        let _ = try_load(&damaged(elf(&[0xF4; 256]), &damage, cut), b"initramfs", "");
    }

    #[test]
    fn damaged_bzimages_never_panic(damage in prop::collection::vec((0x1F0u16..0x270, any::<u8>()), 0..6), cut: u16) {
        let _ = try_load(&damaged(bzimage(&[0x90; 2048], 4096), &damage, cut), b"initramfs", "");
    }

    #[test]
    fn random_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..2048), elf_magic: bool) {
        if elf_magic && bytes.len() > 20 {
            bytes[..5].copy_from_slice(b"\x7fELF\x02");
            bytes[18..20].copy_from_slice(&[62, 0]);
        }
        let _ = try_load(&bytes, b"", "");
    }
}
