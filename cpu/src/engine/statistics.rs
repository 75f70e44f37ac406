//! Counts of what the engine does, for tuning. Nothing of it reaches the guest.

use super::hash::FastMap;
use iced_x86::Mnemonic;
use std::fmt;

/// How often translated code was entered, and why it came back.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// Entries into translated code.
    pub entries: u64,
    /// Blocks translated.
    pub translated: u64,
    /// Blocks invalidated.
    pub killed: u64,
    /// Indirect branches that missed the jump cache.
    pub indirect: u64,
    /// Direct branches followed for the first time.
    pub link: u64,
    /// Blocks cut short by the budget.
    pub budget: u64,
    /// Groups of accesses that crossed a page for the first time.
    pub crossing: u64,
    /// Blocks that had to be looked up again.
    pub lookup: u64,
    /// Blocks that ran often and were translated again, longer.
    pub hot: u64,
    /// Translations taken from an archive.
    pub pasted: u64,
    /// Blocks that the stack window did not cover and that asked for it to be moved.
    pub window: u64,
    /// Instructions executed alone, with every access through Rust.
    pub careful: u64,
    /// Accesses that missed the TLB.
    pub slow_accesses: u64,
    /// Exceptions delivered.
    pub exceptions: u64,
    /// Flushes of all translations.
    pub flushes: u64,
    /// Of the translated blocks, those for one purpose.
    pub translated_special: u64,
    /// External interrupts by vector.
    pub interrupts: FastMap<u8, u64>,
    /// Stretches in the virtual machine.
    pub kvm_visits: u64,
    /// Times that KVM came back.
    pub kvm_exits: u64,
    /// Page faults among them.
    pub kvm_faults: u64,
    /// By number of the mnemonic, up to the highest so far.
    emulated: Vec<u64>,
}

impl Statistics {
    /// Counts one emulated instruction.
    pub(super) fn emulate(&mut self, mnemonic: Mnemonic) {
        let number = mnemonic as usize;
        if number >= self.emulated.len() {
            self.emulated.resize(number + 1, 0);
        }
        self.emulated[number] += 1;
    }

    /// Emulated instructions by mnemonic, most frequent first.
    pub fn emulated(&self) -> Vec<(String, u64)> {
        let mut list: Vec<_> = Mnemonic::values()
            .zip(&self.emulated)
            .filter(|(_, count)| **count > 0)
            .map(|(mnemonic, count)| (format!("{mnemonic:?}").to_lowercase(), *count))
            .collect();
        list.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        list
    }
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let counts = [
            ("entries into translated code", self.entries),
            ("blocks translated", self.translated),
            ("of those for one purpose", self.translated_special),
            ("taken from an archive", self.pasted),
            ("translated again because they ran often", self.hot),
            ("blocks invalidated", self.killed),
            ("direct branches followed for the first time", self.link),
            ("indirect branches that missed the jump cache", self.indirect),
            ("blocks cut short by the budget", self.budget),
            ("groups that crossed a page for the first time", self.crossing),
            ("blocks looked up again", self.lookup),
            ("stack windows moved", self.window),
            ("instructions executed alone", self.careful),
            ("accesses that missed the TLB", self.slow_accesses),
            ("exceptions", self.exceptions),
            ("flushes", self.flushes),
            ("stretches in the virtual machine", self.kvm_visits),
            ("exits from it", self.kvm_exits),
            ("of those for page faults", self.kvm_faults),
        ];
        for (what, count) in counts {
            writeln!(f, "{count:>12} {what}")?;
        }
        for (mnemonic, count) in self.emulated().into_iter().take(24) {
            writeln!(f, "{count:>12} {mnemonic}")?;
        }
        Ok(())
    }
}
