//! A program or library of the guest: symbols, unwind tables and line numbers, from its ELF file. The file is the
//! guest's and may hold anything.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use gimli::{EndianArcSlice, LittleEndian};
use object::{Object as _, ObjectSection, ObjectSegment, ObjectSymbol, SymbolKind};
use serde::Serialize;

use super::go::GoTable;
use super::kallsyms::SymbolTable;

type Slice = EndianArcSlice<LittleEndian>;

/// Offsets of mappings are multiples of it.
const PAGE_BYTES: u64 = 4096;

/// A place in a program's source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SourceLine {
    /// The file, as the compiler named it.
    pub file: String,
    /// The line, from 1.
    pub line: u32,
}

impl std::fmt::Display for SourceLine {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// A part of the file that is mapped.
#[derive(Clone, Copy, Debug)]
struct Segment {
    offset: u64,
    address: u64,
    bytes: u64,
    /// Bytes in memory: behind those of the file come zeros, where `.bss` is.
    memory: u64,
}

/// What is known of one ELF file. Addresses are the file's own.
pub struct Object {
    segments: Vec<Segment>,
    symbols: SymbolTable,
    /// `.eh_frame_hdr` and `.eh_frame`, with their addresses.
    pub(super) unwind: Option<UnwindTables>,
    /// Go's own tables.
    pub(super) go: Option<GoTable>,
    lines: Mutex<Lines>,
}

/// Sections with unwind information.
pub(super) struct UnwindTables {
    pub header: Option<(u64, Vec<u8>)>,
    pub frames: (u64, Vec<u8>),
    pub text: u64,
}

/// Line numbers, read when they are first asked for.
enum Lines {
    Unread(Vec<(&'static str, Arc<[u8]>)>),
    Read(Option<Box<addr2line::Context<Slice>>>),
}

impl Object {
    /// Reads an ELF file; None if it is none that can be read.
    pub fn parse(bytes: &[u8]) -> Option<Object> {
        let file = object::File::parse(bytes).ok()?;
        let segments = file
            .segments()
            .map(|segment| {
                let (offset, bytes) = segment.file_range();
                Segment { offset, address: segment.address(), bytes, memory: segment.size() }
            })
            .collect();
        let mut symbols = SymbolTable::default();
        for symbol in file.symbols().chain(file.dynamic_symbols()) {
            let code_or_data = matches!(symbol.kind(), SymbolKind::Text | SymbolKind::Data | SymbolKind::Unknown);
            if symbol.is_undefined() || !code_or_data {
                continue;
            }
            if let Ok(name) = symbol.name()
                && !name.is_empty()
            {
                let kind = if symbol.kind() == SymbolKind::Data { b'd' } else { b't' };
                symbols.push(symbol.address(), symbol.size(), kind, name);
            }
        }
        let section = |name: &str| -> Option<(u64, Vec<u8>)> {
            let section = file.section_by_name(name)?;
            Some((section.address(), section.uncompressed_data().ok()?.into_owned()))
        };
        let text = section_address(&file, ".text");
        let go = section(".gopclntab")
            .or_else(|| section(".data.rel.ro.gopclntab"))
            .and_then(|(_, table)| GoTable::parse(table, text.unwrap_or(0)));
        if let Some(go) = &go
            && symbols.is_empty()
        {
            go.functions(|start, size, name| symbols.push(start, size, b't', name));
        }
        symbols.finish();
        let unwind = section(".eh_frame").map(|frames| UnwindTables {
            header: section(".eh_frame_hdr"),
            frames,
            text: text.unwrap_or(0),
        });
        let lines = gimli_sections().into_iter().filter_map(|name| Some((name, section(name)?.1.into())));
        let lines = Mutex::new(Lines::Unread(lines.collect()));
        Some(Object { segments, symbols, unwind, go, lines })
    }

    /// The file's own address of a place in the file.
    pub fn address_of_offset(&self, offset: u64) -> Option<u64> {
        self.segments.iter().find_map(|segment| {
            let inside = offset.checked_sub(segment.offset)?;
            (inside < segment.bytes).then(|| segment.address.wrapping_add(inside))
        })
    }

    /// What is to be added to the file's own addresses in a process where these are mapped: (offset in the file, address).
    /// None without the beginning of the file's first segment.
    pub fn bias(&self, mappings: impl IntoIterator<Item = (u64, u64)>) -> Option<u64> {
        let first = self.segments.iter().min_by_key(|segment| segment.address)?;
        let inside = |offset: u64| first.offset.checked_sub(offset).filter(|inside| *inside < PAGE_BYTES);
        let found = mappings.into_iter().find_map(|(offset, address)| Some(address.wrapping_add(inside(offset)?)));
        Some(found?.wrapping_sub(first.address))
    }

    /// One of its segments has that address, in the file or behind what the file has of it.
    pub fn has_address(&self, address: u64) -> bool {
        self.segments.iter().any(|segment| address.wrapping_sub(segment.address) < segment.memory)
    }

    /// The symbol at one of the file's addresses: its name and range.
    pub fn symbol(&self, address: u64) -> Option<(&str, Range<u64>)> {
        let (entry, end) = self.symbols.covering(address)?;
        Some((self.symbols.name(entry), entry.address..end))
    }

    /// The file's addresses of a name, as it is in the file or as people write it.
    pub fn lookup(&self, name: &str) -> Vec<u64> {
        let matches =
            |raw: &str| raw == name || (raw.starts_with("_Z") || raw.starts_with("_R")) && demangle(raw) == name;
        let entries = self.symbols.entries().iter().filter(|entry| matches(self.symbols.name(entry)));
        let mut found: Vec<u64> = entries.map(|entry| entry.address).collect();
        found.dedup();
        found
    }

    /// The source line of one of the file's addresses, where the file has line numbers.
    pub fn line(&self, address: u64) -> Option<SourceLine> {
        if let Some(go) = &self.go
            && let Some(line) = go.line(address)
        {
            return Some(line);
        }
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Lines::Unread(sections) = &*lines {
            *lines = Lines::Read(context(sections).map(Box::new));
        }
        let Lines::Read(Some(context)) = &*lines else { return None };
        let location = context.find_location(address).ok()??;
        Some(SourceLine { file: location.file?.to_owned(), line: location.line? })
    }
}

fn section_address(file: &object::File, name: &str) -> Option<u64> {
    file.section_by_name(name).map(|section| section.address())
}

fn gimli_sections() -> [&'static str; 10] {
    [
        ".debug_abbrev",
        ".debug_addr",
        ".debug_aranges",
        ".debug_info",
        ".debug_line",
        ".debug_line_str",
        ".debug_ranges",
        ".debug_rnglists",
        ".debug_str",
        ".debug_str_offsets",
    ]
}

fn context(sections: &[(&'static str, Arc<[u8]>)]) -> Option<addr2line::Context<Slice>> {
    if sections.is_empty() {
        return None;
    }
    let load = |id: gimli::SectionId| -> Result<Slice, gimli::Error> {
        let bytes = sections.iter().find(|(name, _)| *name == id.name()).map(|(_, bytes)| bytes.clone());
        Ok(EndianArcSlice::new(bytes.unwrap_or_else(|| Arc::from([])), LittleEndian))
    };
    addr2line::Context::from_dwarf(gimli::Dwarf::load(load).ok()?).ok()
}

/// A symbol's name as people write it: Rust's and C++'s encodings undone.
pub fn demangle(name: &str) -> String {
    if let Ok(rust) = rustc_demangle::try_demangle(name) {
        return format!("{rust:#}");
    }
    if name.starts_with("_Z")
        && name.len() < 4096
        && let Ok(symbol) = cpp_demangle::Symbol::new(name)
        && let Ok(text) = symbol.demangle()
    {
        return text;
    }
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// In `.data`, and in `.bss`, which is not in the file.
    static WITH_VALUE: AtomicU64 = AtomicU64::new(5);
    static WITHOUT_VALUE: [AtomicU64; 4096] = [const { AtomicU64::new(0) }; 4096];

    #[test]
    fn variables_are_where_the_kernel_has_mapped_them() {
        WITH_VALUE.fetch_add(WITHOUT_VALUE[4095].fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        let path = std::env::current_exe().unwrap();
        let object = Object::parse(&std::fs::read(&path).unwrap()).expect("this program");
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let own = maps.lines().filter(|line| line.ends_with(path.to_str().unwrap()));
        let mappings = own.map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            (hex(words[2]), hex(words[0].split_once('-').unwrap().0))
        });
        let bias = object.bias(mappings).expect("its first segment is mapped");
        let module = module_path!();
        for (name, address) in
            [("WITH_VALUE", &raw const WITH_VALUE as u64), ("WITHOUT_VALUE", &raw const WITHOUT_VALUE as u64)]
        {
            let own = address.wrapping_sub(bias);
            assert_eq!(object.lookup(&format!("{module}::{name}")), [own], "{name}");
            assert!(object.has_address(own) && object.symbol(own).is_some());
        }
        assert_eq!(object.bias([(1 << 40, 0)]), None);
        assert!(!object.has_address(u64::MAX));
    }
}
