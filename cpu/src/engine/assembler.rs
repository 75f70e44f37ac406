//! Emits the engine's own instructions: the glue between renamed guest instructions.
//!
//! Only the few forms that the translator needs, as bytes. Host registers are numbered as in their encoding.

#![allow(missing_docs)]

use super::block::{BLOCK_BIAS, TLB_ENTRIES};

/// Host register numbers.
pub mod host {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    /// R11 points into the vCPU block.
    pub const BLOCK: u8 = 11;
    pub const R12: u8 = 12;
    pub const R13: u8 = 13;
    /// R14 holds the distance of the stack window.
    pub const DISTANCE: u8 = 14;
    /// R15 holds the budget.
    pub const BUDGET: u8 = 15;
}

/// Two-operand ALU opcodes of the form `op reg, r/m`.
pub mod op {
    pub const ADD: u8 = 0x03;
    pub const SUB: u8 = 0x2B;
    pub const XOR: u8 = 0x33;
    pub const CMP: u8 = 0x3B;
    pub const LOAD: u8 = 0x8B;
    pub const STORE: u8 = 0x89;
}

/// A host address: base and perhaps index register, and a displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    pub base: u8,
    pub index: Option<u8>,
    /// What the index is multiplied by: 1, 2, 4 or 8.
    pub scale: u8,
    pub disp: i32,
}

/// `[RCX]`, where every single translation leaves its host address.
pub const POINTER: Operand = Operand { base: host::RCX, index: None, scale: 1, disp: 0 };

/// Condition codes as in the low nibble of Jcc.
pub mod cc {
    pub const NE: u8 = 0x5;
    pub const E: u8 = 0x4;
    pub const A: u8 = 0x7;
    pub const AE: u8 = 0x3;
    pub const C: u8 = 0x2;
    pub const S: u8 = 0x8;
}

/// A buffer of host code that will be placed at offset `origin` of the code memory.
#[derive(Default)]
pub struct Assembler {
    pub bytes: Vec<u8>,
    /// Offset at which `bytes[0]` will stand.
    pub origin: u64,
}

impl Assembler {
    pub fn start(&mut self, origin: u64) {
        self.bytes.clear();
        self.origin = origin;
    }

    pub fn here(&self) -> u64 {
        self.origin + self.bytes.len() as u64
    }

    pub fn offset(&self) -> u32 {
        self.bytes.len() as u32
    }

    #[inline]
    pub fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    #[inline]
    fn imm32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    #[inline]
    fn rex(&mut self, wide: bool, reg: u8, index: u8, base: u8) {
        let rex = 0x40 | (wide as u8) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if rex != 0x40 {
            self.bytes.push(rex);
        }
    }

    /// The field of the vCPU block at offset `field` as a memory operand.
    pub fn field(field: u32) -> Operand {
        Operand { base: host::BLOCK, disp: field as i32 - BLOCK_BIAS as i32, ..POINTER }
    }

    /// Opcode, ModRM and so on of an instruction on a field of the vCPU block; what `extension` says goes where another
    /// register would be named.
    fn on_field(&mut self, wide: bool, opcode: &[u8], extension: u8, field: u32) {
        self.rex(wide, extension, 0, host::BLOCK);
        self.put(opcode);
        self.memory(extension, Self::field(field));
    }

    /// `op reg, [field]` (or the store form, by opcode).
    pub fn field_op(&mut self, wide: bool, opcode: u8, reg: u8, field: u32) {
        self.on_field(wide, &[opcode], reg, field);
    }

    /// `op reg, [index * scale + field]`
    pub fn field_index_op(&mut self, opcode: u8, reg: u8, index: u8, scale: u8, field: u32) {
        self.rex(true, reg, index, host::BLOCK);
        self.bytes.push(opcode);
        self.memory(reg, Operand { index: Some(index), scale, ..Self::field(field) });
    }

    /// `shrx dst32, src32, r11d`: the number of a page, since the low bits of R11 are that count ([`BLOCK_BIAS`]).
    pub fn page_number(&mut self, dst: u8, src: u8) {
        debug_assert!(dst < 8 && src < 8);
        self.put(&[0xC4, 0xE2, !host::BLOCK << 3 & 0x78 | 3, 0xF7, 0xC0 | dst << 3 | src]);
    }

    pub fn load_field(&mut self, reg: u8, field: u32) {
        self.field_op(true, op::LOAD, reg, field);
    }

    pub fn store_field(&mut self, reg: u8, field: u32) {
        self.field_op(true, op::STORE, reg, field);
    }

    /// `movzx eax, word [field]`
    pub fn load_field16_eax(&mut self, field: u32) {
        self.on_field(false, &[0x0F, 0xB7], host::RAX, field);
    }

    /// `mov dword [field], imm32`
    pub fn store_field_imm32(&mut self, field: u32, value: u32) {
        self.on_field(false, &[0xC7], 0, field);
        self.imm32(value);
    }

    /// `cmp dword [field], imm32`, with the immediate as the last four bytes
    pub fn cmp_field_imm32(&mut self, field: u32, value: u32) {
        self.on_field(false, &[0x81], 7, field);
        self.imm32(value);
    }

    /// `test dword [field], imm32`
    pub fn test_field_imm32(&mut self, field: u32, value: u32) {
        self.on_field(false, &[0xF7], 0, field);
        self.imm32(value);
    }

    /// `cmp qword [field], imm32` (sign-extended)
    pub fn cmp_field_imm(&mut self, field: u32, value: u32) {
        self.on_field(true, &[0x81], 7, field);
        self.imm32(value);
    }

    /// `or dword [field], imm32`, or `and`
    pub fn or_and_field_imm32(&mut self, or: bool, field: u32, value: u32) {
        self.on_field(false, &[0x81], if or { 1 } else { 4 }, field);
        self.imm32(value);
    }

    /// `imul rax, [field]`
    pub fn imul_rax_field(&mut self, field: u32) {
        self.on_field(true, &[0x0F, 0xAF], host::RAX, field);
    }

    /// `mov dst, src` (64-bit)
    pub fn mov(&mut self, dst: u8, src: u8) {
        self.rex(true, src, 0, dst);
        self.put(&[op::STORE, 0xC0 | (src & 7) << 3 | dst & 7]);
    }

    /// `cmp a, b`
    pub fn cmp(&mut self, a: u8, b: u8) {
        self.rex(true, b, 0, a);
        self.put(&[0x39, 0xC0 | (b & 7) << 3 | a & 7]);
    }

    /// `mov dst32, src32`
    pub fn mov32(&mut self, dst: u8, src: u8) {
        self.rex(false, src, 0, dst);
        self.put(&[op::STORE, 0xC0 | (src & 7) << 3 | dst & 7]);
    }

    /// `movzx reg32, reg16`; flags are untouched.
    pub fn movzx16(&mut self, reg: u8) {
        self.rex(false, reg, 0, reg);
        self.put(&[0x0F, 0xB7, 0xC0 | (reg & 7) << 3 | reg & 7]);
    }

    /// `mov reg32, imm32`; returns the offset of the immediate.
    pub fn mov32_imm(&mut self, reg: u8, value: u32) -> u32 {
        self.rex(false, 0, 0, reg);
        self.bytes.push(0xB8 | reg & 7);
        self.imm32(value);
        self.offset() - 4
    }

    /// The shortest move of a constant into a register; flags are untouched.
    pub fn mov_imm(&mut self, reg: u8, value: u64) {
        if value <= u32::MAX as u64 {
            self.rex(false, 0, 0, reg);
            self.bytes.push(0xB8 | reg & 7);
            self.imm32(value as u32);
        } else if value as i64 == value as i32 as i64 {
            self.rex(true, 0, 0, reg);
            self.put(&[0xC7, 0xC0 | reg & 7]);
            self.imm32(value as u32);
        } else {
            self.rex(true, 0, 0, reg);
            self.bytes.push(0xB8 | reg & 7);
            self.put(&value.to_le_bytes());
        }
    }

    /// `lea dst, [base + index*scale + disp]`, 64- or 32-bit result; flags are untouched.
    pub fn lea(&mut self, wide: bool, dst: u8, base: Option<u8>, index: Option<(u8, u8)>, disp: i32) {
        let (index_reg, scale) = index.unwrap_or((4, 1));
        let base_reg = base.unwrap_or(5);
        self.rex(wide, dst, index_reg, if base.is_some() { base_reg } else { 0 });
        self.bytes.push(0x8D);
        let plain = index.is_none() && base.is_some() && base_reg & 7 != 4;
        let modrm_mod = if base.is_none() || disp == 0 && base_reg & 7 != 5 {
            0
        } else if disp as i8 as i32 == disp {
            1
        } else {
            2
        };
        let rm = if plain { base_reg & 7 } else { 4 };
        self.bytes.push(modrm_mod << 6 | (dst & 7) << 3 | rm);
        if !plain {
            self.bytes.push((scale.trailing_zeros() as u8) << 6 | (index_reg & 7) << 3 | base_reg & 7);
        }
        if base.is_none() || modrm_mod == 2 {
            self.imm32(disp as u32);
        } else if modrm_mod == 1 {
            self.bytes.push(disp as u8);
        }
    }

    /// ModRM, SIB and displacement of the operand.
    fn memory(&mut self, reg: u8, Operand { base, index, scale, disp }: Operand) {
        let sib = index.is_some() || base & 7 == 4;
        let mode = if disp == 0 && base & 7 != 5 {
            0
        } else if disp as i8 as i32 == disp {
            1
        } else {
            2
        };
        self.bytes.push(mode << 6 | (reg & 7) << 3 | if sib { 4 } else { base & 7 });
        if sib {
            self.bytes.push((scale.trailing_zeros() as u8) << 6 | (index.unwrap_or(4) & 7) << 3 | base & 7);
        }
        match mode {
            1 => self.bytes.push(disp as u8),
            2 => self.imm32(disp as u32),
            _ => {}
        }
    }

    /// `mov dst, [at]` with size 8 or 4 (zero-extending).
    pub fn load(&mut self, size: usize, dst: u8, at: Operand) {
        self.rex(size == 8, dst, at.index.unwrap_or(0), at.base);
        self.bytes.push(op::LOAD);
        self.memory(dst, at);
    }

    /// `mov dst, src` (16-bit), which leaves the rest of `dst` alone
    pub fn mov16(&mut self, dst: u8, src: u8) {
        self.bytes.push(0x66);
        self.rex(false, src, 0, dst);
        self.put(&[op::STORE, 0xC0 | (src & 7) << 3 | dst & 7]);
    }

    /// `mov [at], src` with size 8, 4 or 2.
    pub fn store(&mut self, size: usize, at: Operand, src: u8) {
        if size == 2 {
            self.bytes.push(0x66);
        }
        self.rex(size == 8, src, at.index.unwrap_or(0), at.base);
        self.bytes.push(op::STORE);
        self.memory(src, at);
    }

    /// `mov [at], imm32` with size 8 (sign-extended) or 4.
    pub fn store_imm(&mut self, size: usize, at: Operand, value: u32) {
        self.rex(size == 8, 0, at.index.unwrap_or(0), at.base);
        self.bytes.push(0xC7);
        self.memory(0, at);
        self.imm32(value);
    }

    /// `sub dst, src` (64-bit)
    pub fn sub(&mut self, dst: u8, src: u8) {
        self.rex(true, src, 0, dst);
        self.put(&[0x29, 0xC0 | (src & 7) << 3 | dst & 7]);
    }

    pub fn xor(&mut self, dst: u8, src: u8) {
        self.rex(true, src, 0, dst);
        self.put(&[0x31, 0xC0 | (src & 7) << 3 | dst & 7]);
    }

    /// `and reg32, imm32`
    pub fn and32(&mut self, reg: u8, value: u32) {
        if reg == host::RAX {
            self.bytes.push(0x25);
        } else {
            self.put(&[0x81, 0xE0 | reg]);
        }
        self.imm32(value);
    }

    /// `cmp reg, imm32` (64-bit, sign-extended)
    pub fn cmp_imm(&mut self, reg: u8, value: i32) {
        self.rex(true, 0, 0, reg);
        self.put(&[0x81, 0xF8 | reg & 7]);
        self.imm32(value as u32);
    }

    /// `sub reg, imm` (64-bit, sign-extended)
    pub fn sub_imm(&mut self, reg: u8, value: i32) {
        self.rex(true, 0, 0, reg);
        if value as i8 as i32 == value {
            self.put(&[0x83, 0xE8 | reg & 7, value as u8]);
        } else {
            self.put(&[0x81, 0xE8 | reg & 7]);
            self.imm32(value as u32);
        }
    }

    /// `jcc rel32` to an address; returns the offset of the displacement for patching.
    pub fn jcc(&mut self, condition: u8, target: u64) -> u32 {
        self.put(&[0x0F, 0x80 | condition]);
        self.rel32(target)
    }

    /// `jmp rel32` to an address; returns the offset of the displacement for patching.
    pub fn jmp(&mut self, target: u64) -> u32 {
        self.bytes.push(0xE9);
        self.rel32(target)
    }

    fn rel32(&mut self, target: u64) -> u32 {
        let at = self.offset();
        let displacement = target.wrapping_sub(self.here() + 4) as u32;
        self.imm32(displacement);
        at
    }

    /// Points the rel32 at `at` to the current position.
    pub fn land(&mut self, at: u32) {
        let displacement = (self.offset() - (at + 4)) as i32;
        self.bytes[at as usize..at as usize + 4].copy_from_slice(&displacement.to_le_bytes());
    }

    /// `lea rcx, [rip + distance]`; returns the offset of the distance for `land`.
    pub fn lea_rcx_rip(&mut self) -> u32 {
        self.put(&[0x48, 0x8D, 0x0D]);
        self.rel32(0)
    }

    /// `jmp [field]`
    pub fn jmp_field(&mut self, field: u32) {
        self.on_field(false, &[0xFF], 4, field);
    }

    /// `jmp [rax * scale + field]`
    pub fn jmp_field_index_rax(&mut self, scale: u8, field: u32) {
        self.rex(false, 0, host::RAX, host::BLOCK);
        self.bytes.push(0xFF);
        self.memory(4, Operand { index: Some(host::RAX), scale, ..Self::field(field) });
    }

    /// `sub dword [field], 1`
    pub fn decrement_field32(&mut self, field: u32) {
        self.on_field(false, &[0x83], 5, field);
        self.bytes.push(1);
    }

    /// `add word [field], by`
    pub fn add_field16(&mut self, field: u32, by: u8) {
        self.bytes.push(0x66);
        self.on_field(false, &[0x83], 0, field);
        self.bytes.push(by);
    }

    /// `test byte [field], imm8`
    pub fn test_field8(&mut self, field: u32, value: u8) {
        self.on_field(false, &[0xF6], 0, field);
        self.bytes.push(value);
    }

    /// `or byte [field], imm8`
    pub fn or_field8(&mut self, field: u32, value: u8) {
        self.on_field(false, &[0x80], 1, field);
        self.bytes.push(value);
    }

    /// `mov byte [field], 0`
    pub fn clear_field8(&mut self, field: u32) {
        self.on_field(false, &[0xC6], 0, field);
        self.bytes.push(0);
    }

    /// Where in a TLB of so many entries, less one, an address is.
    pub fn tlb_index(&mut self, dst: u8, address: u8, mask: u32) {
        self.page_number(dst, address);
        if mask as usize + 1 < TLB_ENTRIES {
            self.and32(dst, mask);
        }
    }

    /// `call [field]`
    pub fn call_field(&mut self, field: u32) {
        self.on_field(false, &[0xFF], 2, field);
    }

    pub fn push(&mut self, reg: u8) {
        self.rex(false, 0, 0, reg);
        self.bytes.push(0x50 | reg & 7);
    }

    pub fn pop(&mut self, reg: u8) {
        self.rex(false, 0, 0, reg);
        self.bytes.push(0x58 | reg & 7);
    }

    /// `push imm32`, sign-extended to 64 bits
    pub fn push_imm(&mut self, value: u32) {
        self.bytes.push(0x68);
        self.imm32(value);
    }

    /// `push qword [field]`
    pub fn push_field(&mut self, field: u32) {
        self.on_field(false, &[0xFF], 6, field);
    }

    /// `pop qword [field]`
    pub fn pop_field(&mut self, field: u32) {
        self.on_field(false, &[0x8F], 0, field);
    }

    /// `sarx rcx, rsp, rax`: flags are untouched.
    pub fn sarx_rcx_rsp_rax(&mut self) {
        self.put(&[0xC4, 0xE2, 0xFA, 0xF7, 0xCC]);
    }

    /// `jrcxz rel8`; returns the offset of the displacement for `land8`.
    pub fn jrcxz(&mut self) -> u32 {
        self.put(&[0xE3, 0]);
        self.offset() - 1
    }

    /// Points the rel8 at `at` to the current position.
    pub fn land8(&mut self, at: u32) {
        self.bytes[at as usize] = u8::try_from(self.offset() - (at + 1)).expect("the jump is short");
    }

    /// `vmovdqu [field], ymm` or xmm, or the load, for registers 0 to 15.
    pub fn vmovdqu_field(&mut self, store: bool, wide: bool, ymm: u8, field: u32) {
        let high = if ymm < 8 { 0x80 } else { 0 };
        self.put(&[0xC4, high | 0x41, 0x7A | (wide as u8) << 2, if store { 0x7F } else { 0x6F }]);
        self.memory(ymm, Self::field(field));
    }

    /// `vorps ymm0, ymm0, ymm`
    pub fn vorps_ymm0(&mut self, ymm: u8) {
        match ymm {
            0..8 => self.put(&[0xC5, 0xFC, 0x56, 0xC0 | ymm]),
            _ => self.put(&[0xC4, 0xC1, 0x7C, 0x56, 0xC0 | ymm & 7]),
        }
    }

    /// `vextractf128 xmm0, ymm0, 1; xor eax, eax; vptest xmm0, xmm0; setne al`: 1 unless the upper half is zero.
    pub fn upper_half_in_eax(&mut self) {
        self.put(&[0xC4, 0xE3, 0x7D, 0x19, 0xC0, 0x01]);
        self.put(&[0x31, 0xC0]);
        self.put(&[0xC4, 0xE2, 0x79, 0x17, 0xC0]);
        self.put(&[0x0F, 0x95, 0xC0]);
    }

    /// `lahf; seto al; mov [field], eax`: status flags into a slot, flags unchanged.
    pub fn save_flags(&mut self, field: u32) {
        self.put(&[0x9F, 0x0F, 0x90, 0xC0]);
        self.field_op(false, op::STORE, host::RAX, field);
    }

    /// `mov eax, 0; lahf; mov [field], eax`: as `save_flags`, with OF known to be clear. One instruction less that
    /// reads flags, for which processors have few units, and which branches share.
    pub fn save_flags_without_overflow(&mut self, field: u32) {
        self.put(&[0xB8, 0, 0, 0, 0, 0x9F]);
        self.field_op(false, op::STORE, host::RAX, field);
    }

    /// `lahf; and eax, 0x4000; mov ecx, [field]; and ecx, ~0x4000; or eax, ecx; mov [field], eax`: ZF to a slot.
    pub fn merge_zero_flag(&mut self, field: u32) {
        self.put(&[0x9F, 0x25, 0x00, 0x40, 0x00, 0x00]);
        self.field_op(false, op::LOAD, host::RCX, field);
        self.put(&[0x81, 0xE1, 0xFF, 0xBF, 0xFF, 0xFF, 0x09, 0xC8]);
        self.field_op(false, op::STORE, host::RAX, field);
    }

    /// `mov eax, [field]; add al, 0x7F; sahf`: status flags from a slot.
    pub fn restore_flags(&mut self, field: u32) {
        self.field_op(false, op::LOAD, host::RAX, field);
        self.put(&[0x04, 0x7F, 0x9E]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    fn text(emit: impl FnOnce(&mut Assembler)) -> String {
        let mut a = Assembler::default();
        a.start(0x1000);
        emit(&mut a);
        let mut out = Vec::new();
        let mut formatter = IntelFormatter::new();
        for i in Decoder::with_ip(64, &a.bytes, 0x1000, DecoderOptions::NONE).iter() {
            let mut s = String::new();
            formatter.format(&i, &mut s);
            out.push(s);
        }
        out.join("; ")
    }

    #[test]
    fn encodings_read_back() {
        use host::*;
        // A field whose displacement is that.
        let at = |disp: i32| BLOCK_BIAS.wrapping_add_signed(disp);
        let cases = [
            (text(|a| a.load_field(R13, at(0x88))), "mov r13,[r11+88h]"),
            (text(|a| a.field_op(false, op::STORE, RAX, at(-0x10))), "mov [r11-10h],eax"),
            (text(|a| a.field_index_op(op::XOR, RCX, RAX, 1, at(0x1000))), "xor rcx,[r11+rax+1000h]"),
            (text(|a| a.load_field16_eax(at(0x20))), "movzx eax,word ptr [r11+20h]"),
            (text(|a| a.field_index_op(op::CMP, RCX, RAX, 8, at(0x74))), "cmp rcx,[r11+rax*8+74h]"),
            (text(|a| a.page_number(RAX, RCX)), "shrx eax,ecx,r11d"),
            (text(|a| a.jmp_field_index_rax(8, at(0x2008))), "jmp qword ptr [r11+rax*8+2008h]"),
            (text(|a| a.decrement_field32(at(0x30))), "sub dword ptr [r11+30h],1"),
            (text(|a| a.add_field16(at(0x30), 16)), "add word ptr [r11+30h],10h"),
            (text(|a| a.cmp_field_imm32(at(0x40), 7)), "cmp dword ptr [r11+40h],7"),
            (text(|a| a.or_and_field_imm32(true, at(0), 0x200)), "or dword ptr [r11],200h"),
            (text(|a| a.or_and_field_imm32(false, at(8), !0x200)), "and dword ptr [r11+8],0FFFFFDFFh"),
            (text(|a| a.test_field_imm32(at(8), 0x400)), "test dword ptr [r11+8],400h"),
            (text(|a| a.store_field_imm32(at(8), 1)), "mov dword ptr [r11+8],1"),
            (text(|a| a.test_field8(at(8), 4)), "test byte ptr [r11+8],4"),
            (text(|a| a.or_field8(at(0x1008), 3)), "or byte ptr [r11+1008h],3"),
            (text(|a| a.clear_field8(at(8))), "mov byte ptr [r11+8],0"),
            (text(|a| a.jmp_field(at(8))), "jmp qword ptr [r11+8]"),
            (text(|a| a.cmp_field_imm(at(0x40), 0x40_1000)), "cmp qword ptr [r11+40h],401000h"),
            (text(|a| a.mov(R12, RCX)), "mov r12,rcx"),
            (text(|a| a.cmp(RCX, RAX)), "cmp rcx,rax"),
            (text(|a| a.mov32(RCX, R13)), "mov ecx,r13d"),
            (text(|a| a.mov16(R12, RAX)), "mov r12w,ax"),
            (text(|a| a.mov16(RSP, RCX)), "mov sp,cx"),
            (text(|a| a.lea(true, RCX, Some(RSP), None, -8)), "lea rcx,[rsp-8]"),
            (text(|a| a.lea(true, RCX, Some(R12), Some((R13, 8)), 0x1234)), "lea rcx,[r12+r13*8+1234h]"),
            (text(|a| a.lea(true, RCX, Some(R13), None, 0)), "lea rcx,[r13]"),
            (text(|a| a.lea(false, RCX, None, Some((RDX, 4)), 0x10)), "lea ecx,[rdx*4+10h]"),
            (text(|a| a.lea(true, RCX, Some(RBP), Some((RBX, 2)), 0)), "lea rcx,[rbp+rbx*2]"),
            (text(|a| a.sub_imm(BUDGET, 5)), "sub r15,5"),
            (text(|a| a.cmp_imm(RCX, 4088)), "cmp rcx,0FF8h"),
            (text(|a| a.load(8, R13, POINTER)), "mov r13,[rcx]"),
            (
                text(|a| a.load(4, RDX, Operand { base: RSP, index: Some(RCX), scale: 4, disp: 8 })),
                "mov edx,[rsp+rcx*4+8]",
            ),
            (text(|a| a.store(8, Operand { base: R13, index: Some(RCX), ..POINTER }, R12)), "mov [r13+rcx],r12"),
            (text(|a| a.store(2, POINTER, RAX)), "mov [rcx],ax"),
            (text(|a| a.store_imm(8, POINTER, 7)), "mov qword ptr [rcx],7"),
            (text(|a| a.sub(RCX, R12)), "sub rcx,r12"),
            (text(|a| a.vmovdqu_field(true, true, 9, at(0x400))), "vmovdqu [r11+400h],ymm9"),
            (text(|a| a.vmovdqu_field(false, false, 1, at(-0x400))), "vmovdqu xmm1,[r11-400h]"),
            (text(|a| a.vorps_ymm0(7)), "vorps ymm0,ymm0,ymm7"),
            (text(|a| a.vorps_ymm0(12)), "vorps ymm0,ymm0,ymm12"),
            (text(|a| a.upper_half_in_eax()), "vextractf128 xmm0,ymm0,1; xor eax,eax; vptest xmm0,xmm0; setne al"),
            (text(|a| a.imul_rax_field(at(0x40))), "imul rax,[r11+40h]"),
            (text(|a| a.restore_flags(at(8))), "mov eax,[r11+8]; add al,7Fh; sahf"),
            (text(|a| a.save_flags_without_overflow(at(8))), "mov eax,0; lahf; mov [r11+8],eax"),
            (text(|a| a.save_flags(at(8))), "lahf; seto al; mov [r11+8],eax"),
            (
                text(|a| a.merge_zero_flag(at(8))),
                "lahf; and eax,4000h; mov ecx,[r11+8]; and ecx,0FFFFBFFFh; or eax,ecx; mov [r11+8],eax",
            ),
            (text(|a| a.mov_imm(RAX, u64::MAX)), "mov rax,0FFFFFFFFFFFFFFFFh"),
            (text(|a| a.push(R13)), "push r13"),
            (text(|a| a.push_imm(u32::MAX)), "push 0FFFFFFFFFFFFFFFFh"),
            (text(|a| a.push_field(at(0x30))), "push qword ptr [r11+30h]"),
            (text(|a| a.pop_field(at(0x30))), "pop qword ptr [r11+30h]"),
            (text(|a| a.sarx_rcx_rsp_rax()), "sarx rcx,rsp,rax"),
            (text(|a| a.call_field(at(0x30))), "call qword ptr [r11+30h]"),
        ];
        for (got, want) in cases {
            let clean = got.replace("+0h]", "]").replace("+0]", "]");
            assert_eq!(clean, want);
        }
    }
}
