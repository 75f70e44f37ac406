//! The guest's own debug registers (Intel SDM volume 3, section 18.2). While any breakpoint is enabled every
//! instruction runs alone and carefully, so that each access can be compared.

use super::core::Core;

/// Bits of DR7 that enable a breakpoint.
const ENABLES: u64 = 0xFF;

impl Core {
    /// Some breakpoint is enabled.
    pub fn debug_active(&self) -> bool {
        self.state().dr[7] & ENABLES != 0
    }

    fn breakpoints(&self) -> impl Iterator<Item = (u64, u64, u64, u64)> {
        let dr = self.state().dr;
        (0..4).filter(move |i| dr[7] >> (2 * i) & 3 != 0).map(move |i| {
            let control = dr[7] >> (16 + 4 * i) & 0xF;
            let len = match control >> 2 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            (1 << i, dr[i as usize] & !(len - 1), len, control & 3)
        })
    }

    /// DR6 bits of the instruction breakpoints at RIP.
    pub fn instruction_breakpoint(&self) -> u64 {
        let rip = self.state().rip;
        self.breakpoints().filter(|&(_, at, _, kind)| kind == 0 && at == rip).map(|(bit, ..)| bit).sum()
    }

    /// Compares an access with the data breakpoints; what it hits is reported after the instruction.
    pub fn watch(&mut self, linear: u64, len: u64, write: bool) {
        if !self.debug_active() {
            return;
        }
        let hits = self
            .breakpoints()
            .filter(|&(_, at, size, kind)| {
                let wanted = kind == 3 || kind == 1 && write;
                wanted && linear < at.wrapping_add(size) && at < linear.wrapping_add(len)
            })
            .map(|(bit, ..)| bit)
            .sum::<u64>();
        self.debug_hits |= hits;
    }
}
