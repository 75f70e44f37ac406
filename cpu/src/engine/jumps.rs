//! Where indirect branches have gone: what an engine leaves to those that branch off, whose jump caches are empty.

use super::block::Class;
use super::translations::hash;

/// Lists of targets in pages with the same hash; a power of two.
const LISTS: usize = 1 << 12;

/// A target of indirect branches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jump {
    pub rip: u64,
    /// Offset of a checked entry, which leads on if its block is not valid any more.
    pub checked: u32,
    /// Of the code that branches.
    pub class: Class,
}

/// Targets, by page.
#[derive(Default)]
pub struct Jumps {
    /// Ordered by list.
    jumps: Vec<Jump>,
    /// Where each list begins, and the end of the last. Empty if there are no targets.
    begins: Vec<u32>,
}

fn list(rip: u64) -> usize {
    hash(rip >> 12, LISTS) as usize
}

impl Jumps {
    /// Of several targets of a class with one RIP the first counts.
    pub fn new(mut jumps: Vec<Jump>) -> Jumps {
        jumps.sort_by_key(|jump| (list(jump.rip), jump.rip, jump.class as u8));
        jumps.dedup_by_key(|jump| (jump.rip, jump.class));
        let mut begins = vec![0; if jumps.is_empty() { 0 } else { LISTS + 1 }];
        jumps.iter().for_each(|jump| begins[list(jump.rip) + 1] += 1);
        for list in 1..begins.len() {
            begins[list] += begins[list - 1];
        }
        Jumps { jumps, begins }
    }

    /// All of them.
    pub fn all(&self) -> &[Jump] {
        &self.jumps
    }

    /// The same target is among them.
    pub fn know(&self, jump: &Jump) -> bool {
        self.near(jump.rip).contains(jump)
    }

    /// Those in the page of `rip`, and perhaps others.
    pub fn near(&self, rip: u64) -> &[Jump] {
        let list = list(rip);
        match self.begins.get(list..list + 2) {
            Some(bounds) => &self.jumps[bounds[0] as usize..bounds[1] as usize],
            None => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_found_by_page_and_the_first_of_two_counts() {
        let jump = |rip, checked| Jump { rip, checked, class: Class::User };
        let supervisor = Jump { class: Class::Kernel, ..jump(0x5008, 6) };
        let known = [supervisor, jump(0x5008, 1), jump(0x7FFF, 2), jump(0x5000, 3), jump(0x5008, 4), jump(u64::MAX, 5)];
        let jumps = Jumps::new(known.to_vec());
        assert_eq!(jumps.all().len(), 5);
        let page = |rip: u64| -> Vec<Jump> {
            jumps.near(rip).iter().copied().filter(|jump| jump.rip >> 12 == rip >> 12).collect()
        };
        assert_eq!(page(0x5FFF), [jump(0x5000, 3), jump(0x5008, 1), supervisor]);
        assert_eq!(page(0x7000), [jump(0x7FFF, 2)]);
        assert_eq!(page(u64::MAX - 1), [jump(u64::MAX, 5)]);
        assert!(page(0x6000).is_empty());
        assert!(Jumps::default().near(0x5000).is_empty());
    }
}
