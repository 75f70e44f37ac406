//! Recognises kernels: bzImage and ELF for x86-64, and says precisely why something else is not one.

pub use crate::error::KernelError;
use crate::format::{u32_at, u64_at};

/// The two kinds of kernel file that can be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// Compressed kernel with the Linux/x86 boot protocol's setup header.
    BzImage,
    /// Uncompressed `vmlinux`.
    Elf,
}

impl KernelKind {
    /// The usual name.
    pub fn name(self) -> &'static str {
        match self {
            KernelKind::BzImage => "bzImage",
            KernelKind::Elf => "ELF",
        }
    }
}

// Linux, Documentation/arch/x86/boot.rst: fields of the setup header.
const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL_VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const XLOADFLAGS: usize = 0x236;
const SETUP_HEADER_END: usize = 0x268;
/// xloadflags bit 0: the kernel has the 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// First protocol version with xloadflags.
const PROTOCOL_2_12: u16 = 0x020c;

/// Says which kind of kernel this is. Only headers are judged: a kernel that passes may still fail in the guest.
pub fn recognise(kernel: &[u8]) -> Result<KernelKind, KernelError> {
    if kernel.is_empty() {
        return Err(KernelError::Empty);
    }
    if kernel.starts_with(b"\x7fELF") {
        return recognise_elf(kernel).map(|()| KernelKind::Elf);
    }
    if kernel.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS") {
        return recognise_bzimage(kernel).map(|()| KernelKind::BzImage);
    }
    Err(foreign(kernel))
}

/// The version that a bzImage names in its header: the first word of its version string.
pub fn release(kernel: &[u8]) -> Option<String> {
    if recognise(kernel) != Ok(KernelKind::BzImage) {
        return None;
    }
    let offset = usize::from(u16_at(kernel, KERNEL_VERSION)) + 0x200;
    let text = kernel.get(offset..(offset + 128).min(kernel.len()))?;
    let word = text.split(|&byte| byte == b' ' || byte == 0).next()?;
    std::str::from_utf8(word).ok().filter(|word| !word.is_empty()).map(str::to_string)
}

fn recognise_bzimage(kernel: &[u8]) -> Result<(), KernelError> {
    let bytes = kernel.len() as u64;
    if kernel.len() < SETUP_HEADER_END {
        return Err(KernelError::Truncated { bytes, needed: SETUP_HEADER_END as u64 });
    }
    let version = u16_at(kernel, PROTOCOL_VERSION);
    if version < PROTOCOL_2_12 {
        let detail = format!("a bzImage with boot protocol {}.{:02}, older than 2.12", version >> 8, version & 0xff);
        return Err(KernelError::Unknown { detail });
    }
    if u16_at(kernel, XLOADFLAGS) & XLF_KERNEL_64 == 0 {
        return Err(KernelError::Architecture { architecture: "32-bit x86 (no 64-bit entry point)".into() });
    }
    let setup_sectors = match kernel[SETUP_SECTS] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let needed = (setup_sectors + 1) * 512 + u64::from(u32_at(kernel, SYSSIZE)) * 16;
    if bytes < needed {
        return Err(KernelError::Truncated { bytes, needed });
    }
    Ok(())
}

fn recognise_elf(kernel: &[u8]) -> Result<(), KernelError> {
    const ELF_HEADER_BYTES: usize = 64;
    const PROGRAM_HEADER_BYTES: u64 = 56;
    const PT_LOAD: u32 = 1;
    let bytes = kernel.len() as u64;
    if kernel.len() < ELF_HEADER_BYTES {
        return Err(KernelError::Truncated { bytes, needed: ELF_HEADER_BYTES as u64 });
    }
    let machine = u16_at(kernel, 18);
    let (class, endian) = (kernel[4], kernel[5]);
    if class != 2 || endian != 1 || machine != 62 {
        return Err(KernelError::Architecture { architecture: elf_machine(machine, class, endian) });
    }
    let (table, entry_bytes, count) =
        (u64_at(kernel, 32), u64::from(u16_at(kernel, 54)), u64::from(u16_at(kernel, 56)));
    if count == 0 || entry_bytes < PROGRAM_HEADER_BYTES {
        return Err(KernelError::Unknown { detail: "an ELF file without program headers".into() });
    }
    let needed = table.saturating_add(count * entry_bytes);
    if bytes < needed {
        return Err(KernelError::Truncated { bytes, needed });
    }
    let mut loadable = false;
    for index in 0..count {
        let header = (table + index * entry_bytes) as usize;
        if u32_at(kernel, header) != PT_LOAD {
            continue;
        }
        loadable = true;
        let needed = u64_at(kernel, header + 8).saturating_add(u64_at(kernel, header + 32));
        if bytes < needed {
            return Err(KernelError::Truncated { bytes, needed });
        }
    }
    if loadable { Ok(()) } else { Err(KernelError::Unknown { detail: "an ELF file with nothing to load".into() }) }
}

/// Names what a file that is no x86 kernel looks like.
fn foreign(kernel: &[u8]) -> KernelError {
    let architecture = |name: &str| KernelError::Architecture { architecture: name.into() };
    let unknown = |detail: &str| KernelError::Unknown { detail: detail.into() };
    if kernel.get(0x38..0x3c) == Some(b"ARM\x64") {
        return architecture("arm64");
    }
    if kernel.get(0x24..0x28) == Some(&[0x18, 0x28, 0x6f, 0x01]) {
        return architecture("32-bit Arm");
    }
    if kernel.get(0x30..0x34) == Some(b"RISC") || kernel.get(0x38..0x3c) == Some(b"RSC\x05") {
        return architecture("RISC-V");
    }
    match kernel {
        [0x1f, 0x8b, ..] => unknown("it is gzip data: decompress it, or use the bzImage"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => unknown("it is xz data: decompress it, or use the bzImage"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => unknown("it is zstd data: decompress it, or use the bzImage"),
        [b'M', b'Z', ..] if kernel.len() < SETUP_HEADER_END => {
            KernelError::Truncated { bytes: kernel.len() as u64, needed: SETUP_HEADER_END as u64 }
        }
        [b'M', b'Z', ..] => unknown("an EFI program without the x86 boot protocol's header"),
        _ if kernel.len() < SETUP_HEADER_END => {
            KernelError::Truncated { bytes: kernel.len() as u64, needed: SETUP_HEADER_END as u64 }
        }
        _ if kernel.iter().all(|&byte| byte == 0) => unknown("it is all zeroes"),
        _ => unknown("no known header"),
    }
}

fn elf_machine(machine: u16, class: u8, endian: u8) -> String {
    let name = match machine {
        3 => "32-bit x86".to_string(),
        20 => "PowerPC".to_string(),
        21 => "64-bit PowerPC".to_string(),
        22 => "S/390".to_string(),
        40 => "32-bit Arm".to_string(),
        62 if class == 1 => "x32".to_string(),
        183 => "arm64".to_string(),
        243 => "RISC-V".to_string(),
        258 => "LoongArch".to_string(),
        _ => format!("ELF machine {machine}"),
    };
    if endian == 2 { format!("{name} (big-endian)") } else { name }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The smallest thing that passes as a bzImage; tests of other modules use it too.
#[cfg(test)]
pub(crate) fn tiny_bzimage() -> Vec<u8> {
    let mut kernel = vec![0; 1024 + 4096];
    kernel[SETUP_SECTS] = 1;
    kernel[SYSSIZE..SYSSIZE + 4].copy_from_slice(&256u32.to_le_bytes());
    kernel[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
    kernel[PROTOCOL_VERSION..PROTOCOL_VERSION + 2].copy_from_slice(&0x020fu16.to_le_bytes());
    kernel[XLOADFLAGS] = 1;
    kernel
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn elf(machine: u16) -> Vec<u8> {
        let mut kernel = vec![0; 64 + 56 + 16];
        kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
        kernel[18..20].copy_from_slice(&machine.to_le_bytes());
        kernel[32] = 64;
        kernel[54] = 56;
        kernel[56] = 1;
        kernel[64] = 1;
        kernel[64 + 8] = 120;
        kernel[64 + 32] = 16;
        kernel
    }

    #[test]
    fn kernels_are_recognised() {
        assert_eq!(recognise(&tiny_bzimage()), Ok(KernelKind::BzImage));
        assert_eq!(recognise(&elf(62)), Ok(KernelKind::Elf));
    }

    #[test]
    fn other_things_are_named() {
        let architecture = |kernel: &[u8]| match recognise(kernel) {
            Err(KernelError::Architecture { architecture }) => architecture,
            other => panic!("{other:?}"),
        };
        assert_eq!(architecture(&elf(183)), "arm64");
        let mut arm64 = vec![0; 4096];
        arm64[0x38..0x3c].copy_from_slice(b"ARM\x64");
        assert_eq!(architecture(&arm64), "arm64");
        let mut old = tiny_bzimage();
        old[XLOADFLAGS] = 0;
        assert!(architecture(&old).contains("32-bit"));
        assert_eq!(recognise(b""), Err(KernelError::Empty));
        assert!(matches!(recognise(&[0; 4096]), Err(KernelError::Unknown { .. })));
        assert!(matches!(recognise(b"#!/bin/sh"), Err(KernelError::Truncated { .. })));
    }

    #[test]
    fn truncation_is_found_at_every_length() {
        for kernel in [tiny_bzimage(), elf(62)] {
            for len in 0..kernel.len() {
                assert!(recognise(&kernel[..len]).is_err(), "{len} bytes pass");
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..2048), pick in 0..3) {
            match pick {
                0 if bytes.len() > 4 => bytes[..4].copy_from_slice(b"\x7fELF"),
                1 if bytes.len() > 0x206 => bytes[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS"),
                _ => {}
            }
            let _ = recognise(&bytes);
            let _ = release(&bytes);
        }
    }
}
