//! Instructions that are emitted as themselves, with renamed registers.

use super::*;

impl Translator {
    /// Any instruction that executes natively.
    pub(super) fn plain(&mut self, ins: &Instruction) {
        if (0..ins.op_count()).any(|i| ins.op_kind(i) == OpKind::Register && is_high_byte(ins.op_register(i))) {
            self.scratch = ScratchRegisters::default();
            self.high_byte(ins);
            self.scratch = ScratchRegisters::default();
            return;
        }
        if self.move_register(ins) || self.exchange(ins) {
            return;
        }
        let mut use_of = Use::of(self.info.info(ins), ins);
        let mut out = *ins;
        out.set_code(classify::general_form(ins.code()));
        out.set_has_lock_prefix(false);

        let mut at = POINTER;
        if let Some((_, access)) = use_of.memory {
            at = self.operand(ins, ins.memory_size().size(), reads(access), writes(access));
            self.touch_first(ins, at);
            if needs_pointer(ins) {
                self.pointer(at);
                at = POINTER;
            }
        }
        if self.mends_flags {
            self.save_flags();
        } else if self.needs[self.position].in_host {
            self.need_flags();
        }
        if classify::may_fault(ins) || self.mode.is_direct() {
            self.leave_source();
        }

        let kept = self.keep_operands(ins, &mut out, at, &mut use_of.memory);
        let (pin_rax, pin_rcx) = (classify::pins_rax(ins), classify::pins_rcx(ins));
        if pin_rax || pin_rcx {
            self.scratch = ScratchRegisters::default();
        }
        let mut scratch = Scratch {
            rax: !pin_rax && at.base != host::RAX,
            rcx: !pin_rcx && use_of.memory.is_none(),
            taken: use_of.gprs | self.inhabited_here(),
            borrowed: [0; 3],
            borrowed_count: 0,
        };
        if use_of.memory.is_some() {
            if pin_rcx {
                self.pointer(at);
                at = Operand { base: self.take(&mut scratch), ..POINTER };
                self.a.mov(at.base, host::RCX);
            }
            set_memory(&mut out, at);
        }
        if pin_rax {
            self.fetch(host::RAX, 0);
        }
        if pin_rcx {
            self.fetch(host::RCX, 1);
        }
        // A register that a scratch register holds is nearer than its place in the vCPU block.
        let near = (0..ins.op_count()).any(|i| {
            let guest = (ins.op_kind(i) == OpKind::Register).then(|| gpr_number(ins.op_register(i))).flatten();
            guest.is_some_and(|guest| self.scratch.find(guest).is_some())
        });
        let in_place = match use_of.memory {
            None if kept.is_none() && !pin_rax && !pin_rcx && !near => {
                homeless::use_place(&mut out, &use_of.access, &self.home)
            }
            _ => None,
        };
        if let Some(guest) = in_place.and_then(|i| gpr_number(ins.op_register(i))) {
            self.scratch.changed(guest);
        }
        let mut write_back: [Option<(u8, u8)>; 4] = [None; 4];
        let mut assigned: [Option<(u8, u8)>; 4] = [None; 4];
        for i in 0..ins.op_count() {
            if ins.op_kind(i) != OpKind::Register || in_place == Some(i) {
                continue;
            }
            let register = ins.op_register(i);
            let Some(guest) = gpr_number(register) else { continue };
            // An operand that is pinned too is the pinned register itself.
            if pin_rax && guest == 0 || pin_rcx && guest == 1 {
                continue;
            }
            let host_register = match self.home[guest as usize] {
                Some(home) => home,
                None => {
                    let access = use_of.access[i as usize];
                    let earlier = assigned.iter().flatten().find(|(g, _)| *g == guest).map(|(_, h)| *h);
                    let holder = self.scratch.find(guest).filter(|register| scratch.is_free(*register));
                    let (temp, fresh) = match earlier.or(holder) {
                        Some(temp) => (temp, false),
                        None => (self.take(&mut scratch), true),
                    };
                    scratch.use_up(temp);
                    let whole = access == OpAccess::Write && register.size() >= 4 && !conditional_result(ins);
                    let read_elsewhere = use_of.reads_gpr(guest);
                    if fresh && (!whole || read_elsewhere) {
                        self.a.load_field(temp, field::homeless(guest));
                    }
                    if fresh {
                        self.scratch.set(temp, Some(Holds::Guest(guest)));
                    }
                    assigned[i as usize] = Some((guest, temp));
                    if writes(access) {
                        write_back[i as usize] = Some((guest, temp));
                    }
                    temp
                }
            };
            out.set_op_register(i, sized(register, host_register));
        }

        let flags_in_host = self.flags != Flags::Slot;
        let accesses = self.mode.is_direct() && use_of.memory.is_some();
        let fault = (classify::may_fault(ins) || accesses).then(|| {
            let kind = SiteKind::Fault {
                flags_in_host,
                borrowed: std::array::from_fn(|i| (i < scratch.borrowed_count).then_some(scratch.borrowed[i])),
                residents: self.residents_here(),
            };
            self.site(kind, self.unretired())
        });
        let encoded = self.encode(ins, &out);
        if let Some(site) = fault {
            self.faults.push((self.last_native as u32, site));
        }
        for (guest, temp) in write_back.into_iter().flatten() {
            self.a.store_field(temp, field::homeless(guest));
            self.scratch.changed(guest);
            self.scratch.set(temp, Some(Holds::Guest(guest)));
        }
        if pin_rax || pin_rcx {
            self.scratch = ScratchRegisters::default();
        }
        if pin_rax && use_of.writes_rax {
            self.a.mov(HOME[0].expect("guest RAX has a home"), host::RAX);
        }
        if pin_rcx && use_of.writes_rcx {
            self.a.mov(HOME[1].expect("guest RCX has a home"), host::RCX);
        }
        for i in 0..scratch.borrowed_count {
            self.a.load_field(scratch.borrowed[i], field::temporary(4 + i as u32));
        }
        if self.mends_flags {
            self.a.merge_zero_flag(field::FLAGS);
            self.scratch = ScratchRegisters::default();
            (self.flags, self.source) = (Flags::Slot, None);
        } else if use_of.flags_out && encoded {
            self.flags_from(ins, &out);
            if let Some(kept) = kept {
                self.source = Source::with_kept(&out, kept, &self.home);
            }
        }
    }

    /// MOV between general registers of 32 or 64 bits: straight to or from the vCPU block if one lives there.
    pub(super) fn move_register(&mut self, ins: &Instruction) -> bool {
        if ins.mnemonic() != Mnemonic::Mov
            || ins.op0_kind() != OpKind::Register
            || ins.op1_kind() != OpKind::Register
            || ins.op0_register().size() < 4
        {
            return false;
        }
        let (Some(dst), Some(src)) = (gpr_number(ins.op0_register()), gpr_number(ins.op1_register())) else {
            return false;
        };
        let wide = ins.op0_register().size() == 8;
        match (self.home[dst as usize], self.home[src as usize]) {
            (Some(to), Some(from)) if wide => self.a.mov(to, from),
            (Some(to), Some(from)) => self.a.mov32(to, from),
            (Some(to), None) => match self.scratch.find(src) {
                Some(register) if wide => self.a.mov(to, register),
                Some(register) => self.a.mov32(to, register),
                None => self.a.field_op(wide, op::LOAD, to, field::homeless(src)),
            },
            (None, Some(from)) if wide => {
                self.a.store_field(from, field::homeless(dst));
                self.scratch.changed(dst);
            }
            (None, from) => {
                match from {
                    Some(from) => self.a.mov32(host::RAX, from),
                    None => self.a.field_op(wide, op::LOAD, host::RAX, field::homeless(src)),
                }
                self.a.store_field(host::RAX, field::homeless(dst));
                self.scratch.changed(dst);
                self.scratch.rax = Some(Holds::Guest(dst));
            }
        }
        true
    }

    /// XCHG of memory and a register that has a home: a load and a store, for there is one vCPU and the processor's own
    /// instruction locks the bus.
    pub(super) fn exchange(&mut self, ins: &Instruction) -> bool {
        if !matches!(ins.code(), Code::Xchg_rm32_r32 | Code::Xchg_rm64_r64) || ins.op0_kind() != OpKind::Memory {
            return false;
        }
        let Some(home) = gpr_number(ins.op1_register()).and_then(|guest| self.home[guest as usize]) else {
            return false;
        };
        self.scratch = ScratchRegisters::default();
        let size = ins.memory_size().size();
        let mut at = self.operand(ins, size, true, true);
        if at.base == host::RAX {
            self.pointer(at);
            at = POINTER;
        }
        self.may_fault_here();
        self.a.load(size, host::RAX, at);
        self.may_fault_here();
        self.a.store(size, at, home);
        self.a.mov(home, host::RAX);
        self.scratch = ScratchRegisters::default();
        true
    }

    /// A scratch register for one instruction: RAX or RCX if free, else another one, borrowed.
    pub(super) fn take(&mut self, scratch: &mut Scratch) -> u8 {
        // Rather one that holds nothing.
        let rather_rcx = scratch.rcx && self.scratch.rcx.is_none() && self.scratch.rax.is_some();
        if scratch.rax && !rather_rcx {
            scratch.rax = false;
            self.scratch.rax = None;
            return host::RAX;
        }
        if scratch.rcx {
            scratch.rcx = false;
            self.scratch.rcx = None;
            return host::RCX;
        }
        let free = BORROWABLE.iter().copied().find(|r| scratch.taken & 1 << r == 0);
        let register = free.expect("no instruction uses all borrowable registers");
        scratch.taken |= 1 << register;
        self.a.store_field(register, field::temporary(4 + scratch.borrowed_count as u32));
        scratch.borrowed[scratch.borrowed_count] = register;
        scratch.borrowed_count += 1;
        register
    }

    /// Instructions with AH, CH, DH or BH, which cannot be combined with a REX prefix: guest RAX and RCX are
    /// brought into the host registers of the same name for them.
    pub(super) fn high_byte(&mut self, ins: &Instruction) {
        let use_of = Use::of(self.info.info(ins), ins);
        let mut out = *ins;
        out.set_code(classify::general_form(ins.code()));
        out.set_has_lock_prefix(false);
        let memory = use_of.memory;
        if let Some((_, access)) = memory {
            let at = self.operand(ins, ins.memory_size().size(), reads(access), writes(access));
            self.pointer(at);
            set_memory(&mut out, POINTER);
        }
        if self.needs[self.position].in_host {
            self.need_flags();
        }
        if classify::may_fault(ins) || self.mode.is_direct() {
            self.leave_source();
        }
        // The implicit AX of a multiplication, division or exchange.
        let mut rax_holds = classify::pins_rax(ins).then_some(0);
        let mut rcx_holds = None;
        for i in 0..ins.op_count() {
            if ins.op_kind(i) != OpKind::Register {
                continue;
            }
            let register = ins.op_register(i);
            match gpr_number(register) {
                Some(0) => rax_holds = Some(0),
                Some(1) if memory.is_some() => {
                    // RCX holds the address; the only register operand goes to RAX.
                    rax_holds = Some(1);
                    let renamed = if register == Register::CH { Register::AH } else { sized(register, host::RAX) };
                    out.set_op_register(i, renamed);
                }
                Some(1) => rcx_holds = Some(1),
                _ => {}
            }
        }
        // SHL AH, CL and its like.
        if ins.op_count() == 2 && ins.op1_kind() == OpKind::Register && ins.op1_register() == Register::CL {
            rcx_holds = Some(1);
        }
        if let Some(guest) = rax_holds {
            self.fetch(host::RAX, guest);
        }
        if let Some(guest) = rcx_holds {
            self.fetch(host::RCX, guest);
        }
        let accesses = self.mode.is_direct() && memory.is_some();
        let fault = (classify::may_fault(ins) || accesses).then(|| {
            let flags_in_host = self.flags != Flags::Slot;
            let residents = self.residents_here();
            self.site(SiteKind::Fault { flags_in_host, borrowed: Borrowed::default(), residents }, self.unretired())
        });
        self.encode(ins, &out);
        if let Some(site) = fault {
            self.faults.push((self.last_native as u32, site));
        }
        if let Some(guest) = rax_holds {
            self.a.mov(HOME[guest as usize].expect("RAX and RCX have homes"), host::RAX);
        }
        if let Some(guest) = rcx_holds {
            self.a.mov(HOME[guest as usize].expect("RAX and RCX have homes"), host::RCX);
        }
        if use_of.flags_out {
            (self.flags, self.source) = (Flags::Host(Overflow::Any), None);
        }
    }
}

/// Scratch registers during one instruction.
pub(super) struct Scratch {
    pub(super) rax: bool,
    pub(super) rcx: bool,
    /// Registers that the instruction uses, as a bit mask.
    pub(super) taken: u32,
    pub(super) borrowed: [u8; 3],
    pub(super) borrowed_count: usize,
}

impl Scratch {
    pub(super) fn is_free(&self, register: u8) -> bool {
        register == host::RAX && self.rax || register == host::RCX && self.rcx
    }

    /// RAX or RCX has a use now.
    pub(super) fn use_up(&mut self, register: u8) {
        self.rax &= register != host::RAX;
        self.rcx &= register != host::RCX;
    }
}

/// What one instruction reads and writes, as far as the translator cares.
pub(super) struct Use {
    /// The memory operand and how it is accessed.
    pub(super) memory: Option<(u32, OpAccess)>,
    pub(super) access: [OpAccess; 5],
    /// General-purpose registers used in any way, as a bit mask.
    pub(super) gprs: u32,
    /// General-purpose registers read, as a bit mask.
    pub(super) gprs_read: u32,
    pub(super) writes_rax: bool,
    pub(super) writes_rcx: bool,
    pub(super) flags_out: bool,
}

impl Use {
    pub(super) fn of(info: &InstructionInfo, ins: &Instruction) -> Use {
        let mut access = [OpAccess::None; 5];
        let mut memory = None;
        for i in 0..ins.op_count() {
            access[i as usize] = info.op_access(i);
            if ins.op_kind(i) == OpKind::Memory {
                memory = Some((i, info.op_access(i)));
            }
        }
        let (mut gprs, mut gprs_read, mut written) = (0, 0, 0);
        for used in info.used_registers() {
            if let Some(number) = gpr_number(used.register()) {
                gprs |= 1 << number;
                if reads(used.access()) {
                    gprs_read |= 1 << number;
                }
                if writes(used.access()) {
                    written |= 1 << number;
                }
            }
        }
        let mut modified = ins.rflags_modified() & STATUS;
        if classify::rotates_through_carry(ins) {
            // By whole turns it leaves the value alone, but not OF.
            modified |= RflagsBits::OF | RflagsBits::CF;
        }
        Use {
            memory,
            access,
            gprs,
            gprs_read,
            writes_rax: written & 1 != 0,
            writes_rcx: written & 2 != 0,
            flags_out: modified != 0,
        }
    }

    pub(super) fn reads_gpr(&self, guest: u8) -> bool {
        self.gprs_read & 1 << guest != 0
    }
}

/// The destination may stay as it was although it counts as written.
pub(super) fn conditional_result(ins: &Instruction) -> bool {
    matches!(ins.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr)
}
