//! What branches begin with: a file in memory that they all map privately, and the pages that have changed since it was
//! made.
//!
//! Whoever is frozen maps the file itself from then on. So the next time, and also for a branch that is frozen, only pages
//! that were written since have to be kept.

use super::super::jumps::{Jump, Jumps};
use super::super::region::{MemoryFile, PAGE, Region, View};
use super::*;
use std::sync::Arc;

/// Most pages that branches copy on their way out because translations have become more since the last file was made.
const PAGES_FEW: usize = 64;
/// The same where all of them are wanted.
const PAGES_MAX: usize = 512;
/// Most blocks that branches forget on their way out.
const KILLED_MAX: usize = 32;

/// Translations of a moment, which nobody changes any more.
#[derive(Clone)]
pub struct Start {
    shared: Arc<Shared>,
    changes: Arc<Changes>,
    /// Blocks that are not valid any more.
    invalid: Vec<u32>,
}

/// Translations in a file.
struct Shared {
    file: MemoryFile,
    /// Where all who branch off read what they have not changed.
    view: View,
    offsets: Offsets,
    lengths: Lengths,
    kept: usize,
    /// Where indirect branches went.
    jumps: Jumps,
}

/// What has changed since.
struct Changes {
    lengths: Lengths,
    recent: Recent,
    /// Offsets of pages in the region, and their contents.
    pages: Vec<usize>,
    contents: Vec<u8>,
    /// Where indirect branches went that had not been there before.
    jumps: Jumps,
    /// Where they will go, for all that is known, in the order of the jump cache.
    foreseen: Vec<Jump>,
}

impl Start {
    /// Both share a file.
    pub fn is_like(&self, other: &Start) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

impl Translations {
    /// A private copy of shared translations, for a machine whose memory is what it was when they were frozen.
    /// None if they are of another geometry.
    pub fn branch(start: &Start, code_bytes: usize, page_count: usize) -> io::Result<Option<Translations>> {
        let Start { shared, changes, invalid } = start;
        let code_capacity = code_bytes.clamp(1 << 20, 1 << 31).next_multiple_of(4096);
        if Offsets::new(code_capacity, page_count) != shared.offsets {
            return Ok(None);
        }
        let mut region = Region::new(shared.offsets.size, Some(&shared.file))?;
        for (page, content) in changes.pages.iter().zip(changes.contents.chunks_exact(PAGE)) {
            region.write(*page, content);
        }
        let mut translations = Translations::over(region, shared.offsets, changes.lengths, shared.kept)?;
        translations.begin_with(start.clone());
        for index in invalid {
            translations.kill(*index);
        }
        Ok(Some(translations))
    }

    /// The region is a private mapping of that file, with those changes.
    fn begin_with(&mut self, start: Start) {
        self.recent = start.changes.recent.clone();
        self.patience = Patience::new(self.code_used);
        for page in start.changes.pages.iter().filter(|page| **page < self.offsets.code + self.code_used) {
            // It is a page of its own already.
            self.patience.written((page - self.offsets.code) as u32);
        }
        self.killed.clear();
        self.read_in(&start);
        self.origin = Some(start);
    }

    /// Arrays are read in the view of the file, but for these changes and those to come.
    fn read_in(&mut self, start: &Start) {
        let Shared { view, lengths, .. } = &*start.shared;
        let changed = &start.changes.pages;
        self.blocks.read_in(view, lengths.blocks, changed);
        self.sites.read_in(view, lengths.sites, changed);
        self.emulated.read_in(view, lengths.emulated, changed);
        self.code_pages.read_in(view, lengths.code_pages, changed);
        self.block_lists.read_in(view, BLOCK_LISTS, changed);
        self.page_lists.read_in(view, PAGE_LISTS, changed);
        self.ungrouped.0.read_in(view, UNGROUPED, changed);
        self.hot.0.read_in(view, HOT, changed);
        self.pages.records.read_in(view, self.offsets.page_count, changed);
    }

    /// There is no origin any more.
    pub(super) fn leave_origin(&mut self) {
        self.blocks.read_here();
        self.sites.read_here();
        self.emulated.read_here();
        self.code_pages.read_here();
        self.block_lists.read_here();
        self.page_lists.read_here();
        self.ungrouped.0.read_here();
        self.hot.0.read_here();
        self.pages.records.read_here();
        self.origin = None;
    }

    /// The block is no longer valid.
    pub(super) fn note_killed(&mut self, index: u32) {
        if self.origin.is_some() && self.killed.len() <= KILLED_MAX {
            self.killed.push(index);
        }
    }

    /// Where indirect branches near `rip` went before this engine branched off.
    pub fn inherited_jumps(&self, rip: u64) -> [&[Jump]; 2] {
        match &self.origin {
            Some(Start { shared, changes, .. }) => [changes.jumps.near(rip), shared.jumps.near(rip)],
            None => [&[], &[]],
        }
    }

    /// Translations for branches, none of which is wrong: all of them if `all`, and otherwise those that were there when a
    /// file was made, if the others are neither few nor many. `jumps` says where indirect branches have gone.
    pub fn freeze(&mut self, all: bool, mut jumps: Vec<Jump>) -> io::Result<Start> {
        let foreseen = if all { jumps.clone() } else { Vec::new() };
        if let Some(origin) = &self.origin {
            jumps.extend(origin.changes.jumps.all());
        }
        jumps.retain(|jump| (jump.checked as usize) < self.code_used);
        let most = if all { PAGES_MAX } else { PAGES_FEW };
        if let Some(start) = self.changed(most, &mut jumps, &foreseen) {
            return Ok(start);
        }
        if let Some(start) = self.earlier().filter(|_| !all) {
            return Ok(start);
        }
        if let Some(origin) = &self.origin {
            jumps.extend(origin.shared.jumps.all());
        }
        self.settle_recent();
        let shared = Arc::new(self.copy(Jumps::new(jumps))?);
        let changes = Changes {
            lengths: self.lengths(),
            recent: Recent::new(self.blocks.len()),
            pages: Vec::new(),
            contents: Vec::new(),
            jumps: Jumps::default(),
            foreseen,
        };
        let start = Start { shared, changes: Arc::new(changes), invalid: Vec::new() };
        // Where that is not possible the next copy is a whole one again.
        self.leave_origin();
        if self.region.map_over(&start.shared.file, self.offsets.code_capacity).is_ok() {
            self.begin_with(start.clone());
        }
        Ok(start)
    }

    /// What the jump cache of a branch is to hold.
    pub fn foreseen_jumps(&self) -> &[Jump] {
        self.origin.as_ref().map_or(&[], |origin| &origin.changes.foreseen)
    }

    /// What it all began with and is still right of it, if that is most of what there is.
    fn earlier(&self) -> Option<Start> {
        let Start { shared, changes, invalid } = self.origin.as_ref()?;
        let lengths = &changes.lengths;
        if self.code_used - lengths.code > lengths.code / 8 || self.killed.len() + invalid.len() > KILLED_MAX {
            return None;
        }
        let killed = self.killed.iter().copied().filter(|index| (*index as usize) < lengths.blocks);
        let invalid = invalid.iter().copied().chain(killed).collect();
        Some(Start { shared: Arc::clone(shared), changes: Arc::clone(changes), invalid })
    }

    /// The file that is mapped here and the pages that have changed, if they are not more than so many.
    fn changed(&self, most: usize, jumps: &mut Vec<Jump>, foreseen: &[Jump]) -> Option<Start> {
        let shared = &self.origin.as_ref()?.shared;
        let mut extents = self.extents();
        extents.push(self.pages.records_extent());
        let pages = self.region.written(&extents).ok()?;
        if pages.len() > most {
            return None;
        }
        jumps.retain(|jump| !shared.jumps.know(jump));
        let mut contents = Vec::with_capacity(pages.len() * PAGE);
        pages.iter().for_each(|page| contents.extend_from_slice(self.region.bytes(*page, PAGE)));
        let changes = Changes {
            lengths: self.lengths(),
            recent: self.recent.clone(),
            pages,
            contents,
            jumps: Jumps::new(std::mem::take(jumps)),
            foreseen: foreseen.to_vec(),
        };
        Some(Start { shared: Arc::clone(shared), changes: Arc::new(changes), invalid: Vec::new() })
    }

    fn lengths(&self) -> Lengths {
        Lengths {
            code: self.code_used,
            blocks: self.blocks.len(),
            sites: self.sites.len(),
            emulated: self.emulated.len(),
            faults: self.faults.len(),
            code_pages: self.code_pages.len(),
            covers: self.pages.covers_extent().1 / size_of::<Cover>(),
            flushes: self.flushes,
        }
    }

    /// What is in use of the region, but for the records of pages: offsets and lengths in bytes.
    fn extents(&self) -> Vec<(usize, usize)> {
        vec![
            (self.offsets.code, self.code_used),
            self.pages.covers_extent(),
            self.block_lists.extent(),
            self.page_lists.extent(),
            self.ungrouped.0.extent(),
            self.hot.0.extent(),
            self.code_pages.extent(),
            self.blocks.extent(),
            self.faults.extent(),
            self.emulated.extent(),
            self.sites.extent(),
        ]
    }

    fn copy(&self, jumps: Jumps) -> io::Result<Shared> {
        let file = MemoryFile::new(self.offsets.size)?;
        let mut extents = self.extents();
        // Page records are many and mostly empty: only pages of them that say something.
        let (offset, len) = self.pages.records_extent();
        for piece in (0..len).step_by(PAGE) {
            let extent = (offset + piece, (len - piece).min(PAGE));
            if self.region.bytes(extent.0, extent.1).iter().any(|b| *b != 0) {
                extents.push(extent);
            }
        }
        extents.sort_unstable();
        file.expect(&extents);
        for (offset, len) in extents {
            file.write(offset, self.region.bytes(offset, len))?;
        }
        let view = View::new(&file)?;
        Ok(Shared { file, view, offsets: self.offsets, lengths: self.lengths(), kept: self.code_kept, jumps })
    }
}
