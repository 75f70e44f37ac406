//! Memory operands: linear addresses, and the host addresses that take their place.

use super::*;

impl Translator {
    /// Linear address of the memory operand into RCX; uses RAX and the flags. `rsp_bias` is added to RSP.
    pub(in crate::engine) fn address(&mut self, ins: &Instruction, rsp_bias: i32) {
        self.offset(ins, host::RCX, rsp_bias, true);
        self.add_segment_base(ins);
    }

    /// Effective address (offset in the segment) of the memory operand into `dst`; leaves the flags alone.
    /// Uses RAX and RCX. `wide_result` is false if only 32 bits of it are wanted.
    pub(super) fn offset(&mut self, ins: &Instruction, dst: u8, rsp_bias: i32, wide_result: bool) {
        let mask = if wide_result { u64::MAX } else { u32::MAX as u64 };
        let base = ins.memory_base();
        let index = ins.memory_index();
        if ins.is_ip_rel_memory_operand() {
            self.a.mov_imm(dst, ins.ip_rel_memory_address() & mask);
            self.scratch.forget(dst);
            return;
        }
        let disp = ins.memory_displacement64();
        if base == Register::None && index == Register::None {
            self.a.mov_imm(dst, disp & mask);
            self.scratch.forget(dst);
            return;
        }
        let wide = wide_result && (base.size() == 8 || index.size() == 8);
        let bias = if base.full_register() == Register::RSP { rsp_bias } else { 0 };
        let index = gpr_number(index).map(|guest| (guest, ins.memory_index_scale() as u8));
        self.effective_address(dst, gpr_number(base), index, (disp as i32).wrapping_add(bias), wide);
        if classify::has_16_bit_address(ins) {
            self.a.movzx16(dst);
        }
    }

    /// `base + index * scale + disp` of guest registers into `dst`; leaves the flags alone. Uses RAX and RCX.
    pub(super) fn effective_address(
        &mut self,
        dst: u8,
        base: Option<u8>,
        index: Option<(u8, u8)>,
        disp: i32,
        wide: bool,
    ) {
        let base = base.map(|guest| self.held(guest, host::RCX));
        let index = index.map(|(guest, scale)| (self.held(guest, host::RAX), scale));
        match (base, index, disp) {
            (Some(base), None, 0) if wide => self.a.mov(dst, base),
            _ => self.a.lea(wide, dst, base, index, disp),
        }
        if dst == host::RAX || dst == host::RCX {
            self.scratch.forget(dst);
        }
    }

    pub(super) fn add_segment_base(&mut self, ins: &Instruction) {
        let segment = match ins.memory_segment() {
            Register::FS => seg::FS,
            Register::GS => seg::GS,
            _ => return,
        };
        if self.mode.is_direct() {
            self.a.load_field(host::RAX, field::segment_base(segment));
            self.scratch = ScratchRegisters::default();
            self.a.lea(true, host::RCX, Some(host::RCX), Some((host::RAX, 1)), 0);
            return;
        }
        self.clobber_flags();
        self.a.field_op(self.mode.is_64bit(), op::ADD, host::RCX, field::segment_base(segment));
    }

    /// Turns the linear address in RCX into a host address in RCX. Uses RAX and the flags, which are in the slot.
    pub(super) fn lookup(&mut self, size: usize, read: bool, write: bool) {
        self.lookup_range(size, read, write, None, Wanted::Host);
    }

    /// As `lookup`, perhaps for a group, and perhaps with the distance of the page in RCX instead.
    pub(super) fn lookup_range(&mut self, size: usize, read: bool, write: bool, first: Option<First>, wanted: Wanted) {
        if self.mode.is_direct() {
            return;
        }
        debug_assert!(matches!(self.flags, Flags::Slot | Flags::Source) || self.careful);
        let class = self.mode.class();
        self.scratch = ScratchRegisters::default();
        let kind = SiteKind::Memory { size: size as u16, read, write, class, careful: self.careful, first, resume: 0 };
        let site = self.site(kind, self.unretired());
        if self.careful {
            self.site_in_rax(site);
            self.jump_away(self.thunks.memory);
            let here = self.a.here();
            self.resume_at(site, here);
            if wanted == Wanted::Distance {
                self.a.field_op(true, op::SUB, host::RCX, field::SLOW_ADDRESS);
            }
        } else {
            let tags = field::tlb_tags(class, write || first.is_some_and(|first| first.others_write));
            let patch = match wanted {
                Wanted::Host => self.compare_tag(size, tags),
                // Who wants a distance has the address elsewhere: RCX need not keep it.
                Wanted::Distance => {
                    self.a.tlb_index(host::RAX, host::RCX, self.tlb_mask);
                    self.a.field_index_op(op::XOR, host::RCX, host::RAX, 8, tags);
                    self.a.cmp_imm(host::RCX, PAGE_SIZE as i32 - size as i32);
                    self.a.jcc(cc::A, 0)
                }
            };
            let group = first.map(|_| (self.ip, self.unretired()));
            let miss = Miss { site, tags, source: self.source_in_need(), group, wanted };
            self.cold.push(Cold::Memory { patch, miss });
            match wanted {
                Wanted::Host => self.add_distance(),
                Wanted::Distance => {
                    self.a.field_index_op(op::LOAD, host::RCX, host::RAX, 8, field::tlb_distances(class));
                }
            }
            let here = self.a.here();
            self.resume_at(site, here);
        }
    }

    /// Looks for the address in RCX in a TLB; returns the branch that is taken if it is not there, with what differs from
    /// the tag in RAX.
    pub(super) fn compare_tag(&mut self, size: usize, tags: u32) -> u32 {
        self.a.tlb_index(host::RAX, host::RCX, self.tlb_mask);
        self.a.field_index_op(op::LOAD, host::RAX, host::RAX, 8, tags);
        self.a.xor(host::RAX, host::RCX);
        self.a.cmp_imm(host::RAX, PAGE_SIZE as i32 - size as i32);
        self.a.jcc(cc::A, 0)
    }

    /// Turns an address in RCX that the TLB knows into a host address.
    pub(super) fn add_distance(&mut self) {
        self.a.tlb_index(host::RAX, host::RCX, self.tlb_mask);
        self.a.field_index_op(op::ADD, host::RCX, host::RAX, 8, field::tlb_distances(self.mode.class()));
    }

    /// The slow path of a site comes back to `here`. Returns where it came back to before.
    pub(super) fn resume_at(&mut self, site: u32, here: u64) -> u32 {
        match &mut self.sites[(site - self.first_site) as usize].kind {
            SiteKind::Memory { resume, .. } => std::mem::replace(resume, here as u32),
            _ => unreachable!("only accesses come back"),
        }
    }

    /// The host address of an access, which is at `disp` from its registers, by the translation of its group.
    pub(super) fn grouped(&mut self, member: Member, disp: i32) -> Operand {
        let index = member.group;
        let group = self.plan.groups[index];
        let Registers { base, index: scaled, scale } = group.registers;
        if !group.ready
            && let Some(piece) = group.piece
        {
            self.through_thread(index, piece);
        } else if !group.ready {
            self.clobber_flags();
            let home = base.and_then(|base| self.home[base as usize]);
            let wanted = if home.is_some() && scaled.is_none() { Wanted::Distance } else { Wanted::Host };
            self.effective_address(host::RCX, base, scaled.map(|index| (index, scale)), group.start(), true);
            let first = Some(group.first_access());
            self.lookup_range(group.span(), group.first_read, group.first_write, first, wanted);
            self.a.store_field(host::RCX, field::group(index));
            (self.plan.groups[index].ready, self.plan.groups[index].by_distance) = (true, wanted == Wanted::Distance);
        } else if self.scratch.rcx != Some(Holds::Group(index)) {
            self.a.load_field(host::RCX, field::group(index));
        }
        self.scratch.rcx = Some(Holds::Group(index));
        if self.plan.groups[index].by_distance {
            let base = self.held(base.expect("it had a home"), host::RAX);
            return Operand { base, index: Some(host::RCX), scale: 1, disp };
        }
        let disp = if group.piece.is_some() { disp } else { member.offset };
        Operand { base: host::RCX, index: None, disp, ..POINTER }
    }

    /// Puts the host address of what the base of a group points at, by a thread window, into RCX.
    fn through_thread(&mut self, index: usize, piece: Piece) {
        self.clobber_flags();
        let group = self.plan.groups[index];
        let first = Some(group.first_access());
        let (size, read, write) = (group.span() as u16, group.first_read, group.first_write);
        let class = self.mode.class();
        let kind = SiteKind::Memory { size, read, write, class, careful: false, first, resume: 0 };
        let site = self.site(kind, self.unretired());
        self.scratch = ScratchRegisters::default();
        self.a.test_field8(field::threads_known(piece.register), piece.bit(group.write));
        let patch = self.a.jcc(cc::E, 0);
        self.a.load_field(host::RCX, field::thread(piece));
        let back = self.a.here();
        let miss = Miss {
            site,
            tags: field::tlb_tags(class, group.write),
            source: self.source_in_need(),
            group: Some((self.ip, self.unretired())),
            wanted: Wanted::Host,
        };
        self.cold.push(Cold::Thread { patch, back, piece, write: group.write, start: group.start(), span: size, miss });
        if group.count > 1 {
            self.a.store_field(host::RCX, field::group(index));
        }
        self.plan.groups[index].ready = true;
    }

    /// The linear address of the memory operand, if it is a constant of the translation.
    pub(super) fn constant_address(&self, ins: &Instruction) -> Option<u64> {
        if !self.mode.is_64bit() || matches!(ins.memory_segment(), Register::FS | Register::GS) {
            return None;
        }
        if ins.is_ip_rel_memory_operand() {
            return Some(ins.ip_rel_memory_address());
        }
        let none = ins.memory_base() == Register::None && ins.memory_index() == Register::None;
        none.then(|| ins.memory_displacement64())
    }

    /// As `lookup`, for an address whose place in the TLB is known.
    pub(super) fn lookup_constant(&mut self, address: u64, size: usize, read: bool, write: bool) {
        let class = self.mode.class();
        self.scratch = ScratchRegisters::default();
        let kind = SiteKind::Memory { size: size as u16, read, write, class, careful: false, first: None, resume: 0 };
        let site = self.site(kind, self.unretired());
        let place = 8 * ((address >> 12) as u32 & self.tlb_mask);
        let entry = field::tlb_tags(class, write) + place;
        let tag = address & !0xFFF;
        let distance = field::tlb_distances(class) + place;
        let short = tag as i64 == tag as i32 as i64;
        if short {
            self.a.cmp_field_imm(entry, tag as u32);
        } else {
            self.a.mov_imm(host::RAX, tag);
            self.a.field_op(true, op::CMP, host::RAX, entry);
        }
        let patch = self.a.jcc(cc::NE, 0);
        self.cold.push(Cold::Constant { patch, site, address, source: self.source_in_need() });
        self.a.load_field(host::RCX, distance);
        if short {
            self.a.lea(true, host::RCX, Some(host::RCX), None, address as i32);
        } else {
            self.a.lea(true, host::RCX, Some(host::RCX), Some((host::RAX, 1)), (address & 0xFFF) as i32);
        }
        let here = self.a.here();
        self.resume_at(site, here);
    }

    /// Host address of the instruction's memory operand; uses RAX, RCX and perhaps the flags.
    pub(super) fn operand(&mut self, ins: &Instruction, size: usize, read: bool, write: bool) -> Operand {
        if self.mode.is_direct() {
            return self.direct_operand(ins);
        }
        if self.plan.windowed(self.position, Which::Operand) {
            let base = gpr_number(ins.memory_base()).and_then(|base| self.home[base as usize]);
            let base = base.expect("RSP and RBP have homes");
            return Self::in_window(base, ins.memory_displacement64() as i32);
        }
        if let Some(member) = self.plan.member(self.position, Which::Operand) {
            return self.grouped(member, ins.memory_displacement64() as i32);
        }
        if classify::may_fault(ins) {
            self.put_flags_away();
        } else {
            self.clobber_flags();
        }
        if self.can_repeat_address(ins) {
            self.address(ins, 0);
            self.lookup_range(size, read, write, None, Wanted::Distance);
            return self.repeat_address(ins);
        }
        match self.constant_address(ins) {
            Some(address) if !self.careful && (address & 0xFFF) as usize + size <= 4096 => {
                self.lookup_constant(address, size, read, write);
            }
            _ => {
                self.address(ins, 0);
                self.lookup(size, read, write);
            }
        }
        POINTER
    }

    /// The memory operand's address can be computed again behind a lookup, with RAX as the only scratch register, and
    /// without it if the instruction needs that itself.
    fn can_repeat_address(&mut self, ins: &Instruction) -> bool {
        let (base, index) = (ins.memory_base(), ins.memory_index());
        if !self.mode.is_64bit() || !classify::has_plain_address(ins) {
            return false;
        }
        let has_home = |register| gpr_number(register).is_none_or(|guest| self.home[guest as usize].is_some());
        if index == Register::None && has_home(base) {
            return true;
        }
        let uses_rax = classify::pins_rax(ins)
            || classify::pins_rcx(ins)
            || self.mends_flags
            || self.needs[self.position].in_host
            || (0..ins.op_count()).any(|i| {
                let register = ins.op_register(i);
                ins.op_kind(i) == OpKind::Register && (is_high_byte(register) || !has_home(register))
            });
        !uses_rax && (index == Register::None || has_home(base))
    }

    /// The memory operand, with a distance in RCX. Uses RAX unless the address is a register with a home and a constant.
    fn repeat_address(&mut self, ins: &Instruction) -> Operand {
        let disp = ins.memory_displacement64() as i32;
        let base = gpr_number(ins.memory_base());
        let Some(index) = gpr_number(ins.memory_index()) else {
            let base = self.held(base.expect("an address has a register"), host::RAX);
            return Operand { base, index: Some(host::RCX), scale: 1, disp };
        };
        self.effective_address(host::RAX, base, Some((index, ins.memory_index_scale() as u8)), disp, true);
        Operand { base: host::RAX, index: Some(host::RCX), scale: 1, disp: 0 }
    }

    /// An operand in the stack window.
    pub(super) fn in_window(base: u8, disp: i32) -> Operand {
        Operand { base, index: Some(host::DISTANCE), scale: 1, disp }
    }

    /// Host address of stack memory at RSP + `offset`.
    pub(in crate::engine) fn stack(&mut self, offset: i32, size: usize, write: bool) -> Operand {
        if self.mode.is_direct() {
            return Operand { base: host::RSP, disp: offset, ..POINTER };
        }
        if self.plan.windowed(self.position, Which::Stack) {
            return Self::in_window(host::RSP, offset);
        }
        if let Some(member) = self.plan.member(self.position, Which::Stack) {
            return self.grouped(member, offset);
        }
        self.clobber_flags();
        self.a.lea(self.mode.is_64bit(), host::RCX, Some(host::RSP), None, offset);
        self.lookup(size, !write, write);
        POINTER
    }

    /// An operand as a plain pointer in RCX.
    pub(super) fn pointer(&mut self, operand: Operand) {
        if operand != POINTER {
            let index = operand.index.map(|i| (i, operand.scale));
            self.a.lea(true, host::RCX, Some(operand.base), index, operand.disp);
            self.scratch.forget(host::RCX);
        }
    }

    pub(in crate::engine) fn adjust_rsp(&mut self, by: i32) {
        self.popped(by);
        self.a.lea(self.mode.is_64bit(), host::RSP, Some(host::RSP), None, by);
    }

    pub(super) fn word(&self) -> usize {
        if self.mode.is_64bit() { 8 } else { 4 }
    }
}

/// What the translation of an address leaves in RCX.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) enum Wanted {
    /// The host address.
    Host,
    /// Host minus linear address: what the instruction adds to the address that it computes by itself. So the address
    /// need not wait for the comparison.
    Distance,
}

/// Bytes of the addresses that the memory operand is computed in.
pub(super) fn address_size(ins: &Instruction) -> usize {
    let register = if ins.memory_base() != Register::None { ins.memory_base() } else { ins.memory_index() };
    match register {
        Register::None => ins.memory_displ_size() as usize,
        Register::EIP => 4,
        register => register.size(),
    }
}

/// Makes a host address the memory operand.
pub(in crate::engine) fn set_memory(out: &mut Instruction, at: Operand) {
    out.set_segment_prefix(Register::None);
    out.set_memory_base(Register::RAX + at.base as u32);
    out.set_memory_index(at.index.map_or(Register::None, |index| Register::RAX + index as u32));
    out.set_memory_index_scale(u32::from(at.scale));
    out.set_memory_displacement64(at.disp as i64 as u64);
    out.set_memory_displ_size(match at.disp {
        0 => 0,
        disp if disp as i8 as i32 == disp => 1,
        _ => 8,
    });
}
