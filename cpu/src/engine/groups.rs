//! Finds memory accesses of a block that can share one address translation: same base and index registers, with the
//! same values but for changes by constants, offsets that are near each other.
//!
//! The first access of a group is translated for the whole range; if the range lies in one page, the others need
//! no check of their own, because they touch a page that the first one has just touched in the same way. If the first
//! only reads and another writes, the page must be one that can be written without anything else happening.
//!
//! Accesses near RSP, or near RBP where it is known to be RSP and a constant, need no group: the block checks once,
//! in front, that all of them fall into the stack window, and then adds the window's distance.

use super::block::WINDOW_SPANS;
use super::classify::{self, Treatment};
use super::registers::gpr_number;
use super::threads::{self, Piece};
use super::translate::First;
use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

/// Widest range of a group, in bytes.
const SPAN_MAX: i32 = 512;
/// Most groups of a block: slots in the vCPU block.
pub const GROUPS_MAX: usize = 12;
const RSP: usize = 4;
const RBP: usize = 5;

/// The registers that an address is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Guest numbers.
    pub base: Option<u8>,
    pub index: Option<u8>,
    pub scale: u8,
}

impl Registers {
    const fn base(guest: usize) -> Registers {
        Registers { base: Some(guest as u8), index: None, scale: 1 }
    }

    fn are(self, guest: u8) -> bool {
        self.base == Some(guest) || self.index == Some(guest)
    }
}

/// Accesses that share a translation. Offsets are relative to what the registers make when the group begins.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    pub registers: Registers,
    /// All accesses lie in this piece of a thread window.
    pub piece: Option<Piece>,
    /// Some access writes.
    pub write: bool,
    /// The first access writes.
    pub first_write: bool,
    /// Lowest offset and one past the highest, relative to what the registers make when the version began.
    pub min: i32,
    max: i32,
    /// Known change of the address between the version's beginning and the first access.
    bias: i32,
    pub count: u32,
    /// First access: its lowest offset in the version, its size, and how it is meant.
    first: i32,
    first_size: u8,
    pub first_read: bool,
    /// The registers have not changed since.
    open: bool,
    /// The translation has been emitted.
    pub ready: bool,
    /// It is the distance of the range's page, not the host address of the range.
    pub by_distance: bool,
}

impl Group {
    /// Offset of the range from what the registers make at the first access.
    pub fn start(&self) -> i32 {
        self.min - self.bias
    }
    /// Length of the range in bytes.
    pub fn span(&self) -> usize {
        (self.max - self.min) as usize
    }
    /// The first access, for who finds out that the range has no translation yet.
    pub fn first_access(&self) -> First {
        let offset = (self.first - self.min) as u16;
        First { offset, size: self.first_size, others_write: self.write && !self.first_write }
    }
}

/// An access that shares its translation: the number of its group, and where in the group's range it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub group: usize,
    pub offset: i32,
}

/// Widest reach of a block in the stack window.
const WINDOW_SPAN_MAX: i32 = WINDOW_SPANS[WINDOW_SPANS.len() - 1];
/// Offsets from RSP that a block may reach in it.
const WINDOW_REACH: std::ops::Range<i32> = -1024..2048;

/// The plan for one block.
#[derive(Default)]
pub struct Plan {
    pub groups: Vec<Group>,
    /// Lowest and one past the highest offset from RSP, at the block's beginning, that is reached by the window.
    pub window: Option<(i32, i32)>,
    windowed: Vec<[bool; 2]>,
    /// RSP and RBP relative to RSP at the block's beginning, while that is known.
    rsp_now: Option<i32>,
    rbp_now: Option<i32>,
    use_window: bool,
    use_groups: bool,
    /// Registers that have a thread window in this block: it does not write them.
    threads: [bool; 2],
    /// RSP relative to the block's beginning before each instruction, and at the end.
    depth: Vec<Option<i32>>,
    /// For every instruction: the group of its memory operand and of its stack access.
    assigned: Vec<[Option<Assigned>; 2]>,
    /// What has been added to each register since it was last given another value.
    added: [i32; 16],
}

/// The group of an access, and its lowest offset in it.
#[derive(Clone, Copy)]
struct Assigned {
    group: u8,
    low: i32,
    /// It begins the group.
    first: bool,
}

/// Which access of an instruction is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Which {
    Operand = 0,
    Stack = 1,
}

impl Plan {
    /// No groups at all.
    pub fn clear(&mut self) {
        self.groups.clear();
        self.assigned.clear();
        self.windowed.clear();
        self.depth.clear();
        self.window = None;
    }

    /// True if an access goes through the stack window.
    pub fn windowed(&self, instruction: usize, which: Which) -> bool {
        self.windowed.get(instruction).is_some_and(|w| w[which as usize])
    }

    /// True if an access is known to be translated: it goes through the window, or is not the first of its group. So it
    /// cannot leave the block.
    pub fn is_translated(&self, instruction: usize, which: Which) -> bool {
        self.windowed(instruction, which)
            || self.assigned.get(instruction).is_some_and(|assigned| assigned[which as usize].is_some_and(|a| !a.first))
    }

    /// True if all memory accesses of an instruction are known to be translated.
    pub fn stays(&self, instruction: usize, treatment: Treatment) -> bool {
        match treatment {
            Treatment::Plain => self.is_translated(instruction, Which::Operand),
            Treatment::FollowedCall => self.is_translated(instruction, Which::Stack),
            _ => false,
        }
    }

    /// Where RSP is before this instruction, from where it was when the block began.
    pub fn depth(&self, instruction: usize) -> Option<i16> {
        self.depth.get(instruction).copied().flatten().and_then(|depth| depth.try_into().ok())
    }

    /// The host's flags are lost in front of an instruction, or by it; a guess where that depends on more than the plan.
    pub fn clobbers(&self, i: usize, ins: &Instruction, treatment: Treatment) -> bool {
        use Treatment::*;
        match treatment {
            Nothing | Lea | Branch => false,
            Plain => ins.op_kinds().any(|kind| kind == OpKind::Memory) && !self.is_translated(i, Which::Operand),
            Push | Pop => ins.op0_kind() == OpKind::Memory || !self.is_translated(i, Which::Stack),
            FollowedCall => !self.is_translated(i, Which::Stack),
            _ => true,
        }
    }

    /// The place of an access in its group, if it shares its translation with another.
    pub fn member(&self, instruction: usize, which: Which) -> Option<Member> {
        let Assigned { group, low, .. } = self.assigned.get(instruction)?[which as usize]?;
        let found = &self.groups[group as usize];
        (found.count > 1 || found.piece.is_some()).then_some(Member { group: group as usize, offset: low - found.min })
    }

    /// The register, of those that make the address of the instruction's memory operand, that is not looked at for it.
    pub fn spared(&self, instruction: usize) -> Option<u8> {
        let member = self.member(instruction, Which::Operand)?;
        self.groups[member.group].piece.map(Piece::guest)
    }

    /// Plans a block of 64-bit code.
    pub fn make(
        &mut self,
        list: &[(Instruction, Treatment)],
        info: &mut InstructionInfoFactory,
        use_window: bool,
        use_groups: bool,
        use_threads: bool,
    ) {
        self.clear();
        self.added = [0; 16];
        (self.rsp_now, self.rbp_now) = (Some(0), None);
        (self.use_window, self.use_groups) = (use_window, use_groups);
        self.threads = [use_threads && use_groups; 2];
        if self.threads[0] {
            let written = list
                .iter()
                .map(|(ins, _)| threads::written(ins, info))
                .fold([false; 2], |all, one| [all[0] | one[0], all[1] | one[1]]);
            self.threads = written.map(|written| !written);
        }
        for (i, (ins, treatment)) in list.iter().enumerate() {
            self.assigned.push([None; 2]);
            self.windowed.push([false; 2]);
            self.depth.push(self.rsp_now);
            self.accesses(i, ins, *treatment, info);
            self.changes(ins, *treatment, info);
        }
        self.depth.push(self.rsp_now);
    }

    /// Takes an access into the stack window, if it is known to be near.
    fn through_window(&mut self, i: usize, which: Which, base: usize, offset: i32, size: i32) -> bool {
        let known = match base {
            RSP => self.rsp_now,
            RBP => self.rbp_now,
            _ => None,
        };
        let Some(low) = known.map(|base| base + offset).filter(|_| self.use_window) else { return false };
        let high = low + size;
        let (min, max) = self.window.unwrap_or((low, high));
        let (min, max) = (min.min(low), max.max(high));
        let near = min >= WINDOW_REACH.start && max <= WINDOW_REACH.end && max - min <= WINDOW_SPAN_MAX;
        if near {
            self.window = Some((min, max));
            self.windowed[i][which as usize] = true;
        }
        near
    }

    fn accesses(&mut self, i: usize, ins: &Instruction, treatment: Treatment, info: &mut InstructionInfoFactory) {
        use Treatment::*;
        match treatment {
            Plain => {
                let Some(op) = (0..ins.op_count()).find(|op| ins.op_kind(*op) == OpKind::Memory) else { return };
                let access = info.info(ins).op_access(op);
                let size = ins.memory_size().size();
                self.operand(i, ins, size, reads(access), writes(access));
            }
            Push => {
                if ins.op0_kind() == OpKind::Memory {
                    self.operand(i, ins, 8, true, false);
                }
                self.access(i, Which::Stack, Registers::base(RSP), -8, 8, false, true);
            }
            Pop => self.access(i, Which::Stack, Registers::base(RSP), 0, 8, true, false),
            Leave => self.access(i, Which::Stack, Registers::base(RBP), 0, 8, true, false),
            Return | FollowedReturn => self.access(i, Which::Stack, Registers::base(RSP), 0, 8, true, false),
            Call | FollowedCall | PushFlags => self.access(i, Which::Stack, Registers::base(RSP), -8, 8, false, true),
            IndirectJump | IndirectCall => {
                if ins.op0_kind() == OpKind::Memory {
                    self.operand(i, ins, 8, true, false);
                }
                if treatment == IndirectCall {
                    self.access(i, Which::Stack, Registers::base(RSP), -8, 8, false, true);
                }
            }
            _ => {}
        }
    }

    fn operand(&mut self, i: usize, ins: &Instruction, size: usize, read: bool, write: bool) {
        let (base, index) = (ins.memory_base(), ins.memory_index());
        let plain = classify::has_plain_address(ins) && (read || write);
        let offset = ins.memory_displacement64() as i64;
        if plain && offset.abs() < 1 << 24 {
            let scale = if index == Register::None { 1 } else { ins.memory_index_scale() as u8 };
            let registers = Registers { base: gpr_number(base), index: gpr_number(index), scale };
            self.access(i, Which::Operand, registers, offset as i32, size as i32, read, write);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn access(
        &mut self,
        i: usize,
        which: Which,
        registers: Registers,
        offset: i32,
        size: i32,
        read: bool,
        write: bool,
    ) {
        if registers.index.is_none()
            && let Some(base) = registers.base
            && self.through_window(i, which, base as usize, offset, size)
        {
            return;
        }
        if !self.use_groups {
            return;
        }
        let added = |register: Option<u8>| register.map_or(0, |guest| self.added[guest as usize]);
        let bias = added(registers.base) + added(registers.index) * i32::from(registers.scale);
        let (low, high) = (offset + bias, offset + bias + size);
        let piece = match registers {
            Registers { base: Some(base), index: None, .. } => Piece::of(base, offset, size),
            _ => None,
        };
        let piece = piece.filter(|piece| self.threads[piece.register]);
        let fits = |group: &Group| group.open && group.registers == registers && group.piece == piece;
        let candidates = self.groups.iter_mut().enumerate().rev().filter(|(_, group)| fits(group));
        for (number, group) in candidates {
            let (min, max) = (group.min.min(low), group.max.max(high));
            if max - min <= SPAN_MAX {
                group.min = min;
                group.max = max;
                group.count += 1;
                group.write |= write;
                self.assigned[i][which as usize] = Some(Assigned { group: number as u8, low, first: false });
                return;
            }
        }
        if self.groups.len() == GROUPS_MAX {
            return;
        }
        self.assigned[i][which as usize] = Some(Assigned { group: self.groups.len() as u8, low, first: true });
        self.groups.push(Group {
            registers,
            piece,
            write,
            first_write: write,
            min: low,
            max: high,
            bias,
            count: 1,
            first: low,
            first_size: size as u8,
            first_read: read,
            open: true,
            ready: false,
            by_distance: false,
        });
    }

    fn changes(&mut self, ins: &Instruction, treatment: Treatment, info: &mut InstructionInfoFactory) {
        self.stack_changes(ins, treatment, info);
        let addition = match treatment {
            Treatment::Push | Treatment::PushFlags | Treatment::FollowedCall => Some((RSP as u8, -8)),
            Treatment::FollowedReturn => Some((RSP as u8, 8)),
            Treatment::Pop if ins.op0_register() != Register::RSP => Some((RSP as u8, 8)),
            _ => known_addition(ins),
        };
        for used in info.info(ins).used_registers() {
            let Some(guest) = gpr_number(used.register()).filter(|_| writes(used.access())) else { continue };
            let sum = &mut self.added[guest as usize];
            match addition {
                Some((register, by)) if register == guest && (*sum + by).abs() < 1 << 24 => *sum += by,
                _ => {
                    *sum = 0;
                    let made_of = |group: &&mut Group| group.registers.are(guest);
                    self.groups.iter_mut().filter(made_of).for_each(|group| group.open = false);
                }
            }
        }
    }
}

impl Plan {
    /// Follows RSP and RBP from the block's beginning.
    fn stack_changes(&mut self, ins: &Instruction, treatment: Treatment, info: &mut InstructionInfoFactory) {
        let moved = |at: Option<i32>, by: i32| at.map(|at| at + by).filter(|at| at.abs() < 1 << 20);
        match treatment {
            Treatment::Push
            | Treatment::PushFlags
            | Treatment::Call
            | Treatment::FollowedCall
            | Treatment::IndirectCall => {
                self.rsp_now = moved(self.rsp_now, -8);
                return;
            }
            Treatment::Return | Treatment::FollowedReturn => {
                let extra = if ins.op_count() == 1 { ins.immediate16() as i32 } else { 0 };
                self.rsp_now = moved(self.rsp_now, 8 + extra);
                return;
            }
            Treatment::Pop if ins.op0_kind() != OpKind::Register => {
                self.rsp_now = moved(self.rsp_now, 8);
                return;
            }
            Treatment::Pop => {
                self.rsp_now = if ins.op0_register() == Register::RSP { None } else { moved(self.rsp_now, 8) };
                if ins.op0_register() == Register::RBP {
                    self.rbp_now = None;
                }
                return;
            }
            Treatment::Leave => {
                (self.rsp_now, self.rbp_now) = (moved(self.rbp_now, 8), None);
                return;
            }
            _ => {}
        }
        let to_rbp = ins.op_count() == 2 && ins.op0_kind() == OpKind::Register && ins.op0_register() == Register::RBP;
        let from_rsp = match ins.code() {
            Code::Mov_rm64_r64 | Code::Mov_r64_rm64 if ins.op1_kind() == OpKind::Register => {
                (ins.op1_register() == Register::RSP).then_some(0)
            }
            Code::Lea_r64_m if ins.memory_base() == Register::RSP && ins.memory_index() == Register::None => {
                let offset = ins.memory_displacement64() as i64;
                (offset.abs() < 1 << 20).then_some(offset as i32)
            }
            _ => None,
        };
        if to_rbp && let Some(by) = from_rsp {
            self.rbp_now = moved(self.rsp_now, by);
            return;
        }
        match known_addition(ins).map(|(guest, by)| (usize::from(guest), by)) {
            Some((RSP, by)) => {
                self.rsp_now = moved(self.rsp_now, by);
                return;
            }
            Some((RBP, by)) => {
                self.rbp_now = moved(self.rbp_now, by);
                return;
            }
            _ => {}
        }
        for used in info.info(ins).used_registers() {
            if writes(used.access()) {
                match gpr_number(used.register()).map(usize::from) {
                    Some(RSP) => self.rsp_now = None,
                    Some(RBP) => self.rbp_now = None,
                    _ => {}
                }
            }
        }
    }
}

/// A register of 64 bits to which the instruction adds a constant, and the constant.
fn known_addition(ins: &Instruction) -> Option<(u8, i32)> {
    if ins.op_count() == 0 || ins.op0_kind() != OpKind::Register || !ins.op0_register().is_gpr64() {
        return None;
    }
    let by = match ins.code() {
        Code::Inc_rm64 => 1,
        Code::Dec_rm64 => -1,
        Code::Add_rm64_imm8 | Code::Add_rm64_imm32 | Code::Add_RAX_imm32 => ins.immediate(1) as i64,
        Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 | Code::Sub_RAX_imm32 => (ins.immediate(1) as i64).checked_neg()?,
        Code::Lea_r64_m if ins.memory_base() == ins.op0_register() && ins.memory_index() == Register::None => {
            ins.memory_displacement64() as i64
        }
        _ => return None,
    };
    (by.abs() < 1 << 24).then_some((gpr_number(ins.op0_register())?, by as i32))
}

/// The operand's old value is used.
pub fn reads(access: OpAccess) -> bool {
    matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// The operand may be written.
pub fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// Instructions whose memory operand must be reached through a plain pointer.
pub fn needs_pointer(ins: &Instruction) -> bool {
    matches!(ins.mnemonic(), Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b)
}

#[cfg(test)]
mod tests {
    use super::super::mode::Mode;
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn plan(bytes: &[u8]) -> Plan {
        let mode = Mode::of(&crate::state::CpuState::long_mode_boot(0, 0, 0, 0, 0, 0));
        let list: Vec<_> = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE)
            .iter()
            .map(|ins| (ins, classify::treatment(&ins, mode)))
            .collect();
        let mut plan = Plan::default();
        plan.make(&list, &mut InstructionInfoFactory::new(), true, true, false);
        plan
    }

    #[test]
    fn accesses_near_one_base_share_a_translation() {
        // movzx edx, byte [rax]; test dl, dl; jns +4; movzx esi, byte [rax+1]
        let plan = plan(&[0x0F, 0xB6, 0x10, 0x84, 0xD2, 0x79, 0x04, 0x0F, 0xB6, 0x70, 0x01]);
        assert_eq!(plan.groups.len(), 1);
        assert_eq!(plan.member(0, Which::Operand), Some(Member { group: 0, offset: 0 }));
        assert_eq!(plan.member(3, Which::Operand), Some(Member { group: 0, offset: 1 }));
    }

    #[test]
    fn a_group_follows_constants_and_ends_where_its_index_changes() {
        // mov rax, [rbx+rcx*8+8]; mov rdx, [rbx+rcx*8]; inc rcx; mov rsi, [rbx+rcx*8]
        let code = [0x48, 0x8B, 0x44, 0xCB, 0x08, 0x48, 0x8B, 0x14, 0xCB, 0x48, 0xFF, 0xC1, 0x48, 0x8B, 0x34, 0xCB];
        let first = plan(&code);
        assert_eq!(first.groups.len(), 1);
        assert_eq!(first.member(0, Which::Operand), Some(Member { group: 0, offset: 8 }));
        assert_eq!(first.member(1, Which::Operand), Some(Member { group: 0, offset: 0 }));
        assert_eq!(first.member(3, Which::Operand), Some(Member { group: 0, offset: 8 }));
        // inc ecx instead: it may wrap.
        let mut narrow = code.to_vec();
        narrow.remove(9);
        let narrow = plan(&narrow);
        assert_eq!(narrow.groups.len(), 2);
        assert_eq!(narrow.member(3, Which::Operand), None);
    }

    #[test]
    fn a_write_behind_a_read_joins_its_group() {
        // mov rax, [rbx]; inc rax; mov [rbx], rax
        let plan = plan(&[0x48, 0x8B, 0x03, 0x48, 0xFF, 0xC0, 0x48, 0x89, 0x03]);
        assert_eq!(plan.groups.len(), 1);
        assert!(plan.groups[0].write && !plan.groups[0].first_write);
        assert_eq!(plan.member(2, Which::Operand), Some(Member { group: 0, offset: 0 }));
    }
}
