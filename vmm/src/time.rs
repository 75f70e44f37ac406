//! Virtual time: `icount * ns_per_instruction + skipped`, in integer arithmetic.

use orrery_cpu::Icount;
use orrery_devices::VirtualNs;
use serde::{Deserialize, Serialize};

/// Converts between the icount and virtual time, and holds the idle time that HLT skipped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    ns_per_instruction: u64,
    skipped_ns: u64,
}

impl Clock {
    /// A clock at power-on. `ns_per_instruction` must not be zero.
    pub fn new(ns_per_instruction: u64) -> Clock {
        assert!(ns_per_instruction > 0, "time must pass");
        Clock { ns_per_instruction, skipped_ns: 0 }
    }

    /// Virtual time at an instruction boundary. Saturates after 584 years.
    #[inline]
    pub fn now(&self, icount: Icount) -> VirtualNs {
        VirtualNs(icount.0.saturating_mul(self.ns_per_instruction).saturating_add(self.skipped_ns))
    }

    /// The first instruction boundary whose virtual time is `at` or later, if no more idle time is skipped.
    #[inline]
    pub fn icount_at(&self, at: VirtualNs) -> Icount {
        Icount(at.0.saturating_sub(self.skipped_ns).div_ceil(self.ns_per_instruction))
    }

    /// Lets idle time pass at the boundary `icount` until `at`. Does nothing if that time has come.
    pub fn skip_to(&mut self, icount: Icount, at: VirtualNs) {
        let now = self.now(icount);
        self.skipped_ns = self.skipped_ns.saturating_add(at.0.saturating_sub(now.0));
    }

    /// Virtual nanoseconds per instruction.
    pub fn ns_per_instruction(&self) -> u64 {
        self.ns_per_instruction
    }

    /// Idle time skipped so far, in nanoseconds.
    pub fn skipped_ns(&self) -> u64 {
        self.skipped_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn skipping_moves_time_and_not_the_icount() {
        let mut clock = Clock::new(3);
        assert_eq!(clock.now(Icount(10)), VirtualNs(30));
        clock.skip_to(Icount(10), VirtualNs(100));
        assert_eq!(clock.now(Icount(10)), VirtualNs(100));
        assert_eq!(clock.icount_at(VirtualNs(100)), Icount(10));
        assert_eq!(clock.icount_at(VirtualNs(101)), Icount(11));
        clock.skip_to(Icount(11), VirtualNs(1));
        assert_eq!(clock.now(Icount(11)), VirtualNs(103));
    }

    proptest! {
        /// `icount_at` is the exact inverse: the boundary before it is too early, the boundary itself is not.
        #[test]
        fn limit_is_the_first_boundary(rate in 1u64..1000, at in 0u64..1 << 50, skip in 0u64..1 << 40) {
            let mut clock = Clock::new(rate);
            clock.skip_to(Icount(0), VirtualNs(skip));
            let limit = clock.icount_at(VirtualNs(at));
            prop_assert!(clock.now(limit) >= VirtualNs(at));
            if limit.0 > 0 {
                prop_assert!(clock.now(Icount(limit.0 - 1)) < VirtualNs(at));
            }
        }
    }
}
