//! Finding and making the blocks that translated code consists of.

use super::Stop;
use super::block::{CLASSES, Class, ITLB_ENTRIES, JumpEntry};
use super::core::Core;
use super::jumps::Jump;
use super::mode::Mode;
use super::profile::Ways;
use super::region::Array;
use super::translate::{Elsewhere, Lacks, MAX_BLOCK_BYTES, MAX_INSTRUCTIONS, OtherPage, Request};
use super::translations::{CodePage, Purpose, Start, start};
use crate::exception::Exception;
use crate::memory::{PAGE_MASK, PAGE_SIZE, PhysMemory};
use crate::paging::is_canonical;

impl Core {
    /// Forgets all translated code.
    pub fn clear_code(&mut self) {
        self.t.clear();
        for class in 0..CLASSES {
            self.flush_itlb(class, true);
        }
        self.forget_jumps();
        self.direct_clear_code();
        // SAFETY: translated code is not running.
        unsafe {
            (*self.block).itlb = [[0; ITLB_ENTRIES]; CLASSES];
        }
    }

    /// Empties the jump caches.
    pub fn forget_jumps(&mut self) {
        // SAFETY: translated code is not running.
        let jumps = unsafe { &mut (*self.block).jumps };
        jumps.iter_mut().zip(&mut self.jumps_used).for_each(|(jumps, used)| jumps.clear(used));
    }

    /// Enters what is known of branches to the page of `rip` from the engine that this one branched off.
    pub fn inherit_jumps(&mut self, rip: u64) {
        if self.exact_jumps {
            return;
        }
        // SAFETY: translated code is not running.
        let jumps = unsafe { &mut (*self.block).jumps };
        for &Jump { rip, checked, class } in self.t.inherited_jumps(rip).into_iter().flatten() {
            let (jumps, used) = (&mut jumps[class as usize], &mut self.jumps_used[class as usize]);
            if jumps.has_room(rip) {
                jumps.set(rip, self.t.address(checked), used);
            }
        }
    }

    /// Enters the branches that the engine which this one branched off has seen ahead: without looking, since looking at what
    /// the host has not provided costs as much as writing there.
    pub fn foresee_jumps(&mut self) {
        // SAFETY: translated code is not running.
        let jumps = unsafe { &mut (*self.block).jumps };
        for &Jump { rip, checked, class } in self.t.foreseen_jumps() {
            jumps[class as usize].set(rip, self.t.address(checked), &mut self.jumps_used[class as usize]);
        }
    }

    /// Translations for engines that branch off: all of them, or most.
    pub fn freeze(&mut self, all: bool) -> std::io::Result<Start> {
        // SAFETY: translated code is not running.
        let caches = unsafe { &(*self.block).jumps };
        let mut jumps = Vec::new();
        for class in [Class::User, Class::Kernel, Class::KernelAc] {
            let (cache, used) = (&caches[class as usize], &mut self.jumps_used[class as usize]);
            used.sort();
            jumps.extend(used.iter().map(|at| {
                let JumpEntry { rip, host } = cache.0[at];
                Jump { rip, checked: self.t.offset(host), class }
            }));
        }
        self.t.freeze(all, jumps)
    }

    /// Makes a block unreachable: whoever enters it looks it up again.
    pub fn kill(&mut self, index: u32) {
        if self.t.kill(index) {
            self.statistics.killed += 1;
        }
    }

    /// A group of accesses of the block had no one translation: if that happens often, it is better translated without.
    pub fn crossing(&mut self, index: u32) {
        if self.t.crossing(index, self.now().0) {
            let start = self.t.blocks[index].start();
            self.t.remember_ungrouped(start);
            self.kill(index);
        }
    }

    /// RAM changed behind the vCPU's back.
    pub fn memory_written(&mut self, gpa: u64, len: u64) {
        let mut at = gpa;
        let end = gpa.saturating_add(len);
        while at < end {
            let page = at / PAGE_SIZE;
            let piece = (PAGE_SIZE - at % PAGE_SIZE).min(end - at);
            if let Some(flags) = self.t.pages.records.get(page as usize).map(|record| record.flags) {
                self.mark_dirty(page);
                self.observe_device(at, piece);
                if flags != 0 {
                    // What a table held before is gone: forget everything that may come from it.
                    if flags & super::pages::IS_TABLE != 0 {
                        self.flush_tlbs(true);
                    }
                    self.watched_write(page, at % PAGE_SIZE, piece, flags & super::pages::HAS_CODE);
                }
            }
            at += piece;
        }
    }

    /// Identity of the code page at `vpage`, entered in the instruction TLB.
    fn code_page(&mut self, vpage: u64, mode: Mode) -> Result<Result<u32, Stop>, Exception> {
        if mode.is_direct() {
            // The soft engine finds out what is wrong, when it gets there.
            return self.direct_page(vpage, mode).map(Ok).ok_or(Exception::GP0);
        }
        let class = mode.class();
        let slot = vpage as usize % ITLB_ENTRIES;
        // SAFETY: translated code is not running.
        let cached = unsafe { (*self.block).itlb[class as usize][slot] };
        let page = &self.t.code_pages[cached];
        if cached != 0 && page.vpage == vpage && page.mode == mode {
            return Ok(Ok(cached));
        }
        let translation = self.walk(vpage << 12, false, true, class)?;
        if self.memory.host(translation.gpa & !PAGE_MASK, PAGE_SIZE).is_none() {
            return Ok(Err(self.unsupported("code outside RAM", &[])));
        }
        let page = (translation.gpa / PAGE_SIZE) as u32;
        let identity = self.t.identity(vpage, page, mode);
        // SAFETY: as above.
        unsafe { (*self.block).itlb[class as usize][slot] = identity };
        self.itlb_used[class as usize].add(slot, vpage << 12);
        Ok(Ok(identity))
    }

    pub fn unsupported(&self, what: &str, bytes: &[u8]) -> Stop {
        Stop::Unsupported { rip: self.state().rip, bytes: bytes.to_vec(), what: what.to_string() }
    }

    /// The block at RIP, translated if need be. It may be `guess`: a block that was valid once.
    pub fn find(&mut self, purpose: Purpose, guess: Option<u32>) -> Result<Result<u32, Stop>, Exception> {
        let state = self.state();
        let rip = state.rip;
        let mode = Mode::of(state);
        let class = mode.class() as usize;
        if mode != self.last_mode[class] {
            // Entries of the instruction TLB stand for pages in a mode.
            self.flush_itlb(class, true);
            self.last_mode[class] = mode;
        }
        if mode.is_64bit() && !is_canonical(rip) {
            return Err(Exception::GP0);
        }
        let page = self.code_page(rip >> 12, mode).map_err(|exception| match exception {
            Exception::PageFault { error, .. } => Exception::PageFault { address: rip, error },
            other => other,
        })?;
        let identity = match page {
            Ok(identity) => identity,
            Err(stop) => return Ok(Err(stop)),
        };
        let start = start(identity, rip);
        let known = guess.filter(|index| self.t.is_valid(*index, start, purpose));
        if let Some(index) = known.or_else(|| self.t.find(start, purpose)) {
            match self.t.blocks[index].second {
                None => return Ok(Ok(index)),
                Some((vpage, second)) => match self.code_page(vpage, mode)? {
                    Ok(now) if now == second => return Ok(Ok(index)),
                    Ok(_) => self.kill(index),
                    Err(stop) => return Ok(Err(stop)),
                },
            }
        }
        self.translate(identity, mode, purpose)
    }

    /// Another block can be translated without forgetting any.
    pub fn has_room_for_block(&self) -> bool {
        self.t.has_room(MAX_BLOCK_BYTES)
    }

    pub fn translate(&mut self, identity: u32, mode: Mode, purpose: Purpose) -> Result<Result<u32, Stop>, Exception> {
        if !self.has_room_for_block() {
            self.clear_code();
            return self.find(purpose, None);
        }
        let rip = self.state().rip;
        let page = self.t.code_pages[identity].page;
        let offset = (rip & 0xFFF) as usize;
        let host = self.memory.host(u64::from(page) * PAGE_SIZE, PAGE_SIZE).expect("code pages are RAM");
        // SAFETY: the page is mapped RAM; the guest does not run while it is read.
        let code = unsafe { std::slice::from_raw_parts(host, PAGE_SIZE as usize) };
        let (longest, grouping, resident_uses, hot) = match &mut self.chaos {
            Some(chaos) => (
                chaos.below(self.config.max_block_instructions as u64) as u32 + 1,
                chaos.below(2) == 0,
                1 + chaos.below(8) as u8,
                (chaos.below(4) == 0).then(|| Ways::Random(chaos.next())),
            ),
            None => {
                // SAFETY: the vCPU block is owned by this core; no guest runs while a block is translated.
                let profile = unsafe { &(*self.block).profile };
                let hot = mode.is_direct() || self.t.is_hot(start(identity, rip));
                let ways = hot.then_some(Ways::Counted(profile));
                (self.config.max_block_instructions, true, self.config.resident_uses, ways)
            }
        };
        let index = self.t.blocks.len() as u32;
        let cuts = self.observed.cuts();
        let mut request = Request {
            rip,
            code,
            at: offset,
            mode,
            max_instructions: match purpose {
                Purpose::Ordinary | Purpose::Windowless | Purpose::Ungrouped => longest.clamp(1, MAX_INSTRUCTIONS),
                Purpose::Short(most) => most as u32,
                Purpose::Careful => 1,
            },
            careful: purpose == Purpose::Careful,
            window: purpose == Purpose::Ordinary && !mode.is_direct(),
            hot,
            heats: purpose == Purpose::Ordinary && !mode.is_direct(),
            grouping: grouping
                && !mode.is_direct()
                && purpose != Purpose::Ungrouped
                && self.config.grouping
                && !self.t.is_ungrouped(start(identity, rip)),
            resident_uses,
            isolated: !purpose.is_linked(),
            undefined: self.config.undefined,
            block: index,
            first_site: self.t.sites.len() as u32,
            first_emulated: self.t.emulated.len() as u32,
            page_identity: identity,
            second_page: None,
            others: &[],
            tlb_mask: self.tlb_mask,
            cuts: &cuts,
        };
        if request.heats && request.hot.is_none() {
            // SAFETY: the vCPU block is owned by this core.
            unsafe { (*self.block).profile.begin(rip) };
        }
        self.statistics.translated += 1;
        if purpose != Purpose::Ordinary {
            self.statistics.translated_special += 1;
        }
        let origin = self.t.next_code();
        let mut straddling = [0u8; 15];
        let mut second_physical = None;
        let archive = self.config.archive.as_deref();
        let archive = archive.filter(|_| purpose.is_linked() && self.chaos.is_none() && request.cuts.is_empty());
        // SAFETY: the vCPU block is owned by this core; it does not run while a block is translated.
        let itlb = unsafe { &(*self.block).itlb[mode.class() as usize] };
        let other = |vpage| other_page(itlb, &self.t.code_pages, &self.memory, vpage, mode);
        let pasted = archive.and_then(|archive| archive.paste(&request, origin, &mut self.translator, other));
        self.statistics.pasted += u64::from(pasted.is_some());
        let translated = match pasted {
            Some(placed) => Ok(placed),
            None => {
                let mut others = Vec::new();
                loop {
                    let request = Request { others: &others, ..request };
                    match self.translator.translate(&request, origin) {
                        Ok(placed) => {
                            if let Some(archive) = archive {
                                archive.add(&request, origin, &self.translator, &placed);
                            }
                            break Ok(placed);
                        }
                        Err(Lacks::Page(vpage)) => others.push(other(vpage)),
                        Err(Lacks::Bytes) => break Err(()),
                    }
                }
            }
        };
        let placed = match translated {
            Ok(placed) => placed,
            Err(()) => {
                // The instruction goes on in the next page.
                let vpage = (rip >> 12).wrapping_add(1);
                let next_linear = vpage << 12;
                if mode.is_64bit() && !is_canonical(next_linear) {
                    return Err(Exception::GP0);
                }
                let second = match self.code_page(vpage & (u64::MAX >> 12), mode)? {
                    Ok(second) => second,
                    Err(stop) => return Ok(Err(stop)),
                };
                let second_page = self.t.code_pages[second].page;
                second_physical = Some(second_page);
                let first = &code[offset.max(PAGE_SIZE as usize - 15)..];
                let first_len = first.len();
                straddling[..first_len].copy_from_slice(first);
                let host = self.memory.host(u64::from(second_page) * PAGE_SIZE, PAGE_SIZE).expect("RAM");
                // SAFETY: as above.
                let rest = unsafe { std::slice::from_raw_parts(host, 15) };
                straddling[first_len..].copy_from_slice(&rest[..15 - first_len]);
                (request.code, request.at) = (&straddling, 0);
                request.second_page = Some((vpage, second));
                self.translator.translate(&request, origin).expect("fifteen bytes hold any instruction")
            }
        };
        let second = request.second_page;
        self.keep_translation(rip, identity, second, purpose, &placed);
        let in_first = placed.guest_len.min((PAGE_SIZE as usize - offset) as u32);
        let before = placed.guest_before;
        if self.t.pages.add_block(page, index, offset as u32 - before, before + in_first) {
            self.begin_to_watch(page.into());
        }
        if let Some(second_page) = second_physical
            && self.t.pages.add_block(second_page, index, 0, placed.guest_len - in_first)
        {
            self.begin_to_watch(second_page.into());
        }
        for part in 0..self.translator.elsewhere.len() {
            let Elsewhere { page, first, len, .. } = self.translator.elsewhere[part];
            if self.t.pages.add_block(page, index, first.into(), len.into()) {
                self.begin_to_watch(page.into());
            }
        }
        Ok(Ok(index))
    }

    /// Puts what the translator has just made where it can be executed and found.
    pub fn keep_translation(
        &mut self,
        rip: u64,
        identity: u32,
        second: Option<(u64, u32)>,
        purpose: Purpose,
        placed: &super::translate::Placed,
    ) {
        assert!(self.translator.a.bytes.len() <= MAX_BLOCK_BYTES, "a block fits its bound");
        self.t.place(&self.translator.a.bytes);
        self.translator.sites.drain(..).for_each(|site| self.t.sites.push(site));
        self.translator.emulated.drain(..).for_each(|instruction| self.t.emulated.push(instruction));
        self.translator.faults.drain(..).for_each(|fault| self.t.faults.push(fault));
        self.t.add_block(rip, identity, second, purpose, placed);
    }
}

/// What a block may go on in, as far as the instruction TLB knows the page: translating must not be seen, hence walk no
/// tables.
fn other_page<'a>(
    itlb: &[u32; ITLB_ENTRIES],
    code_pages: &Array<CodePage>,
    memory: &PhysMemory,
    vpage: u64,
    mode: Mode,
) -> OtherPage<'a> {
    let identity = itlb[vpage as usize % ITLB_ENTRIES];
    let CodePage { vpage: known, page, mode: its_mode, .. } = code_pages[identity];
    let host = memory.host(u64::from(page) * PAGE_SIZE, PAGE_SIZE);
    let code = host.filter(|_| identity != 0 && known == vpage && its_mode == mode).map(|host| {
        // SAFETY: the page is mapped RAM; the guest does not run while it is read.
        (identity, page, unsafe { std::slice::from_raw_parts(host, PAGE_SIZE as usize) })
    });
    OtherPage { vpage, code }
}
