//! The software MMU: fills the TLBs that translated code looks into, and serves what they miss.

use super::block::{Bounce, Class};
use super::core::{Core, Pending};
use super::mode::class;
use super::pages::{IS_TABLE, MANY_BASES};
use super::translate::{First, SiteKind};
use crate::exception::Exception;
use crate::memory::{PAGE_MASK, PAGE_SIZE};
use crate::paging::{self, Access, Translation, is_canonical};
use crate::system::alignment;

/// A write of an operand that was handed out in a bounce buffer.
pub struct Commit {
    linear: u64,
    size: usize,
    class: Class,
    /// Offset of the operand in the buffer.
    start: usize,
}

/// Where one page of an access is.
enum Target {
    Ram(*mut u8),
    Mmio(u64),
    /// The write would change what the running block executes.
    Disturbs,
}

/// How an access is meant.
#[derive(Clone, Copy)]
pub struct Intent {
    pub read: bool,
    pub write: bool,
    pub class: Class,
}

/// Has the host give a branch a page of its own, that it shares with its template, before the page is read. Programs write
/// again what they have written before, and then the host would have mapped it twice: for reading, which takes longer
/// than a copy, and to be written.
fn own(page: *mut u8) {
    // SAFETY: a page of RAM, which keeps its content; nobody else writes it while the vCPU is at work.
    unsafe { std::arch::asm!("or byte ptr [{}], 0", in(reg) page, options(nostack)) };
}

impl Core {
    // Walking --------------------------------------------------------------------------------------------------

    /// Walks the page tables and watches the tables that it came through.
    pub fn walk(&mut self, linear: u64, write: bool, fetch: bool, class: Class) -> Result<Translation, Exception> {
        // SAFETY: the architectural state is not borrowed by anyone else during a walk.
        let state = unsafe { &mut (*self.block).state };
        let access = Access { write, fetch, user: class == Class::User, smap_active: class == Class::Kernel };
        let translation = paging::walk(state, &self.memory, linear, access)?;
        self.walked = true;
        let levels = translation.levels as usize;
        for (i, entry) in translation.table_entries[..levels].iter().enumerate() {
            let level = if levels == 0 { 0 } else { 4 - i as u64 };
            let shift = 12 + 9 * (level - 1);
            let base = (linear >> (shift + 9) << (shift + 9)) & !PAGE_MASK | level;
            let page = (entry / PAGE_SIZE) as usize;
            if translation.updated & 1 << i != 0 {
                self.mark_dirty(page as u64);
                self.observe_walk(*entry);
                // A table may be code as well; the running block must not go on with what it was.
                if self.t.pages.hits_code(page as u32, (entry & PAGE_MASK) as u32, 8) {
                    self.kill_code(page as u64, entry & PAGE_MASK, 8);
                    self.watched += 1;
                }
            }
            let flushes = self.t.flushes;
            let known = self.t.pages.records[page as u32];
            let mut record = known;
            (record.table_writes, record.table_used) = (0, flushes);
            if known.flags & IS_TABLE == 0 {
                (record.flags, record.table_base) = (known.flags | IS_TABLE, base);
            } else if known.table_base != base {
                // What came through it as a table of something else has been forgotten if all was since.
                record.table_base = if known.table_used < flushes { base } else { MANY_BASES };
            }
            // Written only where that changes something: a branch shares these records with others.
            if record != known {
                self.t.pages.records[page as u32] = record;
            }
            if known.flags & IS_TABLE == 0 {
                self.watched += 1;
                self.begin_to_watch(page as u64);
            }
        }
        Ok(translation)
    }

    /// Fills a TLB entry for the page of `linear`.
    fn fill(&mut self, linear: u64, page: u64, host_page: u64, class: Class, write: bool) {
        let index = ((linear >> 12) & self.tlb_mask as u64) as usize;
        // SAFETY: the vCPU block is owned by this core.
        unsafe { (*self.block).tlb[class as usize].fill(index, linear & !PAGE_MASK, host_page, write) };
        self.used[class as usize][write as usize].add(index, linear);
        if class == Class::User {
            self.direct_fill(linear, page, write);
        }
    }

    /// The target of an access within one page; fills the TLB where that is allowed.
    fn page_target(&mut self, linear: u64, len: u64, intent: Intent, running: bool) -> Result<Target, Exception> {
        let translation = self.walk(linear, intent.write, false, intent.class)?;
        let page_gpa = translation.gpa & !PAGE_MASK;
        let Some(host_page) = self.memory.host(page_gpa, PAGE_SIZE) else {
            return Ok(Target::Mmio(translation.gpa));
        };
        let page = page_gpa / PAGE_SIZE;
        let offset = linear & PAGE_MASK;
        if self.observe_access(linear, translation.gpa, len, intent, running) {
            return Ok(Target::Disturbs);
        }
        if intent.write {
            self.mark_dirty(page);
            let flags = self.t.pages.records[page as u32].flags;
            if flags != 0 {
                if running && self.disturbs(page, offset, len) {
                    return Ok(Target::Disturbs);
                }
                self.watched_write(page, offset, len, flags);
            } else if !self.observes_page(linear, page_gpa, true) {
                self.fill(linear, page, host_page as u64, intent.class, true);
            }
        }
        if !intent.write && intent.class == Class::User && translation.dirty && self.t.code_since_branch().is_some() {
            own(host_page);
        }
        if (!intent.write || self.t.pages.records[page as u32].flags == 0)
            && !self.observes_page(linear, page_gpa, false)
        {
            self.fill(linear, page, host_page as u64, intent.class, false);
        }
        // SAFETY: the offset is inside the page that `host` returned.
        Ok(Target::Ram(unsafe { host_page.add(offset as usize) }))
    }

    // Translated code's slow path ------------------------------------------------------------------------------

    /// Host address for the access of site `site` at `linear`, or None with `self.pending` set.
    pub fn slow_access(&mut self, linear: u64, site: u32) -> Option<*mut u8> {
        let site = self.t.sites[site];
        let SiteKind::Memory { size, read, write, class, careful, first, .. } = site.kind else {
            unreachable!("only memory sites take the slow path")
        };
        let size = size as u64;
        let intent = Intent { read, write, class };
        if careful {
            self.watch(linear, size, write);
            if self.alignment_fault(linear, size) {
                self.pending = Pending::Exception(Exception::AlignmentCheck);
                return None;
            }
        }
        let watched = self.watched;
        let mut found = match first {
            None => self.resolve(linear, size, intent, careful),
            Some(first) => self.resolve_group(linear, size, first, intent, site.block),
        };
        if watched != self.watched && !careful && found.is_ok() {
            // A page is watched from now on that the running block may hold a translation of.
            found = Ok(None);
        }
        if !careful && self.observed.stops() && found.is_ok() {
            // The walk has found something: the run stops behind this instruction.
            found = Ok(None);
        }
        match found {
            Ok(Some(pointer)) => Some(pointer),
            Ok(None) => {
                if !matches!(self.pending, Pending::Groupless) {
                    self.pending = Pending::Careful;
                }
                None
            }
            Err(exception) => {
                self.pending = Pending::Exception(exception);
                None
            }
        }
    }

    /// The access raises #AC: it is misaligned where that is checked, and has no graver fault.
    fn alignment_fault(&mut self, linear: u64, size: u64) -> bool {
        let state = self.state();
        let wide = state.is_64bit();
        let last = linear.wrapping_add(size - 1);
        let addressable = if wide { is_canonical(linear) && is_canonical(last) } else { last <= u64::from(u32::MAX) };
        if !alignment::is_checked(state) || !addressable {
            return false;
        }
        let misaligned = alignment::check(state, linear, size as usize).is_err();
        // An instruction that wants its operand aligned in any case raises #GP.
        misaligned && !self.instruction_at_rip().is_some_and(|i| super::classify::must_be_aligned(&i))
    }

    /// Ok(None) means that the instruction must be executed by itself, carefully.
    fn resolve(&mut self, linear: u64, size: u64, intent: Intent, careful: bool) -> Result<Option<*mut u8>, Exception> {
        let wide = self.state().is_64bit();
        if wide && !(is_canonical(linear) && is_canonical(linear.wrapping_add(size - 1))) {
            return Err(Exception::GP0);
        }
        let in_first = PAGE_SIZE - (linear & PAGE_MASK);
        if size <= in_first {
            return match self.page_target(linear, size, intent, !careful)? {
                Target::Ram(pointer) => Ok(Some(pointer)),
                Target::Disturbs => Ok(None),
                Target::Mmio(_) if !careful => Ok(None),
                Target::Mmio(gpa) => Ok(Some(self.bounce_mmio(linear, gpa, size as usize, intent))),
            };
        }
        // The operand spans two pages: both are checked before anything happens.
        let second = linear.wrapping_add(in_first) & if wide { u64::MAX } else { u32::MAX as u64 };
        if let Some(pointer) = self.resolve_known_pages(linear, second, size, intent) {
            return Ok(Some(pointer));
        }
        self.walk(linear, intent.write, false, intent.class)?;
        self.walk(second, intent.write, false, intent.class)?;
        let running = !careful;
        let low = self.page_target(linear, in_first, intent, running)?;
        let high = self.page_target(second, size - in_first, intent, running)?;
        if matches!(low, Target::Disturbs) || matches!(high, Target::Disturbs) {
            return Ok(None);
        }
        if let (Target::Ram(low), Target::Ram(high)) = (&low, &high)
            && low.wrapping_add(in_first as usize) == *high
        {
            return Ok(Some(*low));
        }
        let memory_mapped = matches!(low, Target::Mmio(_)) || matches!(high, Target::Mmio(_));
        if (intent.write || memory_mapped) && !careful {
            return Ok(None);
        }
        let start = (linear & 63) as usize;
        let mut data = [0u8; 64];
        self.read_linear(linear, &mut data[..size as usize], intent.class)?;
        let buffer = self.bounce(intent.write);
        buffer[start..start + size as usize].copy_from_slice(&data[..size as usize]);
        let pointer = buffer[start..].as_mut_ptr();
        if intent.write {
            self.commit = Some(Commit { linear, size: size as usize, class: intent.class, start });
        }
        Ok(Some(pointer))
    }

    /// Host address of an operand in two pages that are both in the TLB: where the host has them side by side, or a copy
    /// that is only read.
    fn resolve_known_pages(&mut self, linear: u64, second: u64, size: u64, intent: Intent) -> Option<*mut u8> {
        let in_first = PAGE_SIZE - (linear & PAGE_MASK);
        let low = self.probe(linear, in_first, intent.write, intent.class)?;
        let high = self.probe(second, size - in_first, intent.write, intent.class)?;
        if low.wrapping_add(in_first as usize) == high {
            return Some(low);
        }
        if intent.write {
            return None;
        }
        let start = (linear & 63) as usize;
        let pointer = self.bounce(false)[start..start + size as usize].as_mut_ptr();
        // SAFETY: the TLB entries cover both pieces, and the buffer has room for them.
        unsafe {
            std::ptr::copy_nonoverlapping(low, pointer, in_first as usize);
            std::ptr::copy_nonoverlapping(high, pointer.add(in_first as usize), (size - in_first) as usize);
        }
        Some(pointer)
    }

    /// Host address of the range of a group, if it lies in one ordinary page. Only the access at `offset` in it
    /// happens now: it alone decides about faults and the page tables' accessed and dirty bits.
    fn resolve_group(
        &mut self,
        linear: u64,
        span: u64,
        first: First,
        intent: Intent,
        block: u32,
    ) -> Result<Option<*mut u8>, Exception> {
        let First { offset, size, others_write } = first;
        let at = linear.wrapping_add(offset.into());
        if (linear & PAGE_MASK) + span > PAGE_SIZE {
            self.ungroup(block);
            return Ok(None);
        }
        if !is_canonical(at) {
            return Err(Exception::GP0);
        }
        match self.page_target(at, size.into(), intent, true)? {
            Target::Ram(pointer) => {
                let translation = self.walk(at, intent.write, false, intent.class)?;
                let (gpa, page) = (translation.gpa, translation.gpa / PAGE_SIZE);
                let watched = self.t.pages.records[page as u32].flags != 0;
                if intent.write && watched || self.observes_range(linear, gpa.wrapping_sub(offset.into()), span) {
                    return Ok(None);
                }
                if others_write {
                    // The write that may follow must not be the one that sets the dirty flag, nor be looked at.
                    let quiet = translation.writable && translation.dirty && !watched;
                    if !quiet || self.observes_page(at, gpa & !PAGE_MASK, true) {
                        self.ungroup(block);
                        return Ok(None);
                    }
                    self.mark_dirty(page);
                    let host_page = pointer.wrapping_sub((at & PAGE_MASK) as usize);
                    self.fill(at, page, host_page as u64, intent.class, true);
                }
                Ok(Some(pointer.wrapping_sub(offset.into())))
            }
            Target::Mmio(_) | Target::Disturbs => Ok(None),
        }
    }

    /// The running block must go on without groups; one to which that happens often is translated without.
    fn ungroup(&mut self, block: u32) {
        self.crossing(block);
        self.pending = Pending::Groupless;
    }

    fn bounce(&mut self, write: bool) -> &mut [u8; 128] {
        // SAFETY: the buffers belong to this core's block; translated code is not running.
        let Bounce(bytes) =
            unsafe { if write { &mut (*self.block).write_bounce } else { &mut (*self.block).read_bounce } };
        bytes
    }

    fn bounce_mmio(&mut self, linear: u64, gpa: u64, size: usize, intent: Intent) -> *mut u8 {
        let start = (linear & 63) as usize;
        let mut data = [0u8; 64];
        if intent.read {
            let now = self.now();
            self.bus().mmio_read(now, gpa, &mut data[..size]);
        }
        let buffer = self.bounce(intent.write);
        buffer[start..start + size].copy_from_slice(&data[..size]);
        let pointer = buffer[start..].as_mut_ptr();
        if intent.write {
            self.commit = Some(Commit { linear, size, class: intent.class, start });
        }
        pointer
    }

    /// Stores what a careful instruction left in the bounce buffer.
    pub fn commit(&mut self) {
        let Some(commit) = self.commit.take() else { return };
        let mut data = [0u8; 64];
        let buffer = self.bounce(true);
        data[..commit.size].copy_from_slice(&buffer[commit.start..commit.start + commit.size]);
        self.write_linear(commit.linear, &data[..commit.size], commit.class)
            .expect("both pages were checked for writing before the instruction executed");
    }

    // Access from Rust -----------------------------------------------------------------------------------------

    /// Host address of RAM at `linear` from the TLB.
    #[inline]
    fn probe(&self, linear: u64, len: u64, write: bool, class: Class) -> Option<*mut u8> {
        let index = ((linear >> 12) & self.tlb_mask as u64) as usize;
        // SAFETY: the vCPU block is owned by this core.
        let tlb = unsafe { &(*self.block).tlb[class as usize] };
        let offset = linear ^ tlb.tags[write as usize][index];
        (offset <= PAGE_SIZE - len).then(|| linear.wrapping_add(tlb.distances[index]) as *mut u8)
    }

    /// Splits an access at the page boundary and calls `each` with the target of every piece.
    fn pieces(
        &mut self,
        linear: u64,
        len: usize,
        intent: Intent,
        mut each: impl FnMut(&mut Core, Target, usize, usize),
    ) -> Result<(), Exception> {
        // 32-bit code's own addresses wrap at 4 GiB; the system's tables and stacks may lie above while it runs.
        let wide = self.state().is_64bit() || linear > u64::from(u32::MAX);
        let mask = if wide { u64::MAX } else { u64::from(u32::MAX) };
        if wide && !(is_canonical(linear) && is_canonical(linear.wrapping_add(len as u64 - 1))) {
            return Err(Exception::GP0);
        }
        let in_first = (PAGE_SIZE - (linear & PAGE_MASK)).min(len as u64) as usize;
        if in_first < len {
            // Nothing happens unless both pages allow it.
            self.walk(linear, intent.write, false, intent.class)?;
            self.walk(linear.wrapping_add(in_first as u64) & mask, intent.write, false, intent.class)?;
        }
        let mut done = 0;
        while done < len {
            let at = linear.wrapping_add(done as u64) & mask;
            let piece = (PAGE_SIZE - (at & PAGE_MASK)).min((len - done) as u64) as usize;
            let target = match self.probe(at, piece as u64, intent.write, intent.class) {
                Some(pointer) => Target::Ram(pointer),
                None => self.page_target(at, piece as u64, intent, false)?,
            };
            each(self, target, done, piece);
            done += piece;
        }
        Ok(())
    }

    /// Reads guest memory at a linear address; at most one page long.
    pub fn read_linear(&mut self, linear: u64, data: &mut [u8], class: Class) -> Result<(), Exception> {
        self.watch(linear, data.len() as u64, false);
        if let Some(pointer) = self.probe(linear, data.len() as u64, false, class) {
            // SAFETY: the TLB entry covers the range.
            unsafe { std::ptr::copy_nonoverlapping(pointer, data.as_mut_ptr(), data.len()) };
            return Ok(());
        }
        let intent = Intent { read: true, write: false, class };
        self.pieces(linear, data.len(), intent, |core, target, done, len| match target {
            // SAFETY: the target is RAM of at least `len` bytes.
            Target::Ram(pointer) => unsafe {
                std::ptr::copy_nonoverlapping(pointer, data[done..].as_mut_ptr(), len);
            },
            Target::Mmio(gpa) => {
                let now = core.now();
                core.bus().mmio_read(now, gpa, &mut data[done..done + len]);
            }
            Target::Disturbs => unreachable!("only translated code can be disturbed"),
        })
    }

    /// Writes guest memory at a linear address; at most one page long.
    pub fn write_linear(&mut self, linear: u64, data: &[u8], class: Class) -> Result<(), Exception> {
        self.watch(linear, data.len() as u64, true);
        if let Some(pointer) = self.probe(linear, data.len() as u64, true, class) {
            // SAFETY: the TLB entry covers the range.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), pointer, data.len()) };
            return Ok(());
        }
        let intent = Intent { read: false, write: true, class };
        self.pieces(linear, data.len(), intent, |core, target, done, len| match target {
            // SAFETY: the target is RAM of at least `len` bytes.
            Target::Ram(pointer) => unsafe {
                std::ptr::copy_nonoverlapping(data[done..].as_ptr(), pointer, len);
            },
            Target::Mmio(gpa) => {
                let now = core.now();
                core.bus().mmio_write(now, gpa, &data[done..done + len]);
            }
            Target::Disturbs => unreachable!("only translated code can be disturbed"),
        })
    }

    /// Host address for `len` bytes of one page in bulk, or None for memory-mapped I/O.
    pub fn bulk(&mut self, linear: u64, len: usize, write: bool, class: Class) -> Result<Option<*mut u8>, Exception> {
        self.watch(linear, len as u64, write);
        debug_assert!((linear & PAGE_MASK) + len as u64 <= PAGE_SIZE);
        if let Some(pointer) = self.probe(linear, len as u64, write, class) {
            return Ok(Some(pointer));
        }
        if self.state().is_64bit() && !is_canonical(linear) {
            return Err(Exception::GP0);
        }
        match self.page_target(linear, len as u64, Intent { read: !write, write, class }, false)? {
            Target::Ram(pointer) => Ok(Some(pointer)),
            Target::Mmio(_) | Target::Disturbs => Ok(None),
        }
    }

    /// The access class for instructions at the current privilege level.
    pub fn current_class(&self) -> Class {
        class(self.state())
    }
}
