//! Thread windows: where R14 and R15 point, for hot user code. Runtimes keep their thread there, and look at it all the
//! time: Go its goroutine in R14, HotSpot its thread in R15.
//!
//! What lies behind such a register in one of a few pieces is known by its host address, once an access has asked for it,
//! until the register is written, which translated code notes, or translated code is entered from Rust. Nothing else can
//! change what an address means, so nobody else need know of thread windows. What is known may be read, or read and
//! written: it is a copy of entries of the TLBs.

use super::assembler::{Assembler, cc, host, op};
use super::block::{Class, field};
use super::groups::writes;
use super::registers::gpr_number;
use super::thunks::Thunks;
use crate::memory::PAGE_SIZE;
use crate::state::gpr;
use iced_x86::{Instruction, InstructionInfoFactory, OpKind};

/// The first of the registers; there are two.
pub const FIRST: usize = gpr::R14;
/// Pieces behind each.
pub const PIECES: usize = 4;
/// Length of a piece in bytes. One that crosses a page is never known.
const PIECE: i32 = 256;

/// A piece of memory behind one of the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The register's number behind the first.
    pub register: usize,
    pub number: usize,
}

impl Piece {
    /// The piece that all bytes of an access lie in.
    pub fn of(guest: u8, offset: i32, size: i32) -> Option<Piece> {
        let register = usize::from(guest).checked_sub(FIRST)?;
        let number = usize::try_from(offset.div_euclid(PIECE)).ok().filter(|number| *number < PIECES)?;
        (offset % PIECE + size <= PIECE).then_some(Piece { register, number })
    }

    /// All of them.
    fn all() -> impl Iterator<Item = Piece> {
        (0..2).flat_map(|register| (0..PIECES).map(move |number| Piece { register, number }))
    }

    /// Number of the guest register.
    pub fn guest(self) -> u8 {
        (FIRST + self.register) as u8
    }

    /// Its thunk for reading, or for writing as well.
    pub fn thunk(self, thunks: &mut [[u64; 2]; 2 * PIECES], write: bool) -> &mut u64 {
        &mut thunks[self.register * PIECES + self.number][usize::from(write)]
    }

    /// The bit, among those of its register, that says whether it may be read, or written as well.
    pub fn bit(self, write: bool) -> u8 {
        1 << (2 * self.number + usize::from(write))
    }
}

/// Which of the registers an instruction writes, by their numbers behind the first. No instruction writes them unless an
/// operand says so.
pub fn written(ins: &Instruction, info: &mut InstructionInfoFactory) -> [bool; 2] {
    let ours = |guest: Option<u8>| guest.and_then(|guest| usize::from(guest).checked_sub(FIRST));
    let mut written = [false; 2];
    let named = |i| ins.op_kind(i) == OpKind::Register && ours(gpr_number(ins.op_register(i))).is_some();
    if (0..ins.op_count()).any(named) {
        for used in info.info(ins).used_registers() {
            if let Some(register) = ours(gpr_number(used.register())) {
                written[register] |= writes(used.access());
            }
        }
    }
    written
}

/// Emits what makes a piece known, for reading and for writing it: goes on at RCX, with the host address that belongs to
/// the register's value in RCX, or with the carry flag set. Uses RAX.
pub fn emit(a: &mut Assembler, thunks: &mut Thunks, tlb_mask: u32) {
    let [reads, writes] = [false, true].map(|write| field::tlb_tags(Class::User, write));
    for (piece, write) in Piece::all().flat_map(|piece| [(piece, false), (piece, true)]) {
        let register = field::homeless(piece.guest());
        *piece.thunk(&mut thunks.threads, write) = a.here();
        a.store_field(host::RCX, field::temporary(2));
        a.load_field(host::RCX, register);
        a.lea(true, host::RCX, Some(host::RCX), None, piece.number as i32 * PIECE);
        a.tlb_index(host::RAX, host::RCX, tlb_mask);
        a.field_index_op(op::XOR, host::RCX, host::RAX, 8, reads);
        a.cmp_imm(host::RCX, PAGE_SIZE as i32 - PIECE);
        let mut outs = vec![a.jcc(cc::A, 0)];
        if write {
            a.field_index_op(op::LOAD, host::RCX, host::RAX, 8, reads);
            a.field_index_op(op::CMP, host::RCX, host::RAX, 8, writes);
            outs.push(a.jcc(cc::NE, 0));
        }
        a.field_index_op(op::LOAD, host::RCX, host::RAX, 8, field::tlb_distances(Class::User));
        a.field_op(true, op::ADD, host::RCX, register);
        a.store_field(host::RCX, field::thread(piece));
        let known = piece.bit(false) | if write { piece.bit(true) } else { 0 };
        a.or_field8(field::threads_known(piece.register), known); // clears the carry flag
        a.jmp_field(field::temporary(2));
        outs.into_iter().for_each(|out| a.land(out));
        a.bytes.push(0xF9); // stc
        a.jmp_field(field::temporary(2));
    }
}
