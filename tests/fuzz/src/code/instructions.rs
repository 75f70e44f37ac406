//! A mutation that knows instructions: it puts in, replaces and takes out whole ones, drawn from a table of all
//! encodings, with operands that mostly hit something.

use std::collections::HashSet;
use std::sync::OnceLock;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

use super::start::{HEADER_BYTES, bitness};

/// An encoding up to its opcode, and what it has behind that.
#[derive(Clone, Debug)]
struct Template {
    /// Prefixes and opcode.
    head: Vec<u8>,
    /// ModRM, if there is one: the reg field, and whether the operand is memory.
    modrm: Option<(u8, bool)>,
}

/// Random numbers for one mutation.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = super::bus::mix(self.0, 7);
        self.0
    }
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
    fn byte(&mut self) -> u8 {
        self.next() as u8
    }
}

/// The encodings of one bitness that iced tells apart.
fn table(bitness: u32) -> &'static [Template] {
    static TABLES: [OnceLock<Vec<Template>>; 3] = [const { OnceLock::new() }; 3];
    let slot = match bitness {
        16 => 0,
        32 => 1,
        _ => 2,
    };
    TABLES[slot].get_or_init(|| enumerate(bitness))
}

fn enumerate(bitness: u32) -> Vec<Template> {
    let mut heads: Vec<Vec<u8>> = Vec::new();
    let prefixes: [&[u8]; 7] = [&[], &[0x66], &[0xF2], &[0xF3], &[0x48], &[0x66, 0x48], &[0xF3, 0x48]];
    for prefix in prefixes.iter().take(if bitness == 64 { 7 } else { 4 }) {
        for map in [&[][..], &[0x0F], &[0x0F, 0x38], &[0x0F, 0x3A]] {
            heads.extend((0..=255u8).map(|opcode| [prefix, map, &[opcode]].concat()));
        }
    }
    for map in 1..4u8 {
        for bits in 0..16u8 {
            // W in bit 7, L in bit 2, the mandatory prefix in bits 0 and 1; register 1 in VVVV.
            let second = bits >> 3 << 7 | 0x70 | bits & 7;
            heads.extend((0..=255u8).map(|opcode| vec![0xC4, 0xE0 | map, second, opcode]));
        }
    }
    let mut seen: HashSet<(Code, bool, bool)> = HashSet::new();
    let mut found = Vec::new();
    let mut instruction = Instruction::default();
    for head in heads {
        for modrm in (0..=255u8).filter(|modrm| modrm & 7 == 6 && matches!(modrm >> 6, 0 | 3)) {
            let mut code = head.clone();
            code.extend([modrm, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            let mut decoder = Decoder::with_ip(bitness, &code, 0, DecoderOptions::NONE);
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid() {
                continue;
            }
            let with_modrm = decoder.get_constant_offsets(&instruction).has_displacement()
                || instruction.len() > head.len()
                    && (0..instruction.op_count()).any(|i| instruction.op_kind(i) == iced_x86::OpKind::Memory)
                || modrm >> 6 == 3;
            if seen.insert((instruction.code(), modrm >> 6 == 3, head.len() > 2)) {
                let modrm = with_modrm.then_some((modrm >> 3 & 7, modrm >> 6 == 0));
                found.push(Template { head: head.clone(), modrm });
            }
        }
    }
    found
}

/// Bytes of a random instruction.
fn instruction(draw: &mut Draw, bitness: u32) -> Vec<u8> {
    let table = table(bitness);
    let template = &table[draw.below(table.len())];
    let mut code = Vec::with_capacity(15);
    match draw.below(24) {
        0 => code.push(0xF0),
        1 => code.push([0x2E, 0x36, 0x3E, 0x26][draw.below(4)]),
        2 => code.push([0x64, 0x65][draw.below(2)]),
        3 => code.push(0x67),
        4 => code.push([0xF2, 0xF3, 0x66][draw.below(3)]),
        _ => {}
    }
    code.extend(&template.head);
    if let Some((reg, memory)) = template.modrm {
        let rm = draw.byte() & 7;
        // The reg field of the template may be part of the opcode.
        if memory {
            match draw.below(4) {
                0 => code.extend([0x40 | reg << 3 | rm, [0, 8, 0xF8, 0x10, 0x7F][draw.below(5)]]),
                1 => code.extend([0x80 | reg << 3 | rm, draw.byte(), 0, 0, 0]),
                _ => code.push(reg << 3 | rm),
            }
            if rm == 4 && bitness != 16 {
                let at = code.len().min(template.head.len() + 1 + usize::from(code.len() > template.head.len() + 2));
                code.insert(at, [0x24, draw.byte()][draw.below(2)]);
            }
        } else {
            code.push(0xC0 | reg << 3 | rm);
        }
    }
    for _ in 0..draw.below(5) {
        code.push([0, 1, 0xFF, 0x80, draw.byte()][draw.below(5)]);
    }
    code
}

/// Where the instructions of `code` begin, as they decode from its first byte on.
fn boundaries(code: &[u8], bitness: u32) -> Vec<usize> {
    let mut decoder = Decoder::with_ip(bitness, code, 0, DecoderOptions::NONE);
    let mut starts = Vec::new();
    let mut instruction = Instruction::default();
    while decoder.can_decode() && starts.len() < 256 {
        starts.push(decoder.position());
        decoder.decode_out(&mut instruction);
    }
    starts
}

/// Changes the first `size` bytes of `data` in place, at most to `max_size`; returns the new size.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let mut draw = Draw(seed.into());
    let max_size = max_size.min(data.len());
    let mut input = data[..size].to_vec();
    let bitness = bitness(&input);
    for _ in 0..1 + draw.below(4) {
        let code = &input[HEADER_BYTES..];
        let mut starts = boundaries(code, bitness);
        starts.push(code.len());
        let place = draw.below(starts.len());
        let at = HEADER_BYTES + starts[place];
        let end = HEADER_BYTES + starts.get(place + 1).copied().unwrap_or(code.len()).max(starts[place]);
        match draw.below(8) {
            0 => drop(input.drain(at..end)),
            1 | 2 => drop(input.splice(at..end, instruction(&mut draw, bitness))),
            3 => {
                // A branch to another instruction.
                let target = HEADER_BYTES + starts[draw.below(starts.len())];
                let opcode = [0xEB, 0x74, 0x75, 0x72, 0xE2][draw.below(5)];
                let distance = (target as i64 - at as i64 - 2).clamp(-128, 127) as i8;
                drop(input.splice(at..at, [opcode, distance as u8]));
            }
            4 => input[draw.below(HEADER_BYTES)] = draw.byte(),
            _ => drop(input.splice(at..at, instruction(&mut draw, bitness))),
        }
    }
    input.truncate(max_size);
    data[..input.len()].copy_from_slice(&input);
    input.len()
}
