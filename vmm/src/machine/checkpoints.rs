//! Moments of one machine, kept in memory, to go back and forth between.
//!
//! The first moment is frozen whole ([`Machine::freeze`]); each later one keeps only the pages written since the one
//! before it. So a moment costs what the guest has written, and going to another moment costs the pages in which the
//! two differ. One machine moves between all of them, and its engine keeps its translations.

use std::collections::BTreeMap;
use std::sync::Arc;

use orrery_cpu::memory::PAGE_SIZE;
use orrery_cpu::{Icount, PageSet};

use super::Machine;
use super::branch::BranchError;
use super::state::MachineState;
use crate::ram::{FrozenRam, Page};

/// The moments of one machine. Only to be used with the machine that made it.
pub struct Checkpoints {
    /// RAM at the first point.
    base: Arc<FrozenRam>,
    first: Icount,
    /// By icount; the first one is the base.
    points: BTreeMap<u64, Point>,
    /// For each page that was ever written: its content at those points before which it had been written.
    versions: BTreeMap<u64, BTreeMap<u64, Arc<Page>>>,
    /// Bytes in `versions`.
    bytes: u64,
    bytes_max: u64,
    /// The point from which the machine's RAM has developed.
    at: u64,
}

struct Point {
    state: MachineState,
    /// Pages with a version here.
    pages: Vec<u64>,
}

impl Checkpoints {
    /// Icount of the last point at or before `icount`.
    pub fn at_or_before(&self, icount: Icount) -> Option<Icount> {
        self.points.range(..=icount.0).next_back().map(|(at, _)| Icount(*at))
    }

    /// Icount of the first point.
    pub fn first(&self) -> Icount {
        self.first
    }

    /// How many points there are.
    pub fn len(&self) -> usize {
        self.points.len()
    }

    /// There is always at least the first point.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// Bytes of page contents that are kept.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn content(&self, page: u64, at: u64) -> Option<&Page> {
        let version = self.versions.get(&page).and_then(|versions| versions.range(..=at).next_back());
        version.map(|(_, content)| &**content).or_else(|| self.base.page(page))
    }

    fn keep(&mut self, page: u64, at: u64, content: &Page) {
        if self.versions.entry(page).or_default().insert(at, Arc::new(*content)).is_none() {
            self.bytes += PAGE_SIZE;
        }
    }

    /// Drops points until their pages fit, those first whose neighbours are near each other for their age.
    fn thin(&mut self, present: u64) {
        while self.bytes > self.bytes_max && self.points.len() > 2 {
            let icounts: Vec<u64> = self.points.keys().copied().collect();
            let candidates = icounts.windows(3).filter(|window| window[1] != self.at);
            let crowded = |window: &&[u64]| {
                let gap = u128::from(window[2] - window[0]);
                (gap << 32) / u128::from(present.abs_diff(window[1]) + 1)
            };
            let Some(window) = candidates.min_by_key(crowded) else { return };
            self.drop_point(window[1], window[2]);
        }
    }

    /// Drops a point; what it kept goes to the next one, unless that has a later version.
    fn drop_point(&mut self, icount: u64, next: u64) {
        let Some(point) = self.points.remove(&icount) else { return };
        for page in point.pages {
            let Some(versions) = self.versions.get_mut(&page) else { continue };
            let Some(content) = versions.remove(&icount) else { continue };
            if let std::collections::btree_map::Entry::Vacant(vacant) = versions.entry(next) {
                vacant.insert(content);
                if let Some(next) = self.points.get_mut(&next) {
                    next.pages.push(page);
                }
            } else {
                self.bytes -= PAGE_SIZE;
            }
        }
    }
}

impl Machine {
    /// Freezes this moment as the first point of a history. At most about `bytes_max` bytes of pages are kept for
    /// later points.
    pub fn begin_checkpoints(&mut self, bytes_max: u64) -> Result<Checkpoints, BranchError> {
        let base = self.freeze_only()?.ram();
        let at = self.icount().0;
        self.dirty.history.take();
        let points = BTreeMap::from([(at, Point { state: self.state(), pages: Vec::new() })]);
        Ok(Checkpoints { base, first: Icount(at), points, versions: BTreeMap::new(), bytes: 0, bytes_max, at })
    }

    /// Adds this moment, unless there is one with its icount. To be called at the first moment of an icount, which is
    /// where [`Machine::run`] stops at a limit.
    pub fn checkpoint(&mut self, checkpoints: &mut Checkpoints) {
        let now = self.icount().0;
        if checkpoints.points.contains_key(&now) {
            return;
        }
        self.collect_dirty();
        let pages = self.dirty.history.take();
        for page in &pages {
            if let Some(content) = crate::ram::host_page(&self.board.memory, *page) {
                checkpoints.keep(*page, now, content);
            }
        }
        checkpoints.points.insert(now, Point { state: self.state(), pages });
        checkpoints.at = now;
        checkpoints.thin(now);
    }

    /// Goes to the point at `icount`, which must be one. Output that was not taken is dropped.
    pub fn return_to(&mut self, checkpoints: &mut Checkpoints, icount: Icount) {
        self.settle_hash();
        let (from, to) = (checkpoints.at, icount.0);
        let state = checkpoints.points[&to].state.clone();
        self.collect_dirty();
        let mut pages = PageSet::new(crate::ram::end(&self.board.memory) / PAGE_SIZE);
        for page in self.dirty.history.take() {
            pages.insert(page);
        }
        // Behind the earlier one, up to the later one.
        let between = (from.min(to) + 1)..(from.max(to) + 1);
        for (_, point) in checkpoints.points.range(between) {
            for page in &point.pages {
                pages.insert(*page);
            }
        }
        for page in pages.take() {
            let Some(content) = checkpoints.content(page, to) else { continue };
            let engine = &mut self.engine;
            crate::ram::overwrite_page(&self.board.memory, page, content, |offset, len| {
                engine.memory_written(page * PAGE_SIZE + offset, len);
            });
            self.dirty.insert(page);
        }
        self.load(state);
        self.collect_dirty();
        self.dirty.history.take();
        checkpoints.at = to;
    }
}
