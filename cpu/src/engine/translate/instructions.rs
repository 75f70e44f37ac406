//! Instructions that are emitted as something else than themselves.

use super::*;

impl Translator {
    pub(super) fn instruction(&mut self, ins: &Instruction, treatment: Treatment) {
        let keeps_track = !self.mode.is_direct()
            && matches!(treatment, Treatment::Plain | Treatment::Lea | Treatment::Nothing | Treatment::Branch);
        if !keeps_track {
            self.scratch = ScratchRegisters::default();
        }
        self.treat(ins, treatment);
        if !keeps_track {
            self.scratch = ScratchRegisters::default();
        }
    }

    pub(super) fn treat(&mut self, ins: &Instruction, treatment: Treatment) {
        if self.mode.is_direct() && self.direct_stack(ins, treatment) {
            return;
        }
        match treatment {
            Treatment::Nothing => {}
            Treatment::Plain => {
                self.plain(ins);
                self.check_stack(ins);
            }
            Treatment::ZeroUpper => self.zero_upper(ins.mnemonic() == Mnemonic::Vzeroall),
            Treatment::Lea => {
                self.load_effective_address(ins);
                self.check_stack(ins);
            }
            Treatment::BitString => self.bit_string(ins),
            Treatment::Push => self.push(ins),
            Treatment::Pop => self.pop(ins),
            Treatment::Leave => self.leave_frame(),
            Treatment::Jump => {
                self.save_flags();
                self.link(ins.near_branch_target());
            }
            Treatment::Branch => match self.follower {
                Some(next) => self.side_branch(ins, next),
                None => self.branch(ins),
            },
            Treatment::CountBranch => self.count_branch(ins),
            Treatment::Call => {
                self.push_constant(ins.next_ip());
                self.save_flags();
                self.link(ins.near_branch_target());
            }
            Treatment::FollowedCall => self.push_constant(ins.next_ip()),
            Treatment::FollowedReturn => {
                self.followed_return(self.follower.expect("a return that is followed is followed by something"));
            }
            Treatment::IndirectJump => {
                self.branch_target(ins);
                self.indirect(0);
            }
            Treatment::IndirectCall => {
                self.branch_target(ins);
                if self.call_through_window(ins.next_ip()) {
                    return;
                }
                self.check_canonical();
                self.a.store_field(host::RCX, field::temporary(1));
                self.push_constant(ins.next_ip());
                self.a.load_field(host::RCX, field::temporary(1));
                self.indirect(0);
            }
            Treatment::Return => {
                let word = self.word();
                let at = self.stack(0, word, false);
                self.a.load(word, host::RCX, at);
                let extra = if ins.op_count() == 1 { ins.immediate16() as i32 } else { 0 };
                self.adjust_rsp(word as i32 + extra);
                self.indirect(word as i32 + extra);
            }
            Treatment::ClearInterrupt => self.system_flag(rflags::IF, false),
            Treatment::SetInterrupt => self.set_interrupt(ins),
            Treatment::Direction => self.system_flag(rflags::DF, ins.mnemonic() == Mnemonic::Std),
            Treatment::SwapGs => {
                let base = field::segment_base(seg::GS);
                self.a.load_field(host::RAX, base);
                self.a.load_field(host::RCX, field::KERNEL_GS_BASE);
                self.a.store_field(host::RCX, base);
                self.a.store_field(host::RAX, field::KERNEL_GS_BASE);
            }
            Treatment::ReadTsc => self.read_tsc(ins),
            Treatment::RepeatedMove if self.mode.is_direct() => self.repeated_move(ins),
            Treatment::RepeatedMove => self.repeated_in_pages(ins),
            Treatment::PushFlags => self.push_flags(),
            Treatment::ReadSelector => self.read_selector(ins),
            Treatment::SegmentBase => self.segment_base(ins),
            Treatment::AccessFlag => {
                self.system_flag(rflags::AC, ins.mnemonic() == Mnemonic::Stac);
                self.link(ins.next_ip());
            }
            Treatment::Emulate => {
                self.save_flags();
                let site = self.emulation_site(ins, 0);
                let patch = self.a.jmp(0);
                self.cold.push(Cold::Leave { patch, site });
            }
        }
    }

    fn read_selector(&mut self, ins: &Instruction) {
        let selector = field::selector(ins.op1_register().number());
        match gpr_number(ins.op0_register()).filter(|_| ins.op0_kind() == OpKind::Register) {
            Some(guest) => {
                self.a.load_field16_eax(selector);
                match self.home[guest as usize] {
                    _ if ins.op0_register().size() > 2 => self.put(guest, host::RAX),
                    Some(home) => self.a.mov16(home, host::RAX),
                    None => self.a.store(2, Assembler::field(field::homeless(guest)), host::RAX),
                }
            }
            None => {
                let at = self.operand(ins, 2, false, true);
                self.pointer(at);
                self.a.load_field16_eax(selector);
                self.a.store(2, POINTER, host::RAX);
            }
        }
    }

    fn segment_base(&mut self, ins: &Instruction) {
        use Mnemonic::{Rdfsbase, Rdgsbase, Wrfsbase};
        let base = field::segment_base(if matches!(ins.mnemonic(), Rdfsbase | Wrfsbase) { seg::FS } else { seg::GS });
        let guest = gpr_number(ins.op0_register()).expect("a general register");
        if matches!(ins.mnemonic(), Rdfsbase | Rdgsbase) {
            self.a.load_field(host::RAX, base);
            self.put(guest, host::RAX);
            return;
        }
        self.put_flags_away();
        self.fetch(host::RCX, guest);
        self.compare_canonical();
        let site = self.emulation_site(ins, self.unretired());
        self.leave_if(cc::NE, site);
        self.a.store_field(host::RCX, base);
    }

    pub(super) fn load_effective_address(&mut self, ins: &Instruction) {
        let dst = ins.op0_register();
        let guest = gpr_number(dst).expect("LEA writes a general register");
        let home = self.home[guest as usize];
        if dst.size() == 2 {
            self.offset(ins, host::RCX, 0, false);
            self.scratch = ScratchRegisters::default();
            let target = self.held(guest, host::RAX);
            self.scratch = ScratchRegisters::default();
            self.a.mov16(target, host::RCX);
            if home.is_none() {
                self.a.store_field(target, field::homeless(guest));
            }
            return;
        }
        let target = home.unwrap_or(host::RAX);
        self.offset(ins, target, 0, dst.size() == 8);
        if home.is_none() {
            self.a.store_field(target, field::homeless(guest));
            self.scratch.changed(guest);
            self.scratch.set(target, Some(Holds::Guest(guest)));
        }
    }

    pub(super) fn bit_string(&mut self, ins: &Instruction) {
        let offset_register = ins.op1_register();
        let guest = gpr_number(offset_register).expect("the bit offset is a general register");
        let size = offset_register.size();
        self.clobber_flags();
        self.offset(ins, host::RCX, 0, true);
        self.fetch(host::RAX, guest);
        match size {
            8 => self.a.put(&[0x48, 0xC1, 0xF8, 6]),                         // sar rax, 6
            4 => self.a.put(&[0x48, 0x63, 0xC0, 0x48, 0xC1, 0xF8, 5]),       // movsxd rax, eax; sar rax, 5
            _ => self.a.put(&[0x48, 0x0F, 0xBF, 0xC0, 0x48, 0xC1, 0xF8, 4]), // movsx rax, ax; sar rax, 4
        }
        // The distance counts before the effective address is cut to the address size.
        let wide = self.mode.is_64bit() && address_size(ins) == 8;
        self.a.lea(wide, host::RCX, Some(host::RCX), Some((host::RAX, size as u8)), 0);
        self.add_segment_base(ins);
        self.lookup(size, true, ins.mnemonic() != Mnemonic::Bt);
        self.fetch(host::RAX, guest);
        self.a.and32(host::RAX, size as u32 * 8 - 1);
        self.a.store_field(host::RAX, field::temporary(1));
        self.need_flags();
        self.a.load_field(host::RAX, field::temporary(1));
        let mut out = *ins;
        out.set_has_lock_prefix(false);
        out.set_op1_register(sized(offset_register, host::RAX));
        set_memory(&mut out, POINTER);
        self.may_fault_here();
        self.encode(ins, &out);
        (self.flags, self.source) = (Flags::Host(Overflow::Any), None);
    }

    pub(super) fn push(&mut self, ins: &Instruction) {
        let word = self.word();
        let down = -(word as i32);
        match ins.op0_kind() {
            OpKind::Register => {
                let guest = gpr_number(ins.op0_register()).expect("segment registers are emulated");
                let at = self.stack(down, word, true);
                let value = self.held(guest, host::RAX);
                self.a.store(word, at, value);
            }
            OpKind::Memory => {
                let from = self.operand(ins, word, true, false);
                self.a.load(word, host::RAX, from);
                self.a.store_field(host::RAX, field::temporary(1));
                let to = self.stack(down, word, true);
                self.a.load_field(host::RAX, field::temporary(1));
                self.a.store(word, to, host::RAX);
            }
            _ => {
                self.push_constant(ins.immediate(0));
                return;
            }
        }
        self.adjust_rsp(down);
    }

    pub(super) fn push_constant(&mut self, value: u64) {
        if self.mode.is_direct() {
            self.direct_push_constant(value);
            return;
        }
        let word = self.word();
        let at = self.stack(-(word as i32), word, true);
        if word == 4 || value as i64 == value as i32 as i64 {
            self.a.store_imm(word, at, value as u32);
        } else {
            self.a.mov_imm(host::RAX, value);
            self.a.store(8, at, host::RAX);
        }
        self.adjust_rsp(-(word as i32));
    }

    pub(super) fn pop(&mut self, ins: &Instruction) {
        let word = self.word();
        let at = self.stack(0, word, false);
        if ins.op0_kind() == OpKind::Register {
            let guest = gpr_number(ins.op0_register()).expect("segment registers are emulated");
            match self.home[guest as usize] {
                Some(host::RSP) => {
                    self.a.load(word, host::RSP, at);
                    return;
                }
                Some(home) => self.a.load(word, home, at),
                None => {
                    self.a.load(word, host::RAX, at);
                    self.a.store_field(host::RAX, field::homeless(guest));
                }
            }
        } else {
            self.a.load(word, host::RAX, at);
            self.a.store_field(host::RAX, field::temporary(1));
            // An address based on RSP uses its value after the pop.
            self.clobber_flags();
            self.address(ins, word as i32);
            self.lookup(word, false, true);
            self.a.load_field(host::RAX, field::temporary(1));
            self.a.store(word, POINTER, host::RAX);
        }
        self.adjust_rsp(word as i32);
    }

    pub(super) fn leave_frame(&mut self) {
        let word = self.word();
        let at = if self.plan.windowed(self.position, Which::Stack) {
            Self::in_window(host::RBP, 0)
        } else if let Some(member) = self.plan.member(self.position, Which::Stack) {
            self.grouped(member, 0)
        } else {
            self.clobber_flags();
            self.a.lea(word == 8, host::RCX, Some(host::RBP), None, 0);
            self.lookup(word, true, false);
            POINTER
        };
        // RSP is a function of the old RBP, which the load replaces.
        self.a.lea(word == 8, host::RSP, Some(host::RBP), None, word as i32);
        self.a.load(word, host::RBP, at);
    }

    /// Sets or clears one flag of RFLAGS that is not a status flag.
    pub(super) fn system_flag(&mut self, flag: u64, set: bool) {
        self.put_flags_away();
        let value = if set { flag as u32 } else { !(flag as u32) };
        self.a.or_and_field_imm32(set, field::RFLAGS, value);
    }

    /// STI in the middle of a block: nothing can come between it and the next instruction, so that its shadow is
    /// only needed when an interrupt waits for it.
    pub(super) fn set_interrupt(&mut self, ins: &Instruction) {
        self.put_flags_away();
        self.a.cmp_field_imm32(field::WINDOW_WANTED, 0);
        let site = self.emulation_site(ins, self.unretired());
        self.leave_if(cc::NE, site);
        self.system_flag(rflags::IF, true);
    }

    /// RDTSC and RDTSCP: ticks when the budget is used up, less those of the instructions until then.
    pub(super) fn read_tsc(&mut self, ins: &Instruction) {
        self.put_flags_away();
        self.a.cmp_field_imm32(field::TSC_KNOWN, 0);
        let site = self.emulation_site(ins, self.unretired());
        self.leave_if(cc::E, site);
        self.a.lea(true, host::RAX, Some(host::BUDGET), None, self.unretired() as i32);
        self.a.imul_rax_field(field::TSC_PER_INSTRUCTION);
        self.a.load_field(host::RCX, field::TSC_AT_LIMIT);
        self.a.sub(host::RCX, host::RAX);
        self.a.field_op(true, op::ADD, host::RCX, field::TSC_OFFSET);
        self.a.mov32(HOME[0].expect("guest RAX has a home"), host::RCX);
        self.a.put(&[0x48, 0xC1, 0xE9, 32]); // shr rcx, 32
        self.a.mov32(HOME[2].expect("guest RDX has a home"), host::RCX);
        if ins.mnemonic() == Mnemonic::Rdtscp {
            self.a.load_field(HOME[1].expect("guest RCX has a home"), field::TSC_AUX);
        }
    }

    pub(super) fn push_flags(&mut self) {
        self.put_flags_away();
        let at = self.stack(-8, 8, true);
        // The image needs the host's flags, and RCX is part of the address: build the image in RAX, piece by piece into a temporary.
        self.a.field_op(false, op::LOAD, host::RAX, field::FLAGS);
        self.a.put(&[0x0F, 0xB6, 0xC4]); // movzx eax, ah
        self.a.and32(host::RAX, 0xD5);
        self.a.store_field(host::RAX, field::temporary(1));
        self.a.field_op(false, op::LOAD, host::RAX, field::FLAGS);
        self.a.and32(host::RAX, 1);
        self.a.put(&[0xC1, 0xE0, 11]); // shl eax, 11
        self.a.field_op(true, op::ADD, host::RAX, field::temporary(1));
        self.a.store_field(host::RAX, field::temporary(1));
        self.a.load_field(host::RAX, field::RFLAGS);
        // VM and RF are not pushed.
        self.a.and32(host::RAX, !(rflags::STATUS | rflags::RF | rflags::VM) as u32);
        self.a.field_op(true, op::ADD, host::RAX, field::temporary(1));
        self.may_fault_here();
        self.a.store(8, at, host::RAX);
        self.adjust_rsp(-8);
    }

    /// VZEROUPPER or VZEROALL of the eight registers that there are outside 64-bit mode.
    pub(super) fn zero_upper(&mut self, all: bool) {
        for n in 0..8u8 {
            if all {
                self.a.put(&[0xC5, 0x81 | (!n & 15) << 3, 0xEF, 0xC0 | n << 3 | n]); // vpxor xmm, xmm, xmm
            } else {
                self.a.put(&[0xC5, 0xF9, 0x6F, 0xC0 | n << 3 | n]); // vmovdqa xmm, xmm
            }
        }
    }
}
