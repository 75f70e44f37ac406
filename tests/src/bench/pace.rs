//! What a shared host leaves: others at work on the same cores slow everything down, and what executes many instructions in
//! a cycle most.

use std::arch::asm;
use std::time::{Duration, Instant};

use super::figures::median;

/// Turns of the loop that is timed: about a millisecond.
const TURNS: u64 = 1_500_000;
/// How often it is timed at each look, with breaks, so that a look covers some tenths of a second.
const LOOKS: u32 = 12;
const BREAK: Duration = Duration::from_millis(15);

/// How long a loop of independent additions took, from look to look.
#[derive(Default)]
pub struct Pace(Vec<f64>);

impl Pace {
    /// Times the loop now.
    pub fn look(&mut self) {
        for _ in 0..LOOKS {
            let begun = Instant::now();
            additions();
            self.0.push(begun.elapsed().as_secs_f64());
            std::thread::sleep(BREAK);
        }
    }

    /// The median pace as a part of the best; None if nobody has looked.
    pub fn median(&self) -> Option<f64> {
        let best = self.0.iter().copied().reduce(f64::min)?;
        median(&self.0).map(|seconds| best / seconds)
    }
}

/// As many additions as a core can do in a cycle, for a while.
fn additions() {
    // SAFETY: it changes four scratch registers and the flags.
    unsafe {
        asm!(
            "2:",
            "add {a}, 1",
            "add {b}, 1",
            "add {c}, 1",
            "add {a}, 2",
            "add {b}, 2",
            "add {c}, 2",
            "dec {turns}",
            "jnz 2b",
            a = inout(reg) 0u64 => _,
            b = inout(reg) 0u64 => _,
            c = inout(reg) 0u64 => _,
            turns = inout(reg) TURNS => _,
            options(nomem, nostack),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_a_part_of_the_best() {
        assert_eq!(Pace::default().median(), None);
        assert_eq!(Pace(vec![2.0, 1.0, 4.0]).median(), Some(0.5));
        let mut pace = Pace::default();
        pace.look();
        assert_eq!(pace.0.len(), LOOKS as usize);
        assert!(pace.0.iter().all(|seconds| *seconds > 0.0));
    }
}
