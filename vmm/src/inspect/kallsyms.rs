//! The kernel's own symbol table, found in its memory: Linux keeps the names of its functions and variables
//! compressed in its read-only data (`scripts/kallsyms.c` writes it, `kernel/kallsyms.c` reads it), so that no debug
//! package is needed, and because it is read where the kernel runs, address randomisation is already in it.
//!
//! The table has no magic. What gives it away is its token table, in which the ten digits stand one after the other;
//! everything else has its place around that, in one order up to Linux 6.3 and in another from 6.4 on. Nothing is
//! believed before names, markers and addresses agree with each other.

use memchr::memmem;

/// Most symbols that are believed.
const SYMBOLS_MAX: usize = 4 << 20;
/// Symbols per marker.
const MARKER_STRIDE: usize = 256;
/// Markers that must look right before names are looked for.
const MARKERS_LOOKED_AT: usize = 3;
/// Most bytes between the markers and the token table, and most bytes of names.
const MARKERS_DISTANCE_MAX: usize = 3 * SYMBOLS_MAX + 4 * SYMBOLS_MAX / MARKER_STRIDE;
const NAMES_BYTES_MAX: usize = 64 << 20;
/// Longest symbol name that Linux knows (KSYM_NAME_LEN), in bytes.
const NAME_MAX: usize = 512;
/// Longest name of any symbol that is kept whole, in bytes.
const NAME_BYTES_MAX: usize = 4096;
/// The digits in the token table.
const DIGITS: &[u8] = b"\x000\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";

/// One symbol of the kernel or of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Virtual address; for per-CPU variables the offset in the per-CPU area.
    pub address: u64,
    /// As `nm` prints it: `T`, `t`, `D`, `d`, `A` and so on.
    pub kind: u8,
    /// Bytes that it covers; 0 means up to the next symbol.
    pub size: u32,
    name_start: u32,
    name_len: u16,
}

/// A symbol table.
#[derive(Clone, Debug, Default)]
pub struct SymbolTable {
    /// Ascending by address.
    entries: Vec<Entry>,
    names: String,
}

impl SymbolTable {
    /// Adds a symbol; [`SymbolTable::finish`] must follow the last.
    pub fn push(&mut self, address: u64, size: u64, kind: u8, name: &str) {
        let name = name.get(..NAME_BYTES_MAX).unwrap_or(name);
        let (Ok(name_start), Ok(name_len)) = (u32::try_from(self.names.len()), u16::try_from(name.len())) else {
            return;
        };
        self.names.push_str(name);
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        self.entries.push(Entry { address, kind, size, name_start, name_len });
    }

    /// Puts the symbols in order.
    pub fn finish(&mut self) {
        self.entries.sort_by_key(|entry| entry.address);
    }

    /// Number of symbols.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Every symbol, by address.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The name of an entry of this table.
    pub fn name(&self, entry: &Entry) -> &str {
        let start = entry.name_start as usize;
        self.names.get(start..start + usize::from(entry.name_len)).unwrap_or("")
    }

    /// The symbol that an address belongs to, and one past its last byte.
    pub fn covering(&self, address: u64) -> Option<(&Entry, u64)> {
        let after = self.entries.partition_point(|entry| entry.address <= address);
        let found = self.entries.get(after.checked_sub(1)?)?;
        let next = self.entries.get(after).map_or(u64::MAX, |next| next.address);
        let end = |entry: &Entry| match entry.size {
            0 => next,
            size => entry.address.saturating_add(u64::from(size)),
        };
        // Of several names for one address the first is the one that the kernel prints itself.
        let first = self.entries.partition_point(|entry| entry.address < found.address);
        let mut names = self.entries[first..after].iter();
        names.find(|entry| address < end(entry)).map(|entry| (entry, end(entry)))
    }

    /// Addresses of a name, ascending.
    pub fn addresses<'a>(&'a self, name: &'a str) -> impl Iterator<Item = u64> + 'a {
        self.entries.iter().filter(move |entry| self.name(entry) == name).map(|entry| entry.address)
    }

    /// The one address of a name.
    pub fn address(&self, name: &str) -> Option<u64> {
        self.addresses(name).next()
    }
}

/// Looks for the table in a piece of the kernel's memory that begins at virtual address `base`.
pub fn find(memory: &[u8], base: u64) -> Option<SymbolTable> {
    memmem::find_iter(memory, DIGITS).take(64).find_map(|digits| table_at(memory, base, digits + 1))
}

fn u16_at(memory: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(memory.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(memory: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(memory.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(memory: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(memory.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// The names, compressed.
struct Names<'a> {
    bytes: &'a [u8],
    tokens: &'a [&'a [u8]],
}

impl<'a> Names<'a> {
    /// The record at an offset: its tokens and the offset of the next. Lengths above 127 take two bytes (Linux 6.1).
    fn record(&self, at: usize) -> Option<(&'a [u8], usize)> {
        let first = *self.bytes.get(at)?;
        let (len, start) = if first & 0x80 != 0 {
            (usize::from(first & 0x7F) | usize::from(*self.bytes.get(at + 1)?) << 7, at + 2)
        } else {
            (usize::from(first), at + 1)
        };
        Some((self.bytes.get(start..start + len)?, start + len)).filter(|_| len > 0)
    }

    fn expand(&self, record: &[u8], into: &mut Vec<u8>) -> Option<()> {
        into.clear();
        for token in record {
            into.extend_from_slice(self.tokens[usize::from(*token)]);
            if into.len() > NAME_MAX + 1 {
                return None;
            }
        }
        (into.len() > 1).then_some(())
    }
}

/// Reads the table whose token for "0" is at `zero`.
fn table_at(memory: &[u8], base: u64, zero: usize) -> Option<SymbolTable> {
    // Forward: 208 more tokens, then the index, which says where the first token is.
    let mut at = zero;
    for _ in b'0'..=255 {
        at += memory.get(at..(at + NAME_MAX).min(memory.len()))?.iter().position(|byte| *byte == 0)? + 1;
    }
    let index = at.next_multiple_of(8);
    let tokens_start = zero.checked_sub(usize::from(u16_at(memory, index + 2 * usize::from(b'0'))?))?;
    let mut tokens = Vec::with_capacity(256);
    let mut expected = 0;
    for token in 0..256 {
        let offset = usize::from(u16_at(memory, index + 2 * token)?);
        let rest = memory.get(tokens_start + offset..(tokens_start + offset + NAME_MAX).min(memory.len()))?;
        let len = rest.iter().position(|byte| *byte == 0)?;
        if offset != expected {
            return None;
        }
        expected += len + 1;
        tokens.push(&rest[..len]);
    }
    let index_end = index + 512;

    // Backward: the markers, then the names, then their number. Between markers and tokens there may be another table.
    for markers in (0..=tokens_start & !7).rev().step_by(8).take(MARKERS_DISTANCE_MAX / 8) {
        if !looks_like_markers(memory, markers) {
            continue;
        }
        for place in (0..=markers.saturating_sub(8)).rev().step_by(8).take(NAMES_BYTES_MAX / 8) {
            let Some(count) = count_at(memory, place, markers) else { continue };
            let names = Names { bytes: &memory[place + 8..markers], tokens: &tokens };
            let marker = |number: usize| u32_at(memory, markers + 4 * number).map(|marker| marker as usize);
            let Some(records) = records(&names, count, marker) else { continue };
            let offsets_bytes = (4 * count).next_multiple_of(8);
            // Up to 6.3: offsets, base, number, names, ...; from 6.4 on: ..., token index, offsets, base.
            let old = place.checked_sub(8 + offsets_bytes).map(|offsets| (offsets, place - 8));
            let new = Some((index_end.next_multiple_of(8), index_end.next_multiple_of(8) + offsets_bytes));
            for (offsets, relative_base) in [old, new].into_iter().flatten() {
                if let Some(table) = read_table(memory, base, &names, &records, offsets, relative_base) {
                    return Some(table);
                }
            }
        }
    }
    None
}

/// True if a number is the length of the names between two markers.
fn is_stride(bytes: u32) -> bool {
    (2 * MARKER_STRIDE..=(NAME_MAX + 2) * MARKER_STRIDE).contains(&(bytes as usize))
}

/// True if the markers may begin here: a zero, and then numbers that ascend by what 256 names take.
fn looks_like_markers(memory: &[u8], at: usize) -> bool {
    let stride = |number: usize| {
        let (low, high) = (u32_at(memory, at + 4 * number)?, u32_at(memory, at + 4 * number + 4)?);
        high.checked_sub(low)
    };
    u32_at(memory, at) == Some(0) && (0..MARKERS_LOOKED_AT).all(|number| stride(number).is_some_and(is_stride))
}

/// The number of names that is here, if the last of the markers says that the names end where the markers begin.
fn count_at(memory: &[u8], place: usize, markers: usize) -> Option<usize> {
    let count = u32_at(memory, place)? as usize;
    if !(MARKER_STRIDE * MARKERS_LOOKED_AT..=SYMBOLS_MAX).contains(&count) || u32_at(memory, place + 4)? != 0 {
        return None;
    }
    let last = u32_at(memory, markers + 4 * (count.div_ceil(MARKER_STRIDE) - 1))?;
    let rest = (markers - place - 8).checked_sub(last as usize)?;
    (rest <= MARKER_STRIDE * (NAME_MAX + 2) + 8).then_some(count)
}

/// The records of all names, if they agree with the markers.
fn records<'a>(names: &Names<'a>, count: usize, marker: impl Fn(usize) -> Option<usize>) -> Option<Vec<&'a [u8]>> {
    let mut records = Vec::with_capacity(count);
    let mut at = 0;
    for number in 0..count {
        if number % MARKER_STRIDE == 0 && marker(number / MARKER_STRIDE)? != at {
            return None;
        }
        let (record, next) = names.record(at)?;
        records.push(record);
        at = next;
    }
    Some(records)
}

/// Joins names and addresses, if the addresses are believable.
fn read_table(
    memory: &[u8],
    base: u64,
    names: &Names,
    records: &[&[u8]],
    offsets: usize,
    relative_base: usize,
) -> Option<SymbolTable> {
    let relative_base = u64_at(memory, relative_base)?;
    // The base is `_text`, in the same gibibyte as what has been read.
    if relative_base.abs_diff(base) > 1 << 30 || relative_base % 4096 != 0 {
        return None;
    }
    let offset = |number: usize| u32_at(memory, offsets + 4 * number);
    // With CONFIG_KALLSYMS_ABSOLUTE_PERCPU negative offsets count downwards from the base, and others are absolute.
    let mut negative = 0;
    for number in 0..records.len() {
        negative += usize::from((offset(number)? as i32) < 0);
    }
    let absolute_percpu = negative * 2 > records.len();
    let mut table = SymbolTable::default();
    let mut name = Vec::new();
    for (number, record) in records.iter().enumerate() {
        let offset = offset(number)?;
        let address = match absolute_percpu {
            true if (offset as i32) < 0 => relative_base.wrapping_add(u64::from(!offset)),
            true => u64::from(offset),
            false => relative_base.wrapping_add(u64::from(offset)),
        };
        names.expand(record, &mut name)?;
        table.push(address, 0, name[0], std::str::from_utf8(&name[1..]).ok()?);
    }
    table.finish();
    // `_text` or `_stext` is there, at the base or right behind it.
    let text = table.address("_text").or_else(|| table.address("_stext"))?;
    (text.wrapping_sub(relative_base) <= 2 << 20).then_some(table)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A table as the kernel's build makes it, without compression: one token per character.
    pub fn encode(symbols: &[(u64, &str)], relative_base: u64, new_order: bool, sequence: bool) -> Vec<u8> {
        let pad = |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(8), 0);
        let mut offsets = Vec::new();
        for (address, _) in symbols {
            let offset = if *address < 1 << 20 { *address as u32 } else { !((address - relative_base) as u32) };
            offsets.extend(offset.to_le_bytes());
        }
        pad(&mut offsets);
        offsets.extend(relative_base.to_le_bytes());
        let (mut names, mut markers) = (Vec::new(), Vec::new());
        for (number, (_, name)) in symbols.iter().enumerate() {
            if number % MARKER_STRIDE == 0 {
                markers.extend((names.len() as u32).to_le_bytes());
            }
            let len = name.len() + 1;
            if len > 127 {
                names.extend([0x80 | (len & 0x7F) as u8, (len >> 7) as u8]);
            } else {
                names.push(len as u8);
            }
            names.push(b'T');
            names.extend(name.bytes());
        }
        pad(&mut names);
        pad(&mut markers);
        let (mut tokens, mut index) = (Vec::new(), Vec::new());
        for token in 0..=255u8 {
            index.extend((tokens.len() as u16).to_le_bytes());
            tokens.push(if token == 0 { b'?' } else { token });
            tokens.push(0);
        }
        pad(&mut tokens);
        let mut count = (symbols.len() as u32).to_le_bytes().to_vec();
        pad(&mut count);
        let mut parts = vec![vec![0xCC; 40]];
        if !new_order {
            parts.push(offsets.clone());
        }
        let mut sequences = vec![0x5A; if sequence { 3 * symbols.len() } else { 0 }];
        pad(&mut sequences);
        parts.extend([count, names, markers, sequences, tokens, index]);
        if new_order {
            parts.push(offsets);
        }
        parts.push(vec![0xCC; 40]);
        parts.concat()
    }

    const BASE: u64 = 0xFFFF_FFFF_8100_0000;

    fn sample() -> Vec<(u64, String)> {
        let mut symbols = vec![(0x1000, "percpu_thing".to_string()), (BASE, "_text".to_string())];
        for number in 0..1000 {
            let name = if number == 500 { "x".repeat(300) } else { format!("function_{number}") };
            symbols.push((BASE + 16 + 32 * number, name));
        }
        symbols
    }

    #[test]
    fn tables_of_both_orders_are_found() {
        let symbols = sample();
        let borrowed: Vec<(u64, &str)> = symbols.iter().map(|(address, name)| (*address, name.as_str())).collect();
        for (new_order, sequence) in [(false, false), (false, true), (true, false)] {
            let memory = encode(&borrowed, BASE, new_order, sequence);
            let table = find(&memory, BASE + 0x80_0000).expect("the table is found");
            assert_eq!(table.len(), symbols.len());
            assert_eq!(table.address("percpu_thing"), Some(0x1000));
            assert_eq!(table.address("function_999"), Some(BASE + 16 + 32 * 999));
            assert_eq!(table.address(&"x".repeat(300)), Some(BASE + 16 + 32 * 500));
            let (entry, end) = table.covering(BASE + 16 + 33).unwrap();
            assert_eq!((table.name(entry), end), ("function_1", BASE + 16 + 64));
            assert_eq!(table.covering(5), None);
        }
    }

    #[test]
    fn a_damaged_table_is_not_believed() {
        let symbols = sample();
        let borrowed: Vec<(u64, &str)> = symbols.iter().map(|(address, name)| (*address, name.as_str())).collect();
        let memory = encode(&borrowed, BASE, false, false);
        assert!(find(&memory, 0x1000).is_none(), "an address far from the base");
        assert!(find(&memory[..memory.len() - 300], BASE).is_none(), "cut");
        let text = memmem::find(&memory, b"T_text").unwrap();
        let mut damaged = memory.clone();
        damaged[text - 1] = 200;
        assert!(find(&damaged, BASE).is_none(), "a length");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_memory_makes_it_panic(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            let symbols = sample();
            let borrowed: Vec<(u64, &str)> = symbols.iter().map(|(address, name)| (*address, name.as_str())).collect();
            let mut memory = encode(&borrowed, BASE, false, false);
            for (at, value) in changes {
                let at = at.index(memory.len());
                memory[at] = value;
            }
            let _ = find(&memory, BASE);
        }
    }
}
