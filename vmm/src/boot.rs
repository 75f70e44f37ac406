//! Loading a kernel the way the Linux/x86 64-bit boot protocol asks for it: kernel, initramfs, command line,
//! zero page, identity page tables, GDT (Documentation/arch/x86/boot.rst, sections 1.1 to 1.5).

use std::io::Cursor;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use orrery_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Guest-physical addresses of what is put into memory before power-on, all below 1 MiB.
pub mod address {
    /// Global descriptor table of the boot state.
    pub const GDT: u64 = 0x500;
    /// Top of the boot stack, which kernels replace at once.
    pub const STACK_TOP: u64 = 0x7000;
    /// The zero page (`struct boot_params`).
    pub const ZERO_PAGE: u64 = 0x7000;
    /// PML4; the PDPT and four page directories follow.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// Kernel command line.
    pub const COMMAND_LINE: u64 = 0x2_0000;
    /// First byte that is not conventional memory.
    pub const CONVENTIONAL_END: u64 = 0x9_FC00;
    /// Firmware tables live from here to 1 MiB.
    pub const FIRMWARE: u64 = orrery_devices::layout::ACPI_START;
    /// Kernels are loaded here or higher.
    pub const HIGH_MEMORY: u64 = 0x10_0000;
}

/// Selector of the 64-bit code segment that the boot protocol prescribes.
pub const BOOT_CS: u16 = 0x10;
/// Selector of the data segment that the boot protocol prescribes.
pub const BOOT_DS: u16 = 0x18;
/// Number of bytes of the GDT.
pub const GDT_BYTES: u16 = 32;

/// Longest command line, when the kernel does not say (COMMAND_LINE_SIZE of Linux/x86).
const COMMAND_LINE_MAX: usize = 2048;
/// Bytes of the longest initramfs that is ever accepted.
const INITRAMFS_MAX: u64 = 0x7000_0000;
const ELF_MACHINE_X86_64: u16 = 62;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What to boot.
#[derive(Clone, Copy)]
pub struct Kernel<'a> {
    /// A bzImage or an ELF vmlinux for x86-64.
    pub kernel: &'a [u8],
    /// The initial RAM file system; may be empty.
    pub initramfs: &'a [u8],
    /// The command line, without a terminating zero.
    pub command_line: &'a str,
    /// Address of the ACPI root pointer, already in memory.
    pub rsdp: Option<u64>,
}

/// Where the vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
    /// Address of the zero page, to be in RSI.
    pub zero_page: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Root of the identity page tables.
    pub cr3: u64,
    /// Base of the GDT.
    pub gdt: u64,
}

/// Why an image cannot be booted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// No kernel bytes.
    #[error("the image has no kernel; build it with --kernel")]
    NoKernel,
    /// Neither a bzImage nor ELF.
    #[error("the kernel is neither a bzImage nor an ELF file (it starts with {start:02x?})")]
    NotAKernel {
        /// Up to eight first bytes.
        start: Vec<u8>,
    },
    /// ELF for another processor or word size.
    #[error("the kernel is ELF for machine {machine}, class {class}; an x86-64 kernel is machine 62, class 2")]
    WrongArchitecture {
        /// e_machine.
        machine: u16,
        /// EI_CLASS.
        class: u8,
    },
    /// Too old or 32-bit only.
    #[error("the bzImage (boot protocol {version:#06x}) has no 64-bit entry point; Orrery boots x86-64 kernels only")]
    No64BitEntry {
        /// Boot protocol version.
        version: u16,
    },
    /// The file ends before its own header says.
    #[error("the kernel is truncated: its header promises {expected} bytes and the file has {actual}")]
    Truncated {
        /// Bytes the header promises.
        expected: u64,
        /// Bytes there are.
        actual: u64,
    },
    /// The loader refused it.
    #[error("the kernel cannot be loaded: {reason}")]
    Kernel {
        /// The loader's words.
        reason: String,
    },
    /// The kernel does not fit.
    #[error(
        "the kernel needs memory from {start:#x} to {end:#x} and RAM there ends at {ram_end:#x}; give more --memory"
    )]
    KernelTooLarge {
        /// First byte it occupies.
        start: u64,
        /// One past the last byte it occupies.
        end: u64,
        /// End of low RAM.
        ram_end: u64,
    },
    /// The initramfs does not fit.
    #[error(
        "an initramfs of {bytes} bytes does not fit between the kernel's end {kernel_end:#x} and {top:#x}; give more --memory"
    )]
    InitramfsTooLarge {
        /// Its size.
        bytes: u64,
        /// One past the kernel.
        kernel_end: u64,
        /// Highest address it may occupy, exclusive.
        top: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the command line has {bytes} bytes and this kernel takes {limit}")]
    CommandLineTooLong {
        /// Its size.
        bytes: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// The command line has a zero byte.
    #[error("the command line contains a zero byte")]
    CommandLineZero,
    /// Writing boot structures failed.
    #[error("boot structures do not fit into guest memory: {reason}")]
    Memory {
        /// The memory library's words.
        reason: String,
    },
}

/// Puts everything into memory and says where to start.
pub fn load(memory: &GuestMemory, boot: &Kernel) -> Result<Entry, BootError> {
    if boot.kernel.is_empty() {
        return Err(BootError::NoKernel);
    }
    let loaded = if boot.kernel.starts_with(b"\x7fELF") {
        load_elf(memory, boot.kernel)?
    } else {
        load_bzimage(memory, boot.kernel)?
    };
    let limit = match loaded.header {
        Some(header) if header.cmdline_size > 0 => (header.cmdline_size as usize).min(COMMAND_LINE_MAX * 8),
        _ => COMMAND_LINE_MAX - 1,
    };
    let line = boot.command_line.as_bytes();
    if line.len() > limit {
        return Err(BootError::CommandLineTooLong { bytes: line.len(), limit });
    }
    if line.contains(&0) {
        return Err(BootError::CommandLineZero);
    }
    write(memory, address::COMMAND_LINE, line)?;
    write(memory, address::COMMAND_LINE + line.len() as u64, &[0])?;

    let initramfs = place_initramfs(memory, boot.initramfs, &loaded)?;
    let zero_page = zero_page(memory, boot, &loaded, initramfs);
    memory.write_obj(zero_page, GuestAddress(address::ZERO_PAGE)).map_err(memory_error)?;
    write_page_tables(memory)?;
    write_gdt(memory)?;
    Ok(Entry {
        rip: loaded.entry,
        zero_page: address::ZERO_PAGE,
        rsp: address::STACK_TOP,
        cr3: address::PAGE_TABLES,
        gdt: address::GDT,
    })
}

/// A kernel in memory.
struct Loaded {
    entry: u64,
    /// One past the last byte it occupies or will unpack itself to.
    end: u64,
    header: Option<setup_header>,
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.get(..N)?.try_into().ok()
}

fn load_bzimage(memory: &GuestMemory, kernel: &[u8]) -> Result<Loaded, BootError> {
    // Offsets in the setup header: boot.rst, "The real-mode kernel header".
    if field::<4>(kernel, 0x202) != Some(*b"HdrS") {
        return Err(BootError::NotAKernel { start: kernel[..kernel.len().min(8)].to_vec() });
    }
    let truncated = |expected: u64| BootError::Truncated { expected, actual: kernel.len() as u64 };
    let short = || truncated(0x268);
    let version = u16::from_le_bytes(field(kernel, 0x206).ok_or_else(short)?);
    let xloadflags = u16::from_le_bytes(field(kernel, 0x236).ok_or_else(short)?);
    let init_size = u32::from_le_bytes(field(kernel, 0x260).ok_or_else(short)?);
    let preferred = u64::from_le_bytes(field(kernel, 0x258).ok_or_else(short)?);
    if version < 0x20C || xloadflags & 1 == 0 {
        return Err(BootError::No64BitEntry { version });
    }
    let setup_sectors = match kernel[0x1F1] {
        0 => 4,
        n => u64::from(n),
    };
    // syssize counts paragraphs of 16 bytes of the protected-mode part.
    let system_bytes = u64::from(u32::from_le_bytes(field(kernel, 0x1F4).ok_or_else(short)?)) * 16;
    let expected = (setup_sectors + 1) * 512 + system_bytes;
    // The file may be padded, and the last paragraph may be cut.
    if (kernel.len() as u64) + 15 < expected || system_bytes < 0x400 {
        return Err(truncated(expected.max(0x800)));
    }
    let start = address::HIGH_MEMORY;
    let unpacked_end = preferred.max(start).saturating_add(u64::from(init_size));
    let end = unpacked_end.max(start + system_bytes + 4096);
    check_fits(memory, start, end)?;
    let result = BzImage::load(memory, Some(GuestAddress(start)), &mut Cursor::new(kernel), None)
        .map_err(|e| BootError::Kernel { reason: e.to_string() })?;
    // The 64-bit entry point is 0x200 bytes into the protected-mode part.
    Ok(Loaded { entry: start + 0x200, end, header: result.setup_header })
}

fn load_elf(memory: &GuestMemory, kernel: &[u8]) -> Result<Loaded, BootError> {
    let short = || BootError::Truncated { expected: 64, actual: kernel.len() as u64 };
    let class = field::<1>(kernel, 4).ok_or_else(short)?[0];
    let machine = u16::from_le_bytes(field(kernel, 18).ok_or_else(short)?);
    if machine != ELF_MACHINE_X86_64 || class != 2 {
        return Err(BootError::WrongArchitecture { machine, class });
    }
    let entry = u64::from_le_bytes(field(kernel, 24).ok_or_else(short)?);
    let table = u64::from_le_bytes(field(kernel, 32).ok_or_else(short)?);
    let entry_bytes = u64::from(u16::from_le_bytes(field(kernel, 54).ok_or_else(short)?));
    let count = u64::from(u16::from_le_bytes(field(kernel, 56).ok_or_else(short)?));
    let actual = kernel.len() as u64;
    let (mut end, mut entry_inside) = (0, false);
    for index in 0..count {
        let at = table.saturating_add(index * entry_bytes);
        let Some(header) = usize::try_from(at).ok().and_then(|at| field::<56>(kernel, at)) else {
            return Err(BootError::Truncated { expected: at.saturating_add(56), actual });
        };
        let word = |offset: usize| u64::from_le_bytes(header[offset..offset + 8].try_into().expect("eight bytes"));
        if u32::from_le_bytes(header[..4].try_into().expect("four bytes")) != 1 {
            continue;
        }
        let (offset, paddr, file_bytes, memory_bytes) = (word(8), word(24), word(32), word(40));
        if offset.saturating_add(file_bytes) > actual {
            return Err(BootError::Truncated { expected: offset.saturating_add(file_bytes), actual });
        }
        if memory_bytes == 0 {
            continue;
        }
        let segment_end = paddr.saturating_add(memory_bytes.max(file_bytes));
        check_fits(memory, paddr, segment_end)?;
        end = end.max(segment_end);
        entry_inside |= (paddr..segment_end).contains(&entry);
    }
    if !entry_inside {
        return Err(BootError::Kernel { reason: format!("its entry point {entry:#x} is in none of its segments") });
    }
    Elf::load(memory, None, &mut Cursor::new(kernel), Some(GuestAddress(address::HIGH_MEMORY)))
        .map_err(|e| BootError::Kernel { reason: e.to_string() })?;
    Ok(Loaded { entry, end, header: None })
}

fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory.iter().next().map_or(0, |region| region.len())
}

fn check_fits(memory: &GuestMemory, start: u64, end: u64) -> Result<(), BootError> {
    let ram_end = low_ram_end(memory);
    if start < address::HIGH_MEMORY || end > ram_end || start >= end {
        return Err(BootError::KernelTooLarge { start, end, ram_end });
    }
    Ok(())
}

/// Puts the initramfs as high as the kernel accepts; returns its address.
fn place_initramfs(memory: &GuestMemory, initramfs: &[u8], loaded: &Loaded) -> Result<u64, BootError> {
    if initramfs.is_empty() {
        return Ok(0);
    }
    let highest = match loaded.header {
        Some(header) if header.initrd_addr_max > 0 => u64::from(header.initrd_addr_max) + 1,
        _ => 0x8000_0000,
    };
    let top = low_ram_end(memory).min(highest);
    let bytes = initramfs.len() as u64;
    let kernel_end = loaded.end.next_multiple_of(4096);
    let too_large = BootError::InitramfsTooLarge { bytes, kernel_end, top };
    if bytes > INITRAMFS_MAX {
        return Err(too_large);
    }
    let Some(start) = top.checked_sub(bytes).map(|start| start & !0xFFF).filter(|start| *start >= kernel_end) else {
        return Err(too_large);
    };
    write(memory, start, initramfs)?;
    Ok(start)
}

fn zero_page(memory: &GuestMemory, boot: &Kernel, loaded: &Loaded, initramfs: u64) -> boot_params {
    let mut params = boot_params { hdr: loaded.header.unwrap_or_default(), ..Default::default() };
    params.hdr.type_of_loader = 0xFF;
    params.hdr.boot_flag = 0xAA55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.cmd_line_ptr = address::COMMAND_LINE as u32;
    params.hdr.cmdline_size = boot.command_line.len() as u32;
    params.hdr.kernel_alignment = params.hdr.kernel_alignment.max(0x100_0000);
    params.hdr.ramdisk_image = initramfs as u32;
    params.hdr.ramdisk_size = boot.initramfs.len() as u32;
    params.acpi_rsdp_addr = boot.rsdp.unwrap_or(0);
    let mut entries = vec![
        (0, address::CONVENTIONAL_END, E820_RAM),
        (address::FIRMWARE, address::HIGH_MEMORY - address::FIRMWARE, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(address::HIGH_MEMORY);
        entries.push((start, region.start_addr().0 + region.len() - start, E820_RAM));
    }
    params.e820_entries = entries.len() as u8;
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(entries) {
        *slot = boot_e820_entry { addr, size, r#type: kind };
    }
    params
}

/// Maps the first 4 GiB one to one with pages of 2 MiB (Intel SDM volume 3, section 4.5).
fn write_page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let (pml4, pdpt) = (address::PAGE_TABLES, address::PAGE_TABLES + 0x1000);
    write(memory, pml4, &(pdpt | PRESENT_WRITABLE).to_le_bytes())?;
    for gib in 0..4u64 {
        let directory = pdpt + 0x1000 * (gib + 1);
        write(memory, pdpt + 8 * gib, &(directory | PRESENT_WRITABLE).to_le_bytes())?;
        for page in 0..512u64 {
            let entry = (gib << 30) | (page << 21) | LARGE | PRESENT_WRITABLE;
            write(memory, directory + 8 * page, &entry.to_le_bytes())?;
        }
    }
    Ok(())
}

/// Flat code and data segments at [`BOOT_CS`] and [`BOOT_DS`].
fn write_gdt(memory: &GuestMemory) -> Result<(), BootError> {
    const CODE_64: u64 = 0x00AF_9B00_0000_FFFF;
    const DATA: u64 = 0x00CF_9300_0000_FFFF;
    for (index, descriptor) in [0, 0, CODE_64, DATA].into_iter().enumerate() {
        write(memory, address::GDT + 8 * index as u64, &u64::to_le_bytes(descriptor))?;
    }
    Ok(())
}

fn write(memory: &GuestMemory, gpa: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(gpa)).map_err(memory_error)
}

fn memory_error(error: vm_memory::GuestMemoryError) -> BootError {
    BootError::Memory { reason: error.to_string() }
}
