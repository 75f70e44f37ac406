//! Which way branches go: blocks that are not hot yet count it, and the hot one follows what was usual.
//!
//! For each address at which a block begins there is a counter of its runs, and beside it one for each of its conditional
//! branches, of how often it was taken. They are found by hash, and others may count in the same place: what they say is
//! a guess, which decides what a block consists of, never what it computes.

use std::mem::offset_of;

/// So often a block runs before it is hot. Another translation costs what it saves in about as many runs.
const HEAT: u32 = 1 << 12;

/// What is added to the counter of runs at each: it overflows when the block is hot.
pub const HEAT_STEP: u8 = ((1 << 16) / HEAT) as u8;

/// Conditional branches of a block that are counted: those it goes on behind, and one that ends it.
pub const COUNTED: usize = 5;

/// Runs without which counters say nothing.
const TELLING: u32 = 32;

/// Places in a profile, a power of two.
const PLACES: usize = 1 << 14;

/// Counters of the blocks that begin at an address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// In steps of [`HEAT_STEP`].
    runs: u16,
    taken: [u16; COUNTED],
    /// Low bits of the address that this is about.
    rip: u32,
}

impl Place {
    /// How often the block at `rip` has run.
    fn runs(&self, rip: u64) -> u32 {
        if self.rip == rip as u32 { u32::from(self.runs) / u32::from(HEAT_STEP) } else { 0 }
    }
}

/// See the module's text.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Profile([Place; PLACES]);

impl Profile {
    const fn place(rip: u64) -> usize {
        (rip ^ rip >> 12) as usize % PLACES
    }

    /// Offset in a profile of the counter of runs.
    pub const fn runs(rip: u64) -> u32 {
        (Self::place(rip) * size_of::<Place>() + offset_of!(Place, runs)) as u32
    }

    /// Offset in a profile of the counter of a block's branch.
    pub const fn taken(rip: u64, branch: usize) -> u32 {
        assert!(branch < COUNTED);
        (Self::place(rip) * size_of::<Place>() + offset_of!(Place, taken) + branch * size_of::<u16>()) as u32
    }

    /// A block at `rip` will count from now on.
    pub fn begin(&mut self, rip: u64) {
        let place = &mut self.0[Self::place(rip)];
        if place.rip != rip as u32 {
            *place = Place { rip: rip as u32, ..Place::default() };
        }
    }

    /// The block at `rip` has become hot: its counter of runs stays where it was just before.
    pub fn end(&mut self, rip: u64) {
        let place = &mut self.0[Self::place(rip)];
        if place.rip == rip as u32 {
            place.runs = u16::MAX;
        }
    }
}

/// Where branches usually lead, as somebody knows.
#[derive(Clone, Copy, Debug)]
pub enum Ways<'a> {
    Counted(&'a Profile),
    /// Drawn from a number.
    Random(u64),
}

/// Follows a path through blocks and says where their branches usually lead.
pub struct Guide<'a> {
    ways: Ways<'a>,
    /// Counters of the block that the path is in.
    taken: [u16; COUNTED],
    /// Number of the next branch.
    branch: usize,
    /// Runs that came to it.
    runs: u32,
}

impl<'a> Guide<'a> {
    pub fn new(ways: Ways<'a>, rip: u64) -> Guide<'a> {
        let place = match ways {
            Ways::Counted(profile) => profile.0[Profile::place(rip)],
            Ways::Random(_) => Place::default(),
        };
        Guide { ways, taken: place.taken, branch: 0, runs: place.runs(rip) }
    }

    /// The path goes on in the block at `rip`.
    pub fn enter(&mut self, rip: u64) {
        *self = Guide::new(self.ways, rip);
    }

    /// At a conditional branch, in front of `next`: it is usually taken, or usually not, if that is known and clear. If it is
    /// followed, [`Guide::enter`] must be told where to.
    pub fn usually(&mut self, next: u64) -> Option<bool> {
        if let Ways::Random(bits) = &mut self.ways {
            *bits = bits.rotate_right(2);
            return (*bits & 2 != 0).then_some(*bits & 1 != 0);
        }
        let taken = u32::from(self.taken[self.branch]);
        let usual = match self.runs {
            runs if runs < TELLING => None,
            runs if taken * 4 > runs * 3 => Some(true),
            runs if taken * 4 < runs => Some(false),
            _ => None,
        };
        self.runs = self.runs.saturating_sub(taken);
        self.branch += 1;
        if self.branch == COUNTED {
            self.enter(next);
        }
        usual
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guide_takes_the_way_that_was_counted() {
        let mut profile = Profile([Place::default(); PLACES]);
        let mut count = |rip, runs, taken| {
            profile.begin(rip);
            let place = &mut profile.0[Profile::place(rip)];
            (place.runs, place.taken) = (runs * u16::from(HEAT_STEP), taken);
        };
        count(0x1000, 100, [10, 80, 4, 0, 6]);
        count(0x2000, TELLING as u16 - 1, [9; COUNTED]);
        count(0x3000, 100, [70; COUNTED]);
        let usual = |profile: &Profile, rip| Guide::new(Ways::Counted(profile), rip).usually(0);
        assert_eq!(usual(&profile, 0x3000), None, "three of ten went the other way");
        let mut guide = Guide::new(Ways::Counted(&profile), 0x1000);
        let five = [(); COUNTED].map(|()| guide.usually(0x2000));
        // Of the hundred ninety come to the second, ten behind it: too few to tell of the others.
        assert_eq!(five, [Some(false), Some(true), None, None, None]);
        assert_eq!(guide.usually(0), None, "the block behind it has hardly run");
        guide.enter(0x1000);
        assert_eq!(guide.usually(0), Some(false));
        let elsewhere = 0x1000 + PLACES as u64 * 4096;
        assert_eq!(Profile::runs(elsewhere), Profile::runs(0x1000));
        assert_eq!(usual(&profile, elsewhere), None, "what is there is about another");
        profile.end(elsewhere);
        profile.end(0x2000);
        assert_eq!(usual(&profile, 0x2000), Some(false));
        assert_eq!(usual(&profile, 0x1000), Some(false));
        profile.begin(elsewhere);
        assert_eq!(usual(&profile, 0x1000), None);
    }
}
