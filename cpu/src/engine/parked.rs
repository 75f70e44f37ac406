//! Address translations of address spaces that the guest has left, for when it comes back: processes that talk to each other
//! would fill their TLBs anew at each switch.
//!
//! They are no exception to the rule that translations say what the page tables say. Tables stay watched as long as anything
//! that came from them is kept here, and what is forgotten in the TLBs is not had again from here.

use super::block::{CLASSES, Class, empty_tag, window_of};
use super::core::Core;
use crate::memory::PAGE_MASK;

/// Most address spaces that are kept.
const SPACES_MAX: usize = 8;
/// Most translations of each kind that are kept of an address space: those filled last.
const ENTRIES_MAX: usize = 1024;
/// Most pages that are forgotten one by one before all that is kept is forgotten.
const FORGOTTEN_MAX: usize = 64;

/// An entry of a TLB.
#[derive(Clone, Copy)]
struct Entry {
    index: usize,
    /// The linear page.
    tag: u64,
    host: u64,
}

/// What was known of an address space when it was left.
struct Space {
    root: u64,
    /// By class, for reads and for writes.
    pages: [[Vec<Entry>; 2]; CLASSES],
    /// Entries of the instruction TLBs: their numbers, and identities.
    code: [Vec<(usize, u32)>; CLASSES],
    /// How much had been forgotten before.
    forgotten: usize,
}

/// What has been forgotten since an address space was left.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Forgotten {
    /// All about a linear page.
    Linear(u64),
    /// Write translations of a page of RAM, by its host address.
    Writes(u64),
}

/// See the module's text. The address space that was left last comes last.
#[derive(Default)]
pub struct Parked {
    spaces: Vec<Space>,
    forgotten: Vec<Forgotten>,
}

impl Parked {
    /// Keeps nothing.
    pub fn clear(&mut self) {
        self.spaces.clear();
        self.forgotten.clear();
    }

    /// Forgets a linear page in all address spaces.
    pub fn forget_page(&mut self, linear: u64) {
        self.forget(Forgotten::Linear(linear & !PAGE_MASK));
    }

    /// Forgets write translations of a page of RAM, given by its host address.
    pub fn forget_writes_of(&mut self, host: u64) {
        self.forget(Forgotten::Writes(host));
    }

    fn forget(&mut self, what: Forgotten) {
        if self.spaces.is_empty() {
            return;
        }
        self.forgotten.push(what);
        if self.forgotten.len() > FORGOTTEN_MAX {
            self.clear();
        }
    }

    /// Forgets all write translations.
    pub fn forget_writes(&mut self) {
        self.spaces.iter_mut().flat_map(|space| &mut space.pages).for_each(|[_, writes]| writes.clear());
    }

    /// Forgets instruction translations of a class.
    pub fn forget_code(&mut self, class: usize) {
        self.spaces.iter_mut().for_each(|space| space.code[class].clear());
    }

    fn put(&mut self, mut space: Space) {
        self.spaces.retain(|other| other.root != space.root);
        if self.spaces.len() == SPACES_MAX {
            self.spaces.remove(0);
        }
        space.forgotten = self.forgotten.len();
        self.spaces.push(space);
    }

    /// What is known of an address space, and what has been forgotten since.
    fn take(&mut self, root: u64) -> Option<(Space, Vec<Forgotten>)> {
        let at = self.spaces.iter().position(|space| space.root == root)?;
        let space = self.spaces.remove(at);
        let since = self.forgotten[space.forgotten..].to_vec();
        if self.spaces.is_empty() {
            self.forgotten.clear();
        }
        Some((space, since))
    }
}

impl Core {
    /// Takes the local translations out of the TLBs: those of the address space with this top-level table.
    pub fn park(&mut self, root: u64) {
        // SAFETY: the vCPU block is owned by this core, and translated code is not running.
        let block = unsafe { &mut *self.block };
        let mut space = Space { root, pages: Default::default(), code: Default::default(), forgotten: 0 };
        for class in 0..CLASSES {
            let tlb = &mut block.tlb[class];
            for (write, entries) in space.pages[class].iter_mut().enumerate() {
                for index in self.used[class][write].local.take() {
                    let (tag, distance) = (tlb.tags[write][index], tlb.distances[index]);
                    // One that is noted twice is empty the second time.
                    if tag != empty_tag(index) {
                        entries.push(Entry { index, tag, host: tag.wrapping_add(distance) });
                        tlb.forget(index, write == 1);
                    }
                }
                entries.drain(..entries.len().saturating_sub(ENTRIES_MAX));
            }
            let itlb = &mut block.itlb[class];
            for slot in self.itlb_used[class].local.take() {
                let identity = std::mem::take(&mut itlb[slot]);
                if identity != 0 {
                    space.code[class].push((slot, identity));
                }
            }
        }
        self.parked.put(space);
        self.forget_window(window_of(Class::User as usize));
        if std::mem::take(&mut self.low_windows) {
            self.forget_window(window_of(Class::Kernel as usize));
        }
    }

    /// Puts back what is known of the address space with this top-level table.
    pub fn unpark(&mut self, root: u64) {
        let Some((space, forgotten)) = self.parked.take(root) else { return };
        let gone = |linear| forgotten.contains(&Forgotten::Linear(linear));
        let watched = |host| forgotten.contains(&Forgotten::Writes(host));
        // SAFETY: as above.
        let block = unsafe { &mut *self.block };
        for class in 0..CLASSES {
            for (write, entries) in space.pages[class].iter().enumerate() {
                for &Entry { index, tag, host } in entries {
                    if gone(tag) || write == 1 && watched(host) {
                        continue;
                    }
                    block.tlb[class].fill(index, tag, host, write == 1);
                    self.used[class][write].add(index, tag);
                }
            }
            for &(slot, identity) in &space.code[class] {
                let linear = self.t.code_pages[identity].vpage << 12;
                if !gone(linear) {
                    block.itlb[class][slot] = identity;
                    self.itlb_used[class].add(slot, linear);
                }
            }
        }
    }
}
