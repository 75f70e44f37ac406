//! Ways from block to block.

use super::*;

impl Translator {
    /// Jumps to the translation of `target`, through Rust until it is linked. Flags are in the slot.
    pub(in crate::engine) fn link(&mut self, target: u64) {
        assert!(matches!(self.flags, Flags::Slot | Flags::Both), "the flags are saved before a block ends");
        let target = if self.mode.is_64bit() { target } else { target & 0xFFFF_FFFF };
        let patch = self.a.jmp(0);
        self.link_site(target, patch);
    }

    pub(super) fn link_site(&mut self, target: u64, patch: u32) {
        let depth = self.plan.depth(self.position + 1);
        let kind = SiteKind::Link { target, patch: self.a.origin as u32 + patch, depth };
        let site = self.site(kind, 0);
        self.cold.push(Cold::Leave { patch, site });
    }

    pub(super) fn branch(&mut self, ins: &Instruction) {
        self.need_flags();
        self.save_flags();
        let condition = ins.condition_code() as u8 - 1;
        let patch = self.a.jcc(condition, 0);
        let target = self.masked(ins.near_branch_target());
        match self.counter() {
            None => self.link_site(target, patch),
            counter => self.side(patch, target, counter),
        }
        self.link(ins.next_ip());
    }

    /// Where it is counted that the next branch is taken.
    fn counter(&mut self) -> Option<u32> {
        let branch = self.counting.as_mut()?;
        *branch += 1;
        Some(field::taken(self.start, *branch - 1))
    }

    /// Leaves from `patch` for a target, behind the current instruction.
    fn side(&mut self, patch: u32, target: u64, counter: Option<u32>) {
        let side = Side {
            target,
            ip: self.ip,
            save_flags: if let Flags::Host(overflow) = self.flags { Some(overflow) } else { None },
            source: None,
            unretired: self.unretired() - 1,
            depth: self.plan.depth(self.position + 1),
            counter,
        };
        self.cold.push(Cold::Side { patch, side });
    }

    /// In front of an instruction in another page: leaves if that is not the page that it was decoded from.
    /// It is the `number`th page that the block goes on in.
    pub(super) fn cross(&mut self, number: usize, crossing: &Crossing) {
        self.clobber_flags();
        self.a.cmp_field_imm32(field::itlb(self.mode.class(), crossing.vpage), crossing.identity);
        self.relocations.push(Relocation::OtherIdentity(self.a.offset() - 4, number as u8));
        let patch = self.a.jcc(cc::NE, 0);
        let side = Side {
            target: self.ip,
            ip: self.ip,
            save_flags: None,
            source: self.source_in_need(),
            unretired: self.unretired(),
            depth: self.plan.depth(self.position),
            counter: None,
        };
        self.cold.push(Cold::Side { patch, side });
    }

    /// A branch in the middle of a block, which goes on at `next` and leaves in the other case.
    pub(super) fn side_branch(&mut self, ins: &Instruction, next: u64) {
        self.need_flags();
        let condition = ins.condition_code() as u8 - 1;
        let (leaves, target) = match next == ins.next_ip() {
            true => (condition, ins.near_branch_target()),
            false => (condition ^ 1, ins.next_ip()),
        };
        let patch = self.a.jcc(leaves, 0);
        let counter = self.counter();
        self.side(patch, target, counter);
    }

    pub(super) fn masked(&self, rip: u64) -> u64 {
        if self.mode.is_64bit() { rip } else { rip & 0xFFFF_FFFF }
    }

    pub(super) fn count_branch(&mut self, ins: &Instruction) {
        self.put_flags_away();
        let address_bits = match ins.code() {
            Code::Jrcxz_rel8_64 | Code::Loop_rel8_64_RCX | Code::Loope_rel8_64_RCX | Code::Loopne_rel8_64_RCX => 64,
            Code::Jecxz_rel8_64
            | Code::Jecxz_rel8_32
            | Code::Loop_rel8_64_ECX
            | Code::Loope_rel8_64_ECX
            | Code::Loopne_rel8_64_ECX
            | Code::Loop_rel8_32_ECX
            | Code::Loope_rel8_32_ECX
            | Code::Loopne_rel8_32_ECX => 32,
            _ => 16,
        };
        // Guest RCX lives in R13.
        let wide = address_bits == 64;
        let zero_test = |a: &mut Assembler| match address_bits {
            64 => a.put(&[0x4D, 0x85, 0xED]),      // test r13, r13
            32 => a.put(&[0x45, 0x85, 0xED]),      // test r13d, r13d
            _ => a.put(&[0x66, 0x45, 0x85, 0xED]), // test r13w, r13w
        };
        let target = self.masked(ins.near_branch_target());
        if ins.is_jcx_short() {
            zero_test(&mut self.a);
            let patch = self.a.jcc(cc::E, 0);
            self.link_site(target, patch);
            self.link(ins.next_ip());
            return;
        }
        if address_bits == 16 {
            self.a.put(&[0x66, 0x41, 0xFF, 0xCD]); // dec r13w
        } else {
            self.a.lea(wide, host::R13, Some(host::R13), None, -1);
        }
        zero_test(&mut self.a);
        if ins.is_loop() {
            let patch = self.a.jcc(cc::NE, 0);
            self.link_site(target, patch);
        } else {
            let fall = self.a.jcc(cc::E, 0);
            self.a.field_op(false, op::LOAD, host::RAX, field::FLAGS);
            self.a.put(&[0xF6, 0xC4, 0x40]); // test ah, ZF
            let loops_while_equal = matches!(ins.mnemonic(), Mnemonic::Loope);
            let patch = self.a.jcc(if loops_while_equal { cc::NE } else { cc::E }, 0);
            self.link_site(target, patch);
            self.a.land(fall);
        }
        self.link(ins.next_ip());
    }

    /// Target of an indirect branch into RCX.
    pub(super) fn branch_target(&mut self, ins: &Instruction) {
        let word = self.word();
        if ins.op0_kind() == OpKind::Memory {
            let at = self.operand(ins, word, true, false);
            self.may_fault_here();
            self.a.load(word, host::RCX, at);
        } else {
            let guest = gpr_number(ins.op0_register()).expect("an indirect branch takes a general register");
            self.fetch(host::RCX, guest);
            if word == 4 {
                self.a.mov32(host::RCX, host::RCX);
            }
        }
        self.scratch.forget(host::RCX);
    }

    /// Leaves if RCX, the target of a call, is not canonical: nothing may be pushed then.
    pub(super) fn check_canonical(&mut self) {
        if !self.mode.is_64bit() {
            return;
        }
        self.put_flags_away();
        let site = self.site(SiteKind::Indirect { popped: 0 }, self.unretired());
        self.compare_canonical();
        let patch = self.a.jcc(cc::NE, 0);
        self.cold.push(Cold::Indirect { patch, site });
    }

    /// Sets ZF if RCX is canonical; uses RAX.
    pub(super) fn compare_canonical(&mut self) {
        self.a.mov(host::RAX, host::RCX);
        self.a.put(&[0x48, 0xC1, 0xE0, 16, 0x48, 0xC1, 0xF8, 16]); // shl rax, 16; sar rax, 16
        self.a.cmp(host::RAX, host::RCX);
    }

    /// Calls what RCX says, if the return address goes through the stack window: what is in the jump cache is canonical.
    pub(super) fn call_through_window(&mut self, back: u64) -> bool {
        let short = back as i64 == back as i32 as i64;
        if self.isolated || self.mode.is_direct() || !short || !self.plan.windowed(self.position, Which::Stack) {
            return false;
        }
        self.put_flags_away();
        let site = self.site(SiteKind::Indirect { popped: 0 }, self.unretired());
        self.look_up_jump();
        let patch = self.a.jcc(cc::NE, 0);
        self.cold.push(Cold::Call { patch, site, back: back as u32 });
        self.push_short(back as u32);
        self.a.jmp_field_index_rax(JUMP_SCALE, field::jump_host(self.mode.class()));
        true
    }

    /// Pushes a constant, sign-extended, through the stack window.
    pub(super) fn push_short(&mut self, value: u32) {
        let at = Self::in_window(host::RSP, -8);
        self.a.store_imm(8, at, value);
        self.adjust_rsp(-8);
    }

    /// Compares RCX with its entry in the jump cache, which RAX leads to.
    pub(super) fn look_up_jump(&mut self) {
        self.a.mov32(host::RAX, host::RCX);
        self.a.and32(host::RAX, ((JUMP_ENTRIES - 1) * JUMP_CODE) as u32);
        self.a.field_index_op(op::CMP, host::RCX, host::RAX, JUMP_SCALE, field::jump_rip(self.mode.class()));
    }

    /// A return to the call in this block that is followed by what is at `back`, if it goes there.
    pub(super) fn followed_return(&mut self, back: u64) {
        let at = self.stack(0, 8, false);
        self.a.load(8, host::RCX, at);
        self.adjust_rsp(8);
        self.clobber_flags();
        if back as i64 == back as i32 as i64 {
            self.a.cmp_imm(host::RCX, back as i32);
        } else {
            self.a.mov_imm(host::RAX, back);
            self.a.cmp(host::RCX, host::RAX);
        }
        let patch = self.a.jcc(cc::NE, 0);
        // If the target turns out to be no address, the return itself has not retired.
        let site = self.site(SiteKind::Indirect { popped: 8 }, 1);
        let (source, unretired) = (self.source_in_need(), self.unretired() - 1);
        self.cold.push(Cold::Return { patch, site, source, unretired });
    }

    /// Goes where RCX says, through the jump cache. `popped` has been added to RSP, which is taken back if the
    /// target turns out to be no address.
    pub(in crate::engine) fn indirect(&mut self, popped: i32) {
        self.put_flags_away();
        let site = self.site(SiteKind::Indirect { popped }, self.unretired());
        if self.isolated {
            let patch = self.a.jmp(0);
            self.cold.push(Cold::Indirect { patch, site });
            return;
        }
        self.look_up_jump();
        let patch = self.a.jcc(cc::NE, 0);
        self.cold.push(Cold::Indirect { patch, site });
        self.a.jmp_field_index_rax(JUMP_SCALE, field::jump_host(self.mode.class()));
    }
}
