//! REP MOVS and REP STOS in translated code, where what they touch lies in one page for each operand.

use super::*;

impl Translator {
    /// Executes the instruction with host addresses if it goes upwards, does anything at all, and the TLBs know the pages;
    /// the emulation does the rest.
    pub(super) fn repeated_in_pages(&mut self, ins: &Instruction) {
        const ENDS: [u32; 2] = [field::temporary(1), field::temporary(3)];
        let size = ins.memory_size().size() as u8;
        let [to, from, count] = [gpr::RDI, gpr::RSI, gpr::RCX].map(|guest| HOME[guest].expect("strings have homes"));
        let moves = ins.op1_kind() == OpKind::MemorySegRSI;
        let operands = if moves { &[(to, true), (from, false)][..] } else { &[(to, true)] };
        self.put_flags_away();
        let site = self.emulation_site(ins, self.unretired());
        self.a.test_field_imm32(field::RFLAGS, rflags::DF as u32);
        self.leave_if(cc::NE, site);
        // Zero elements are as many as none.
        self.a.lea(true, host::RAX, Some(count), None, -1);
        self.a.cmp_imm(host::RAX, PAGE_SIZE as i32 / i32::from(size) - 1);
        self.leave_if(cc::A, site);
        let class = self.mode.class();
        for &(register, write) in operands {
            self.a.mov(host::RCX, register);
            let patch = self.compare_tag(1, field::tlb_tags(class, write));
            self.cold.push(Cold::Leave { patch, site });
            // What differs from the tag is the offset in the page.
            self.a.lea(true, host::RAX, Some(host::RAX), Some((count, size)), 0);
            self.a.cmp_imm(host::RAX, PAGE_SIZE as i32);
            self.leave_if(cc::A, site);
        }
        // Nothing stops it from here on.
        for (&(register, _), end) in operands.iter().zip(ENDS) {
            self.a.lea(true, host::RCX, Some(register), Some((count, size)), 0);
            self.a.store_field(host::RCX, end);
            self.a.tlb_index(host::RAX, register, self.tlb_mask);
            self.a.field_index_op(op::ADD, register, host::RAX, 8, field::tlb_distances(class));
        }
        self.a.mov(host::RCX, count);
        self.a.mov(host::RAX, HOME[gpr::RAX].expect("guest RAX has a home"));
        self.encode(ins, ins);
        self.a.mov(count, host::RCX);
        for (&(register, _), end) in operands.iter().zip(ENDS) {
            self.a.load_field(register, end);
        }
        self.link(ins.next_ip());
    }
}
