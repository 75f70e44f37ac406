//! Translated blocks for the virtual machine: which one is at RIP, what is translated ahead of it, and how they lead to
//! one another.

use super::super::block::{Class, ITLB_ENTRIES};
use super::super::core::Core;
use super::super::mode::Mode;
use super::super::translate::SiteKind;
use super::super::translations::{Purpose, start};
use crate::memory::{PAGE_MASK, PAGE_SIZE};

impl Core {
    /// Identity of the code page at `vpage`, entered in the VM's instruction TLB; None if the soft engine should look.
    pub fn direct_page(&mut self, vpage: u64, mode: Mode) -> Option<u32> {
        let slot = vpage as usize % ITLB_ENTRIES;
        if self.direct().mode != mode {
            self.direct().forget_pages();
            self.direct().mode = mode;
        }
        let cached = self.direct().block().itlb[Class::User as usize][slot];
        if cached != 0
            && let Some(page) = self.t.code_pages.get(cached as usize)
            && page.vpage == vpage
            && page.mode == mode
        {
            return Some(cached);
        }
        let page = match self.soft_page(vpage) {
            Some(known) => self.t.code_pages[known].page,
            None => {
                let translation = self.walk(vpage << 12, false, true, Class::User).ok()?;
                self.memory.host(translation.gpa & !PAGE_MASK, PAGE_SIZE)?;
                (translation.gpa / PAGE_SIZE) as u32
            }
        };
        let identity = self.t.identity(vpage, page, mode);
        self.direct().block().itlb[Class::User as usize][slot] = identity;
        self.direct().pages_used.push(slot as u16);
        Some(identity)
    }

    /// The soft engine's identity of the code page at `vpage`, if it has it in its instruction TLB.
    fn soft_page(&self, vpage: u64) -> Option<u32> {
        // SAFETY: translated code is not running.
        let cached = unsafe { (*self.block).itlb[Class::User as usize][vpage as usize % ITLB_ENTRIES] };
        let page = self.t.code_pages.get(cached as usize)?;
        (cached != 0 && page.vpage == vpage && page.mode == Mode::of(self.state())).then_some(cached)
    }

    /// The block for the VM at RIP, translated if need be; None if there can be none.
    pub(super) fn direct_find(&mut self) -> Option<u32> {
        let rip = self.state().rip;
        if rip >> 47 != 0 {
            return None;
        }
        let mode = Mode::of(self.state()).direct();
        let identity = self.direct_page(rip >> 12, mode)?;
        if let Some(index) = self.t.find(start(identity, rip), Purpose::Ordinary) {
            let second = self.t.blocks[index].second;
            match second {
                None => return Some(index),
                Some((vpage, second)) if self.direct_page(vpage, mode)? == second => return Some(index),
                Some(_) => self.kill(index),
            }
        }
        if !self.has_room_for_block() {
            self.clear_code();
            return None;
        }
        let first_site = self.t.sites.len() as u32;
        match self.translate(identity, mode, Purpose::Ordinary) {
            Ok(Ok(index)) => {
                self.direct_ahead(first_site, index);
                Some(index)
            }
            _ => None,
        }
    }

    /// Translates what a new block leads to, as far as the soft engine has met it: an exit for each link would cost
    /// more. Touches no page tables: nothing of this is executed yet. The sites of the block are those from
    /// `first_site` on.
    fn direct_ahead(&mut self, first_site: u32, block: u32) {
        const BLOCKS_MAX: u32 = 256;
        let (rip, mode) = (self.state().rip, Mode::of(self.state()));
        self.direct_seed_jump(block);
        let mut made = 0;
        let mut at = first_site;
        // The sites of blocks that are translated here are appended, and looked at in turn.
        while (at as usize) < self.t.sites.len() {
            let site = self.t.sites[at];
            at += 1;
            let SiteKind::Link { target, patch, .. } = site.kind else { continue };
            let Some(soft) = self.soft_page(target >> 12).filter(|_| target >> 47 == 0) else { continue };
            let known = self.t.find(start(soft, target), Purpose::Ordinary);
            if known.is_none_or(|known| self.t.blocks[known].second.is_some()) || !self.has_room_for_block() {
                continue;
            }
            let identity = self.t.identity(target >> 12, self.t.code_pages[soft].page, mode.direct());
            let found = match self.t.find(start(identity, target), Purpose::Ordinary) {
                Some(index) if self.t.blocks[index].second.is_none() => index,
                None if made < BLOCKS_MAX => {
                    made += 1;
                    self.state_mut().rip = target;
                    let translated = self.translate(identity, mode.direct(), Purpose::Ordinary);
                    self.state_mut().rip = rip;
                    let Ok(Ok(index)) = translated else { continue };
                    self.direct_seed_jump(index);
                    index
                }
                _ => continue,
            };
            if self.config.chaining {
                self.direct_link(site.block, patch, found);
            }
        }
    }

    /// Leads a branch of `source` to a block.
    pub(super) fn direct_link(&mut self, source: u32, patch: u32, target: u32) {
        let (source, block) = (&self.t.blocks[source], &self.t.blocks[target]);
        let near = block.identity == source.identity && block.second.is_none() && source.second.is_none();
        let to = if near { block.entry } else { block.checked };
        self.t.patch_rel32(patch, to);
    }

    /// Enters a new block in the VM's jump cache, if the soft engine has it in its own.
    fn direct_seed_jump(&mut self, index: u32) {
        let (rip, checked) = (self.t.blocks[index].rip, self.t.blocks[index].checked);
        // SAFETY: translated code is not running.
        let jumps = unsafe { &(*self.block).jumps[Class::User as usize] };
        if jumps.get(rip).is_some() {
            self.direct_jump(rip, checked);
        }
    }

    /// Enters a block in the VM's jump cache.
    pub(super) fn direct_jump(&mut self, target: u64, checked: u32) {
        let direct = self.direct();
        let host = direct.tables.code_linear() + u64::from(checked);
        // SAFETY: as in `Direct::block`; the list is no part of the block.
        unsafe { (*direct.tables.block()).jumps[Class::User as usize].set(target, host, &mut direct.jumps_used) };
    }

    /// Leads what leads to a block that is not valid any more to the one that took its place.
    pub(super) fn direct_forward(&mut self, old: u32, index: u32) {
        let (target, invalid) = (self.t.blocks[index], self.t.blocks[old]);
        if self.direct().block().jumps[Class::User as usize].get(target.rip).is_some() {
            self.direct_jump(target.rip, target.checked);
        }
        if !invalid.valid && invalid.identity == target.identity && invalid.rip == target.rip {
            self.t.patch_jmp(invalid.checked, target.checked);
            self.t.patch_jmp(invalid.entry, target.entry);
        }
    }
}
