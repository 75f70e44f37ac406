//! Go's own tables (`runtime/symtab.go`, `cmd/internal/obj/pcln.go`): every Go program carries the names of its
//! functions, the lines of its code and the sizes of its stack frames, even if it was stripped. Read here as Go 1.18
//! and later write them.

use super::object::SourceLine;

/// Magic numbers of Go 1.18 and of Go 1.20.
const MAGICS: [u32; 2] = [0xFFFF_FFF0, 0xFFFF_FFF1];
/// Most functions that are believed.
const FUNCTIONS_MAX: u64 = 4 << 20;
/// Longest name.
const NAME_MAX: usize = 4096;

/// The table of one program. Addresses are those of the program's file.
pub struct GoTable {
    bytes: Vec<u8>,
    functions: usize,
    text: u64,
    names: usize,
    compile_units: usize,
    files: usize,
    /// Tables of values by program counter.
    values: usize,
    /// Table of functions.
    table: usize,
    /// Smallest step of the program counter, in bytes.
    quantum: u64,
}

/// A function's record.
struct Function {
    /// First address.
    entry: u64,
    /// Where its record is in the table.
    record: usize,
}

impl GoTable {
    /// Reads a `.gopclntab` section of a program whose code begins at `text`.
    pub fn parse(bytes: Vec<u8>, text: u64) -> Option<GoTable> {
        let word = |number: usize| {
            let at = 8 + 8 * number;
            Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
        };
        let magic = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?);
        if bytes.len() < 72 || !MAGICS.contains(&magic) || bytes[6] == 0 || bytes[7] != 8 || word(0)? > FUNCTIONS_MAX {
            return None;
        }
        let offset = |number: usize| usize::try_from(word(number)?).ok().filter(|offset| *offset <= bytes.len());
        // In position-independent programs the start of the code is filled in when the program is loaded.
        let declared = word(2)?;
        Some(GoTable {
            functions: word(0)? as usize,
            text: if declared != 0 { declared } else { text },
            names: offset(3)?,
            compile_units: offset(4)?,
            files: offset(5)?,
            values: offset(6)?,
            table: offset(7)?,
            quantum: u64::from(bytes[6]),
            bytes,
        })
    }

    fn u32(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
    }

    fn string(&self, at: usize) -> Option<&str> {
        let rest = self.bytes.get(at..)?;
        let rest = &rest[..rest.len().min(NAME_MAX)];
        std::str::from_utf8(&rest[..rest.iter().position(|byte| *byte == 0)?]).ok()
    }

    fn entry(&self, number: usize) -> Option<u64> {
        Some(self.text.wrapping_add(u64::from(self.u32(self.table + 8 * number)?)))
    }

    fn function(&self, number: usize) -> Option<Function> {
        let record = self.table.checked_add(self.u32(self.table + 8 * number + 4)? as usize)?;
        Some(Function { entry: self.entry(number)?, record })
    }

    fn name(&self, function: &Function) -> Option<&str> {
        self.string(self.names.checked_add(self.u32(function.record + 4)? as usize)?)
    }

    /// Calls `each` with start, size and name of every function.
    pub fn functions(&self, mut each: impl FnMut(u64, u64, &str)) {
        for number in 0..self.functions {
            let (Some(function), Some(end)) = (self.function(number), self.entry(number + 1)) else { return };
            if let Some(name) = self.name(&function) {
                each(function.entry, end.saturating_sub(function.entry), name);
            }
        }
    }

    /// The function at an address.
    fn at(&self, address: u64) -> Option<Function> {
        let (mut low, mut high) = (0, self.functions);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry(middle)? <= address { low = middle + 1 } else { high = middle }
        }
        let function = self.function(low.checked_sub(1)?)?;
        (address < self.entry(low)?).then_some(function)
    }

    fn variable_length(&self, at: &mut usize) -> Option<u32> {
        let mut value = 0u32;
        for shift in (0..32).step_by(7) {
            let byte = *self.bytes.get(*at)?;
            *at += 1;
            value |= u32::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// The value of one of a function's tables at an address. `field` is the table's place in the record.
    fn value(&self, function: &Function, field: usize, address: u64) -> Option<i32> {
        let mut at = self.values.checked_add(self.u32(function.record + field)? as usize)?;
        let mut value = -1i32;
        let mut pc = function.entry;
        let mut first = true;
        loop {
            let step = self.variable_length(&mut at)?;
            if step == 0 && !first {
                return None;
            }
            first = false;
            let step = if step & 1 != 0 { !(step >> 1) as i32 } else { (step >> 1) as i32 };
            value = value.wrapping_add(step);
            pc = pc.wrapping_add(u64::from(self.variable_length(&mut at)?).wrapping_mul(self.quantum));
            if address < pc {
                return Some(value);
            }
        }
    }

    /// Bytes of the stack between the stack pointer and the return address at an address.
    pub fn frame_bytes(&self, address: u64) -> Option<u64> {
        let function = self.at(address)?;
        u64::try_from(self.value(&function, 16, address)?).ok()
    }

    /// True if a stack ends at the function at an address.
    pub fn is_outermost(&self, address: u64) -> bool {
        let name = self.at(address).and_then(|function| self.name(&function));
        matches!(name, Some("runtime.goexit" | "runtime.mstart" | "runtime.rt0_go" | "runtime.mcall"))
            || matches!(name, Some("runtime.systemstack_switch" | "runtime.morestack" | "_rt0_amd64_linux"))
    }

    /// The source line of an address.
    pub fn line(&self, address: u64) -> Option<SourceLine> {
        let function = self.at(address)?;
        let line = u32::try_from(self.value(&function, 24, address)?).ok()?;
        let number = u32::try_from(self.value(&function, 20, address)?).ok()?;
        let unit = self.u32(function.record + 32)?;
        let slot = self.compile_units.checked_add(4 * (unit.checked_add(number)? as usize))?;
        let file = self.string(self.files.checked_add(self.u32(slot)? as usize)?)?;
        Some(SourceLine { file: file.to_owned(), line })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two functions: `main.a` at +0 (64 bytes) and `main.b` at +64 (32 bytes).
    fn sample() -> Vec<u8> {
        let names = b"main.a\0main.b\0";
        let units = 0u32.to_le_bytes();
        let files = b"a.go\0";
        // frame: 0 for 4 bytes, then 24 up to the end; line: 10 for 16 bytes, then 11; file: 0.
        let values: &[u8] = &[0, 2, 4, 48, 60, 0, 22, 16, 2, 48, 0, 2, 64, 0];
        let record = |entry: u32, name: u32| {
            let words = [entry, name, 0, 0, 1, 11, 6, 0, 0];
            words.iter().flat_map(|word: &u32| word.to_le_bytes()).collect::<Vec<u8>>()
        };
        let table: Vec<u8> = [0u32, 20, 64, 56, 96].iter().flat_map(|word| word.to_le_bytes()).collect();
        let parts = [&names[..], &units, files, values, &table, &record(0, 0), &record(64, 7)];
        let mut bytes = vec![0xF0, 0xFF, 0xFF, 0xFF, 0, 0, 1, 8];
        let mut offset = 8 + 8 * 8;
        let mut words = vec![2, 1, 0x1000u64];
        for part in &parts[..5] {
            words.push(offset as u64);
            offset += part.len();
        }
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(parts.concat());
        bytes
    }

    #[test]
    fn functions_lines_and_frames() {
        let table = GoTable::parse(sample(), 0).unwrap();
        let mut functions = Vec::new();
        table.functions(|start, size, name| functions.push((start, size, name.to_owned())));
        assert_eq!(functions, [(0x1000, 64, "main.a".into()), (0x1040, 32, "main.b".into())]);
        assert_eq!(table.frame_bytes(0x1003), Some(0));
        assert_eq!(table.frame_bytes(0x1004), Some(24));
        assert_eq!(table.line(0x1010), Some(SourceLine { file: "a.go".into(), line: 11 }));
        assert_eq!(table.line(0x1060), None);
        assert_eq!(table.frame_bytes(0xFFF), None);
    }

    proptest! {
        #[test]
        fn no_table_makes_it_panic_or_loop(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let mut bytes = sample();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(table) = GoTable::parse(bytes, 0) {
                table.functions(|_, _, _| {});
                for address in [0x1000, 0x1003, 0x1050, 0] {
                    let _ = (table.line(address), table.frame_bytes(address));
                }
            }
        }
    }
}
