//! The guest's kernel: where it is, its symbols, its types, its modules. All from its own memory.

use std::ops::Range;

use orrery_cpu::CpuState;
use orrery_devices::GuestMemory;

use super::InspectError;
use super::btf::{BTF_MAX, Btf, BtfError};
use super::kallsyms::{self, SymbolTable};
use super::layout::Layout;
use super::memory::{AddressSpace, ReadError};

/// Where x86-64 Linux maps its image (Documentation/arch/x86/x86_64/mm.rst).
pub const IMAGE_AREA: Range<u64> = 0xFFFF_FFFF_8000_0000..0xFFFF_FFFF_C000_0000;
/// The lowest address of the kernel's half.
pub const KERNEL_HALF: u64 = 0xFFFF_8000_0000_0000;
/// With page-table isolation, the bit in which the user's root table differs from the kernel's.
const ISOLATION_BIT: u64 = 0x1000;
/// Most bytes of the kernel's image that are searched.
const IMAGE_MAX: u64 = 512 << 20;
/// Most modules and most symbols of one.
const MODULES_MAX: usize = 4096;
const MODULE_SYMBOLS_MAX: u64 = 1 << 18;
/// Longest name of a module (MODULE_NAME_LEN).
const MODULE_NAME_MAX: usize = 56;
/// Bytes of an ELF symbol (Elf64_Sym).
const ELF_SYMBOL_BYTES: usize = 24;

/// A loaded module.
#[derive(Clone, Debug)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Address of its `struct module`.
    pub address: u64,
    /// Where its code and data are.
    pub ranges: Vec<Range<u64>>,
    /// Its symbols.
    pub symbols: SymbolTable,
    /// ORC tables: address of the instruction pointers, of the entries, and their number.
    pub orc: Option<(u64, u64, u64)>,
}

/// What does not change while a kernel runs.
#[derive(Debug)]
pub struct Kernel {
    /// Its symbols.
    pub symbols: SymbolTable,
    /// Where the members are that this library looks at.
    pub layout: Result<Layout, BtfError>,
    /// The image, from `_text` to `_end`.
    pub image: Range<u64>,
    /// Executable code: from `_stext` to `_etext`, and init code.
    pub text: Range<u64>,
    /// ORC tables: address of the instruction pointers, one past them, and address of the entries.
    pub orc: Option<(u64, u64, u64)>,
    /// Variables that are looked up often.
    landmarks: Landmarks,
    /// A piece of memory by which the same kernel is recognised again.
    mark: (u64, Vec<u8>),
}

#[derive(Clone, Copy, Debug)]
struct Landmarks {
    init_task: Option<u64>,
    per_cpu_offset: Option<u64>,
    modules: Option<u64>,
    /// Offset of the current task's pointer in the per-CPU area.
    current_task: Option<u64>,
}

/// The page tables through which the kernel sees itself.
pub fn kernel_space<'a>(cpu: &CpuState, memory: &'a GuestMemory) -> AddressSpace<'a> {
    let space = AddressSpace::of(cpu, memory);
    let Some(root) = space.root() else { return space };
    if root & ISOLATION_BIT == 0 {
        return space;
    }
    // The user's half of a pair of tables maps little more of the kernel than its entry points.
    let other = AddressSpace::rooted(memory, root & !ISOLATION_BIT);
    let bytes = |space: &AddressSpace| -> u64 {
        space.mapped_ranges(IMAGE_AREA.start, IMAGE_AREA.end).iter().map(|range| range.end - range.start).sum()
    };
    if bytes(&other) > bytes(&space) { other } else { space }
}

impl Kernel {
    /// Finds the kernel in memory.
    pub fn locate(space: &AddressSpace) -> Result<Kernel, InspectError> {
        if space.root().is_none() {
            return Err(InspectError::NoKernel);
        }
        let mut left = IMAGE_MAX;
        for range in space.mapped_ranges(IMAGE_AREA.start, IMAGE_AREA.end) {
            let len = (range.end - range.start).min(left);
            left -= len;
            let bytes = space.read_up_to(range.start, len as usize);
            if let Some(symbols) = kallsyms::find(&bytes, range.start) {
                return Kernel::from_symbols(space, symbols, &bytes, range.start);
            }
        }
        Err(InspectError::NoKernel)
    }

    fn from_symbols(
        space: &AddressSpace,
        symbols: SymbolTable,
        bytes: &[u8],
        base: u64,
    ) -> Result<Kernel, InspectError> {
        let start = symbols.address("_text").or_else(|| symbols.address("_stext")).unwrap_or(base);
        let end = symbols.address("_end").unwrap_or(base + bytes.len() as u64);
        let text_start = symbols.address("_stext").unwrap_or(start);
        let text_end = symbols.address("_etext").unwrap_or(end);
        let types = find_types(space, &symbols, bytes);
        let layout = match &types {
            Ok(types) => Layout::of(types),
            Err(error) => Err(error.clone()),
        };
        // The banner names the version and the build; code around it would do as well, were it never patched.
        let mark = symbols.address("linux_banner").unwrap_or(start);
        let mark = (mark, space.read_up_to(mark, 256));
        let hot = layout.as_ref().ok().and_then(|layout| layout.pcpu_hot_current);
        let landmarks = Landmarks {
            init_task: symbols.address("init_task"),
            modules: symbols.address("modules"),
            per_cpu_offset: symbols.address("__per_cpu_offset"),
            current_task: symbols
                .address("current_task")
                .or_else(|| Some(symbols.address("pcpu_hot")?.wrapping_add(hot?))),
        };
        let (image, text) = (start..end.max(start), text_start..text_end);
        let orc = || {
            let at = |name: &str| symbols.address(name);
            Some((at("__start_orc_unwind_ip")?, at("__stop_orc_unwind_ip")?, at("__start_orc_unwind")?))
        };
        let orc = orc();
        Ok(Kernel { symbols, layout, image, text, orc, landmarks, mark })
    }

    /// True if this is the kernel in that memory, at the same place.
    pub fn is_in(&self, space: &AddressSpace) -> bool {
        !self.mark.1.is_empty() && space.read_up_to(self.mark.0, self.mark.1.len()) == self.mark.1
    }

    /// Where members are, or why that is not known.
    pub fn layout(&self) -> Result<&Layout, InspectError> {
        self.layout.as_ref().map_err(|error| InspectError::Types(error.clone()))
    }

    /// Address of a variable.
    pub fn variable(&self, name: &'static str) -> Result<u64, InspectError> {
        self.symbols.address(name).ok_or(InspectError::NoSymbol { name })
    }

    /// Address of the `task_struct` of the idle task, the first of the list of tasks.
    pub fn init_task(&self) -> Result<u64, InspectError> {
        self.landmarks.init_task.ok_or(InspectError::NoSymbol { name: "init_task" })
    }

    /// Address of the `task_struct` that runs on the only vCPU.
    pub fn current_task(&self, space: &AddressSpace) -> Result<u64, InspectError> {
        let offset = self.landmarks.current_task.ok_or(InspectError::NoSymbol { name: "current_task" })?;
        let area = match self.landmarks.per_cpu_offset {
            Some(table) => space.u64(table)?,
            None => 0,
        };
        Ok(space.u64(area.wrapping_add(offset))?)
    }

    /// Addresses and names of the modules that are loaded now, the latest first.
    pub fn module_names(&self, space: &AddressSpace) -> Result<Vec<(u64, String)>, InspectError> {
        let Some(places) = &self.layout()?.module else { return Ok(Vec::new()) };
        let head = self.landmarks.modules.ok_or(InspectError::NoSymbol { name: "modules" })?;
        let found = list(space, head, places.list, MODULES_MAX).map_while(Result::ok);
        let name =
            |address: u64| Some((address, space.string(address.wrapping_add(places.name), MODULE_NAME_MAX).ok()?));
        Ok(found.map_while(name).collect())
    }

    /// Those modules. What cannot be read of one is left out.
    pub fn modules(&self, space: &AddressSpace, names: &[(u64, String)]) -> Result<Vec<Module>, InspectError> {
        let Some(places) = &self.layout()?.module else { return Ok(Vec::new()) };
        let mut modules = Vec::new();
        for (address, name) in names {
            let (address, name) = (*address, name.clone());
            modules.push(Module {
                name,
                address,
                ranges: places
                    .memory
                    .iter()
                    .filter_map(|(base, size)| {
                        let start = space.u64(address.wrapping_add(*base)).ok()?;
                        let bytes = space.u32(address.wrapping_add(*size)).ok()?;
                        (start != 0 && bytes != 0).then(|| start..start.saturating_add(u64::from(bytes)))
                    })
                    .collect(),
                symbols: module_symbols(space, address, places).unwrap_or_default(),
                orc: places.orc.and_then(|(count, ips, entries)| {
                    let count = space.u32(address.wrapping_add(count)).ok()?;
                    Some((
                        space.u64(address.wrapping_add(ips)).ok()?,
                        space.u64(address.wrapping_add(entries)).ok()?,
                        u64::from(count),
                    ))
                }),
            });
        }
        Ok(modules)
    }
}

/// The structures of a linked list (`struct list_head` at `offset` in each) behind its head. Ends at the head, at the
/// first link seen twice, after `limit` links, and with an error at the first that cannot be read.
pub fn list<'a>(
    space: &'a AddressSpace<'a>,
    head: u64,
    offset: u64,
    limit: usize,
) -> impl Iterator<Item = Result<u64, ReadError>> + 'a {
    let mut at = head;
    let mut seen = std::collections::BTreeSet::new();
    let mut over = false;
    std::iter::from_fn(move || {
        if over || seen.len() >= limit {
            return None;
        }
        match space.u64(at) {
            Ok(next) if next == head || next == 0 || !seen.insert(next) => None,
            Ok(next) => {
                at = next;
                Some(Ok(next.wrapping_sub(offset)))
            }
            Err(error) => {
                over = true;
                Some(Err(error))
            }
        }
    })
}

/// The type information: between its symbols, or wherever its header is.
fn find_types(space: &AddressSpace, symbols: &SymbolTable, bytes: &[u8]) -> Result<Btf, BtfError> {
    if let (Some(start), Some(stop)) = (symbols.address("__start_BTF"), symbols.address("__stop_BTF")) {
        let len = stop.saturating_sub(start).min(BTF_MAX as u64) as usize;
        return Btf::parse(&space.read_up_to(start, len));
    }
    let header = [0x9F, 0xEB, 1, 0, 24, 0, 0, 0];
    memchr::memmem::find_iter(bytes, &header)
        .take(64)
        .find_map(|at| Btf::extent(&bytes[at..]).and_then(|_| Btf::parse(&bytes[at..]).ok()))
        .ok_or(BtfError::Magic)
}

fn module_symbols(
    space: &AddressSpace,
    module: u64,
    places: &super::layout::ModulePlaces,
) -> Result<SymbolTable, ReadError> {
    let table = space.u64(module.wrapping_add(places.kallsyms))?;
    let symbols = space.u64(table.wrapping_add(places.symbols))?;
    let count = space.u32(table.wrapping_add(places.symbol_count))?;
    let strings = space.u64(table.wrapping_add(places.strings))?;
    let count = u64::from(count).min(MODULE_SYMBOLS_MAX) as usize;
    let bytes = space.read_up_to(symbols, count * ELF_SYMBOL_BYTES);
    let mut result = SymbolTable::default();
    for symbol in bytes.chunks_exact(ELF_SYMBOL_BYTES) {
        let name = u32::from_le_bytes(symbol[..4].try_into().expect("four bytes"));
        let section = u16::from_le_bytes([symbol[6], symbol[7]]);
        let value = u64::from_le_bytes(symbol[8..16].try_into().expect("eight bytes"));
        // Only functions and objects that are in the module (section index not zero); section symbols have no names.
        if section == 0 || !matches!(symbol[4] & 0xF, 0..=2) {
            continue;
        }
        let name = space.string(strings.wrapping_add(u64::from(name)), 256)?;
        if !name.is_empty() && !name.starts_with(".L") {
            let size = u64::from_le_bytes(symbol[16..24].try_into().expect("eight bytes"));
            result.push(value, size, if symbol[4] & 0xF == 2 { b't' } else { b'd' }, &name);
        }
    }
    result.finish();
    Ok(result)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::ram;

    #[test]
    fn lists_end_whatever_they_hold() {
        let memory = ram::create(1 << 20).unwrap();
        let space = AddressSpace::physical(&memory);
        let link = |from: u64, to: u64| memory.write_obj(to, GuestAddress(from)).unwrap();
        let found = |limit| list(&space, 0x1000, 0x10, limit).collect::<Vec<_>>();
        for (from, to) in [(0x1000, 0x2010), (0x2010, 0x3010), (0x3010, 0x1000)] {
            link(from, to);
        }
        assert_eq!(found(100), [Ok(0x2000), Ok(0x3000)]);
        assert_eq!(found(1), [Ok(0x2000)]);
        link(0x3010, 0x2010); // a cycle that does not come back to the head
        assert_eq!(found(100), [Ok(0x2000), Ok(0x3000)]);
        link(0x3010, 0xFFFF_0000); // outside RAM
        let found = found(100);
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(found[3].is_err());
    }
}
