//! Address translation once more, from the manual alone (Intel SDM volume 3, sections 4.5 to 4.8) and without
//! thought for speed: no code is shared with `orrery_cpu::paging`, which it judges.

/// RAM as plain bytes.
pub type Ram = Vec<u8>;

/// Bits of a guest-physical address.
const PHYSICAL_BITS: u32 = 46;

/// What decides about an access besides the tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// CR3.
    pub cr3: u64,
    /// CR0.WP.
    pub write_protect: bool,
    /// EFER.NXE.
    pub no_execute: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP, and RFLAGS.AC is clear.
    pub smap: bool,
    /// CPL 3.
    pub user: bool,
}

/// What is done with the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Load.
    Read,
    /// Store, or load and store.
    Write,
    /// Instruction fetch.
    Fetch,
}

fn bit(value: u64, n: u32) -> bool {
    value >> n & 1 == 1
}

fn load(ram: &Ram, gpa: u64) -> u64 {
    // What is not RAM reads as ones.
    let at = usize::try_from(gpa).unwrap_or(usize::MAX);
    match at.checked_add(8).and_then(|end| ram.get(at..end)) {
        Some(bytes) => bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)),
        None => !0,
    }
}

/// Translates one linear address and sets accessed and dirty flags, or gives the error code of the page fault.
pub fn translate(ram: &mut Ram, rules: Rules, linear: u64, kind: Kind) -> Result<u64, u32> {
    let write = kind == Kind::Write;
    let fetch = kind == Kind::Fetch;
    let error = |present: bool, reserved: bool| {
        let id = fetch && (rules.no_execute || rules.smep);
        u32::from(present)
            | u32::from(write) << 1
            | u32::from(rules.user) << 2
            | u32::from(reserved) << 3
            | u32::from(id) << 4
    };
    let mut path: Vec<(u64, u64)> = Vec::new();
    let mut table = rules.cr3 >> 12 & ((1 << (PHYSICAL_BITS - 12)) - 1);
    // Levels 4 (PML4) down to 1 (page table).
    let mut level = 4;
    let page_bits = loop {
        let index = linear >> (12 + 9 * (level - 1)) & 511;
        let address = (table << 12) + 8 * index;
        let value = load(ram, address);
        if !bit(value, 0) {
            return Err(error(false, false));
        }
        let leaf = level == 1 || (level < 4 && bit(value, 7));
        let mut reserved = (PHYSICAL_BITS..52).any(|n| bit(value, n));
        reserved |= bit(value, 63) && !rules.no_execute;
        reserved |= level == 4 && bit(value, 7);
        reserved |= leaf && level == 2 && (13..21).any(|n| bit(value, n));
        reserved |= leaf && level == 3 && (13..30).any(|n| bit(value, n));
        if reserved {
            return Err(error(true, true));
        }
        path.push((address, value));
        if leaf {
            break 12 + 9 * (level - 1);
        }
        table = value >> 12 & ((1 << (PHYSICAL_BITS - 12)) - 1);
        level -= 1;
    };
    let all = |n: u32| path.iter().all(|(_, value)| bit(*value, n));
    let user_page = all(2);
    let writable = all(1);
    let executable = !path.iter().any(|(_, value)| bit(*value, 63));
    let allowed = match (rules.user, kind) {
        (true, Kind::Read) => user_page,
        (true, Kind::Write) => user_page && writable,
        (true, Kind::Fetch) => user_page && executable,
        (false, Kind::Read) => !(user_page && rules.smap),
        (false, Kind::Write) => !(user_page && rules.smap) && (writable || !rules.write_protect),
        (false, Kind::Fetch) => executable && !(user_page && rules.smep),
    };
    if !allowed {
        return Err(error(true, false));
    }
    let leaf = path.len() - 1;
    for (n, (address, value)) in path.iter().enumerate() {
        let flags = if n == leaf && write { 0x60u8 } else { 0x20 };
        let at = usize::try_from(*address).unwrap_or(usize::MAX);
        // Byte 0 holds both flags. What is not RAM has them set already.
        if let Some(byte) = ram.get_mut(at) {
            *byte |= flags;
        }
        let _ = value;
    }
    let mask = (1u64 << page_bits) - 1;
    let frame = path[leaf].1 & ((1 << PHYSICAL_BITS) - 1) & !mask;
    Ok(frame | linear & mask)
}
