//! Address translation: the walk of 4-level page tables (Intel SDM volume 3, section 4.5), access rights (4.6),
//! page-fault error codes (4.7), accessed and dirty flags (4.8).

use crate::exception::Exception;
use crate::memory::PhysMemory;
use crate::state::{CpuState, control, rflags};

/// Bits of a guest-physical address (MAXPHYADDR).
pub const PHYSICAL_ADDRESS_BITS: u32 = 46;
/// Bits of a linear address.
pub const LINEAR_ADDRESS_BITS: u32 = 48;
/// All valid bits of a guest-physical address.
pub const PHYSICAL_ADDRESS_MASK: u64 = (1 << PHYSICAL_ADDRESS_BITS) - 1;

/// Bits of a paging-structure entry.
pub mod entry {
    #![allow(missing_docs)]
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const ACCESSED: u64 = 1 << 5;
    pub const DIRTY: u64 = 1 << 6;
    pub const PAGE_SIZE: u64 = 1 << 7;
    pub const NO_EXECUTE: u64 = 1 << 63;
}

/// Bits of a page fault's error code.
pub mod fault {
    #![allow(missing_docs)]
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

/// True if bits 63:47 of a linear address are equal.
#[inline]
pub fn is_canonical(linear: u64) -> bool {
    ((linear as i64) << 16 >> 16) as u64 == linear
}

/// What an access wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// It writes (or reads and then writes).
    pub write: bool,
    /// It fetches an instruction.
    pub fetch: bool,
    /// It is a user-mode access: CPL 3 and not to a descriptor table or TSS.
    pub user: bool,
    /// SMAP is in force for it: it is an implicit supervisor access, or RFLAGS.AC is clear. Has a meaning only if
    /// `user` is false, and then only together with CR4.SMAP.
    pub smap_active: bool,
}

impl Access {
    /// A data access by the current instruction.
    #[inline]
    pub fn data(state: &CpuState, write: bool) -> Access {
        Access { write, fetch: false, user: state.cpl == 3, smap_active: state.rflags & rflags::AC == 0 }
    }

    /// An implicit supervisor access: descriptor tables, TSS, frames of exceptions.
    #[inline]
    pub fn supervisor(write: bool) -> Access {
        Access { write, fetch: false, user: false, smap_active: true }
    }

    /// An instruction fetch.
    #[inline]
    pub fn fetch(state: &CpuState) -> Access {
        Access { write: false, fetch: true, user: state.cpl == 3, smap_active: false }
    }
}

/// A successful walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address of the byte.
    pub gpa: u64,
    /// Size of the page that maps it, in bytes: 4 KiB, 2 MiB or 1 GiB (4 KiB without paging).
    pub page_size: u64,
    /// A write with the same privilege would be permitted.
    pub writable: bool,
    /// The page's dirty flag is set, by this walk or before it. Caches must walk again before the first write
    /// to a page that is writable but not dirty.
    pub dirty: bool,
    /// A user-mode page.
    pub user: bool,
    /// Instruction fetches with the same privilege are permitted.
    pub executable: bool,
    /// Guest-physical addresses of the entries used, root first; `levels` of them are valid.
    pub table_entries: [u64; 4],
    /// Number of paging-structure entries used; 0 without paging.
    pub levels: u8,
    /// Bit i is set if this walk wrote accessed or dirty flags to `table_entries[i]`: those bytes of RAM changed.
    pub updated: u8,
}

/// Translates `linear` for `access`, setting accessed and dirty flags if, and only if, the access is permitted.
///
/// Without paging the translation is the identity. `linear` must be canonical (the caller has raised #GP or #SS
/// otherwise). Errors: #PF with its error code. A paging structure outside RAM reads as all ones, which sets
/// reserved bits.
pub fn walk(state: &CpuState, memory: &PhysMemory, linear: u64, access: Access) -> Result<Translation, Exception> {
    if state.cr0 & control::CR0_PG == 0 {
        return Ok(Translation {
            gpa: linear & 0xFFFF_FFFF,
            page_size: 4096,
            writable: true,
            dirty: true,
            user: true,
            executable: true,
            table_entries: [0; 4],
            levels: 0,
            updated: 0,
        });
    }
    let nxe = state.efer & control::EFER_NXE != 0;
    let fail = |flags: u32| {
        let mut error = flags;
        if access.write {
            error |= fault::WRITE;
        }
        if access.user {
            error |= fault::USER;
        }
        if access.fetch && (nxe || state.cr4 & control::CR4_SMEP != 0) {
            error |= fault::FETCH;
        }
        Exception::PageFault { address: linear, error }
    };
    let reserved_high = !PHYSICAL_ADDRESS_MASK & 0x000F_FFFF_FFFF_FFFF | if nxe { 0 } else { entry::NO_EXECUTE };

    let mut table = state.cr3 & PHYSICAL_ADDRESS_MASK & !0xFFF;
    let mut addresses = [0u64; 4];
    let mut entries = [0u64; 4];
    let mut levels = 0usize;
    let mut rights = entry::WRITE | entry::USER;
    let mut no_execute = false;
    let mut shift = 39;
    let (leaf, page_size) = loop {
        let address = table | (linear >> shift & 0x1FF) << 3;
        let value = memory.read_u64(address).unwrap_or(u64::MAX);
        if value & entry::PRESENT == 0 {
            return Err(fail(0));
        }
        let is_leaf = shift == 12 || (shift < 39 && value & entry::PAGE_SIZE != 0);
        let reserved_low = match shift {
            39 => entry::PAGE_SIZE,
            30 if is_leaf => 0x3FFF_E000,
            21 if is_leaf => 0x001F_E000,
            _ => 0,
        };
        if value & (reserved_high | reserved_low) != 0 {
            return Err(fail(fault::PRESENT | fault::RESERVED));
        }
        addresses[levels] = address;
        entries[levels] = value;
        levels += 1;
        rights &= value;
        no_execute |= value & entry::NO_EXECUTE != 0;
        if is_leaf {
            break (value, 1u64 << shift);
        }
        table = value & PHYSICAL_ADDRESS_MASK & !0xFFF;
        shift -= 9;
    };

    let user_page = rights & entry::USER != 0;
    let write_right = rights & entry::WRITE != 0;
    let writable = write_right || (!access.user && state.cr0 & control::CR0_WP == 0);
    let smep = !access.user && user_page && state.cr4 & control::CR4_SMEP != 0;
    let executable = !no_execute && !smep && (user_page || !access.user);
    let smap = !access.user && user_page && access.smap_active && state.cr4 & control::CR4_SMAP != 0;
    let permitted =
        if access.fetch { executable } else { (user_page || !access.user) && !smap && (!access.write || writable) };
    if !permitted {
        return Err(fail(fault::PRESENT));
    }

    let mut updated = 0u8;
    for level in 0..levels {
        let mut flags = entry::ACCESSED;
        if access.write && level + 1 == levels {
            flags |= entry::DIRTY;
        }
        // The entry was read from RAM just now (all ones has every flag set), so the write cannot miss.
        if entries[level] & flags != flags && memory.write_u64(addresses[level], entries[level] | flags).is_some() {
            updated |= 1 << level;
        }
    }
    let offset = page_size - 1;
    Ok(Translation {
        gpa: leaf & PHYSICAL_ADDRESS_MASK & !0xFFF & !offset | linear & offset,
        page_size,
        writable,
        dirty: access.write || leaf & entry::DIRTY != 0,
        user: user_page,
        executable,
        table_entries: addresses,
        levels: levels as u8,
        updated,
    })
}
