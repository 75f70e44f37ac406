//! Translations kept beyond an engine: a memo of the translator.
//!
//! What the translator emits is a function of the guest's bytes, their address, the mode and a few settings, but for
//! where the code will stand and which indexes its records will have. So a translation can be written down with its
//! position taken out, and pasted wherever the same bytes are met again: in the next run, or in another machine.
//! Whether a translation is pasted or made anew cannot be seen by a guest.
//!
//! An archive is host code. Whoever can write one can do what the process can: it is as trusted as the program.

use super::hash::FastMap;
use super::mode::Mode;
use super::translate::{
    Elsewhere, MAX_BLOCK_BYTES, MAX_RECORDS, OtherPage, Placed, Request, Site, SiteKind, Translator,
};
use super::undefined::Undefined;
use iced_x86::{Decoder, DecoderOptions};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most bytes of an archive; what is translated beyond is not kept. Room for a kernel's boot and a runtime's start: a JVM's
/// programs of ten seconds fill 140 MB.
const BYTES_MAX: usize = 256 << 20;

/// What a translation was asked for, besides the bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Key {
    rip: u64,
    mode: u16,
    grouping: bool,
    window: bool,
    hot: bool,
    heats: bool,
    resident_uses: u8,
    undefined: Undefined,
    max_instructions: u32,
    tlb_mask: u32,
}

impl Key {
    fn of(request: &Request) -> Key {
        Key {
            rip: request.rip,
            mode: request.mode.0,
            grouping: request.grouping,
            window: request.window,
            hot: request.hot.is_some(),
            heats: request.heats,
            resident_uses: request.resident_uses,
            undefined: request.undefined,
            max_instructions: request.max_instructions,
            tlb_mask: request.tlb_mask,
        }
    }

    fn hash(&self) -> u64 {
        let settings = u64::from(self.mode) << 48
            ^ u64::from(self.max_instructions) << 40
            ^ u64::from(self.tlb_mask) << 8
            ^ u64::from(self.undefined.number()) << 24
            ^ u64::from(self.resident_uses) << 4
            ^ u64::from(self.hot) << 3
            ^ u64::from(self.heats) << 2
            ^ u64::from(self.grouping) << 1
            ^ u64::from(self.window);
        self.rip ^ settings.wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }
}

/// Places in the code that depend on where it stands or on the indexes of its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Relocation {
    /// A rel32 that leads out of the block.
    Away(u32),
    /// An immediate with the index of a site.
    Site(u32),
    /// An immediate with the identity of the block's page.
    Identity(u32),
    /// An immediate with the identity of another page, and the page's number among those.
    OtherIdentity(u32, u8),
}

/// One translation with its position taken out: it stands at offset 0, its first site is site 0.
#[derive(Serialize, Deserialize)]
struct Record<'a> {
    key: Key,
    guest: &'a [u8],
    /// What comes from other pages: linear page, offset in it, bytes.
    #[serde(borrow)]
    elsewhere: Vec<(u64, u16, &'a [u8])>,
    code: &'a [u8],
    placed: Placed,
    relocations: Vec<Relocation>,
    sites: Vec<Site>,
    /// Offsets in `guest` of the instructions for the emulation.
    emulated: Vec<u16>,
    faults: Vec<(u32, u32)>,
}

/// Translations found by what they were made from. Shared by any number of engines.
pub struct Archive {
    /// Records one behind the other, each behind its length in 4 bytes.
    kept: Vec<u8>,
    /// For each record: where it begins in `kept`, and the number + 1 of the next with the same hash.
    records: Vec<(u32, u32)>,
    /// By hash of the key: the number of a record.
    index: FastMap<u64, u32>,
    /// What was translated since, in the same form.
    fresh: Mutex<Vec<u8>>,
}

impl std::fmt::Debug for Archive {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Archive of {} translations", self.records.len())
    }
}

impl Archive {
    /// An archive of what [`Archive::bytes`] gave before; none of it if that is empty. None if it is malformed.
    pub fn new(kept: Vec<u8>) -> Option<Arc<Archive>> {
        let mut archive = Archive { kept, records: Vec::new(), index: FastMap::default(), fresh: Mutex::default() };
        let mut at = 0;
        while at < archive.kept.len() {
            let record = record_at(&archive.kept, at)?;
            let (key, _) = postcard::take_from_bytes::<Key>(record).ok()?;
            let number = archive.records.len() as u32;
            let next = archive.index.insert(key.hash(), number).map_or(0, |earlier| earlier + 1);
            archive.records.push((u32::try_from(at).ok()?, next));
            at += 4 + record.len();
        }
        Some(Arc::new(archive))
    }

    /// Bytes of the translations that the archive began with, and of those made since.
    pub fn sizes(&self) -> (usize, usize) {
        (self.kept.len(), self.fresh().len())
    }

    /// All translations, for [`Archive::new`].
    pub fn bytes(&self) -> Vec<u8> {
        let fresh = self.fresh();
        let mut bytes = Vec::with_capacity(self.kept.len() + fresh.len());
        bytes.extend_from_slice(&self.kept);
        bytes.extend_from_slice(&fresh);
        bytes
    }

    fn fresh(&self) -> MutexGuard<'_, Vec<u8>> {
        // What a panicking thread left is whole: records are appended at once.
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the translation that was asked for into the translator, as if it had been made now.
    /// `others` says what is known of a linear page.
    pub fn paste<'a>(
        &self,
        request: &Request,
        origin: u32,
        translator: &mut Translator,
        others: impl Fn(u64) -> OtherPage<'a>,
    ) -> Option<Placed> {
        let key = Key::of(request);
        let mut number = self.index.get(&key.hash()).map_or(0, |number| number + 1);
        while number != 0 {
            let (at, next) = self.records[number as usize - 1];
            let record: Record = postcard::from_bytes(record_at(&self.kept, at as usize)?).ok()?;
            if record.key == key
                && record.is_made_from(request)
                && let Some(placed) = record.paste(request, origin, translator, &others)
            {
                return Some(placed);
            }
            number = next;
        }
        None
    }

    /// Keeps the translation that the translator has just made at `origin`.
    pub fn add(&self, request: &Request, origin: u32, translator: &Translator, placed: &Placed) {
        // A record is longer than its code: one that cannot fit need not be made.
        if self.kept.len() + self.fresh().len() + translator.a.bytes.len() > BYTES_MAX {
            return;
        }
        let mut code = translator.a.bytes.clone();
        for relocation in &translator.relocations {
            match *relocation {
                Relocation::Away(at) => change(&mut code, at, |rel| rel.wrapping_add(origin)),
                Relocation::Site(at) => change(&mut code, at, |site| site.wrapping_sub(request.first_site)),
                Relocation::Identity(at) | Relocation::OtherIdentity(at, _) => change(&mut code, at, |_| 0),
            };
        }
        let Some(guest) = placed.guest(request) else { return };
        let first = request.rip.wrapping_sub(u64::from(placed.guest_before));
        let offset_of = |rip: u64| rip.wrapping_sub(first);
        if translator.emulated.iter().any(|instruction| offset_of(instruction.ip()) >= guest.len() as u64) {
            return;
        }
        let bytes_of = |part: &Elsewhere| {
            let other = request.others.iter().find(|other| other.vpage == part.vpage)?;
            let (_, _, code) = other.code?;
            Some((part.vpage, part.first, code.get(part.first.into()..)?.get(..part.len.into())?))
        };
        let Some(elsewhere) = translator.elsewhere.iter().map(bytes_of).collect() else { return };
        let record = Record {
            key: Key::of(request),
            guest,
            elsewhere,
            code: &code,
            placed: placed.moved(0u32.wrapping_sub(origin)),
            relocations: translator.relocations.clone(),
            sites: translator
                .sites
                .iter()
                .map(|site| site.moved(0u32.wrapping_sub(origin), 0u32.wrapping_sub(request.first_emulated), 0))
                .collect(),
            emulated: translator.emulated.iter().map(|instruction| offset_of(instruction.ip()) as u16).collect(),
            faults: translator.faults.iter().map(|(at, site)| (at - origin, site - request.first_site)).collect(),
        };
        let Ok(bytes) = postcard::to_stdvec(&record) else { return };
        let mut fresh = self.fresh();
        if self.kept.len() + fresh.len() + bytes.len() + 4 <= BYTES_MAX {
            fresh.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            fresh.extend_from_slice(&bytes);
        }
    }
}

fn record_at(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let (len, rest) = bytes.get(at..)?.split_first_chunk::<4>()?;
    rest.get(..u32::from_le_bytes(*len) as usize)
}

/// Replaces the 4 bytes at `at`; false if they are not there.
fn change(code: &mut [u8], at: u32, new: impl FnOnce(u32) -> u32) -> bool {
    let Some(bytes) = code.get_mut(at as usize..).and_then(|rest| rest.first_chunk_mut::<4>()) else { return false };
    *bytes = new(u32::from_le_bytes(*bytes)).to_le_bytes();
    true
}

impl Record<'_> {
    /// The bytes that would be translated are those of this translation.
    fn is_made_from(&self, request: &Request) -> bool {
        self.placed.guest(request).is_some_and(|guest| guest == self.guest)
    }

    fn paste<'a>(
        &self,
        request: &Request,
        origin: u32,
        translator: &mut Translator,
        others: impl Fn(u64) -> OtherPage<'a>,
    ) -> Option<Placed> {
        let records = self.sites.len().max(self.emulated.len()).max(self.faults.len());
        if self.code.len() > MAX_BLOCK_BYTES || records > MAX_RECORDS {
            return None;
        }
        let found = |(vpage, first, bytes): &(u64, u16, &[u8])| {
            let (identity, page, code) = others(*vpage).code?;
            let part = Elsewhere { vpage: *vpage, page, first: *first, len: bytes.len() as u16 };
            code.get((*first).into()..)?.starts_with(bytes).then_some((identity, part))
        };
        let parts: Vec<_> = self.elsewhere.iter().map(found).collect::<Option<_>>()?;
        translator.a.start(origin as u64);
        translator.a.put(self.code);
        for relocation in &self.relocations {
            let code = &mut translator.a.bytes;
            let done = match *relocation {
                Relocation::Away(at) => change(code, at, |rel| rel.wrapping_sub(origin)),
                Relocation::Site(at) => change(code, at, |site| site.wrapping_add(request.first_site)),
                Relocation::Identity(at) => change(code, at, |_| request.page_identity),
                Relocation::OtherIdentity(at, part) => {
                    let (identity, _) = parts.get(usize::from(part))?;
                    change(code, at, |_| *identity)
                }
            };
            if !done {
                return None;
            }
        }
        let moved = |site: &Site| site.moved(origin, request.first_emulated, request.block);
        translator.elsewhere.clear();
        translator.elsewhere.extend(parts.iter().map(|(_, part)| *part));
        translator.sites.clear();
        translator.sites.extend(self.sites.iter().map(moved));
        translator.faults.clear();
        translator.faults.extend(
            self.faults.iter().map(|(at, site)| (at.wrapping_add(origin), site.wrapping_add(request.first_site))),
        );
        translator.emulated.clear();
        for offset in &self.emulated {
            let bytes = self.guest.get(*offset as usize..)?;
            let rip = request.rip.wrapping_sub(self.placed.guest_before.into()).wrapping_add(u64::from(*offset));
            let mode = Mode(self.key.mode);
            translator.emulated.push(Decoder::with_ip(mode.bitness(), bytes, rip, DecoderOptions::NONE).decode());
        }
        Some(self.placed.moved(origin))
    }
}

impl Placed {
    /// Guest bytes that were translated, or would have been.
    fn guest<'a>(&self, request: &Request<'a>) -> Option<&'a [u8]> {
        let first = request.at.checked_sub(self.guest_before as usize)?;
        request.code.get(first..request.at.checked_add(self.guest_len as usize)?)
    }

    fn moved(&self, by: u32) -> Placed {
        Placed {
            checked: self.checked.wrapping_add(by),
            entry: self.entry.wrapping_add(by),
            inner: self.inner.wrapping_add(by),
            lookup_stub: self.lookup_stub.wrapping_add(by),
            ..*self
        }
    }
}

impl Site {
    fn moved(&self, code: u32, emulated: u32, block: u32) -> Site {
        let kind = match self.kind {
            SiteKind::Memory { size, read, write, class, careful, first, resume } => {
                SiteKind::Memory { size, read, write, class, careful, first, resume: resume.wrapping_add(code) }
            }
            SiteKind::Link { target, patch, depth } => {
                SiteKind::Link { target, patch: patch.wrapping_add(code), depth }
            }
            SiteKind::Window { patch } => SiteKind::Window { patch: patch.wrapping_add(code) },
            SiteKind::Crossing { patch } => SiteKind::Crossing { patch: patch.wrapping_add(code) },
            SiteKind::Emulate { instruction } => SiteKind::Emulate { instruction: instruction.wrapping_add(emulated) },
            kind @ (SiteKind::Indirect { .. }
            | SiteKind::Budget
            | SiteKind::Hot
            | SiteKind::Lookup
            | SiteKind::Fault { .. }) => kind,
        };
        Site { kind, block, ..*self }
    }
}

#[cfg(test)]
mod tests {
    use super::super::profile::Ways;
    use super::*;

    fn request(bytes: &[u8], index: u32) -> Request<'_> {
        Request {
            block: index,
            first_site: 3 * index,
            first_emulated: 5 * index,
            page_identity: 7 * index,
            ..Request::ordinary(bytes)
        }
    }

    #[rustfmt::skip]
    const BLOCKS: [&[u8]; 5] = [
        &[0x48, 0x8B, 0x03, 0x48, 0x8B, 0x4B, 0x08, 0x48, 0x01, 0xC8, 0xC3], // mov rax, [rbx]; mov rcx, [rbx+8]; add; ret
        &[0x50, 0x53, 0x48, 0x8B, 0x44, 0x24, 0x20, 0x75, 0x02, 0xE8, 0, 1, 0, 0], // push; push; mov rax, [rsp+32]; jne; call
        &[0x48, 0xF7, 0x37, 0x0F, 0xA2], // div qword [rdi]; cpuid
        &[0xF3, 0x0F, 0x58, 0x04, 0xC8, 0xFF, 0xE0], // addss xmm0, [rax+rcx*8]; jmp rax
        &[0x48, 0x8B, 0x05, 0, 0x10, 0, 0, 0xF0, 0x0F, 0xB1, 0x0A, 0xE2, 0xFE], // mov rax, [rip+4096]; lock cmpxchg; loop
    ];

    fn unknown(vpage: u64) -> OtherPage<'static> {
        OtherPage { vpage, code: None }
    }

    #[test]
    fn what_comes_from_other_pages_must_be_there() {
        // call 0x40_2008, where there is: inc rax; ret
        let code = [0xE8, 0x03, 0x10, 0, 0, 0x90, 0xF4];
        let other = |offset: usize, identity| {
            let mut page = vec![0xCC; 4096];
            page[offset..][..4].copy_from_slice(&[0x48, 0xFF, 0xC0, 0xC3]);
            OtherPage { vpage: 0x402, code: Some((identity, 9, &*page.leak())) }
        };
        let (known, moved) = ([other(8, 5)], other(9, 5));
        let hot = |index| Request { hot: Some(Ways::Random(0)), heats: false, others: &known, ..request(&code, index) };
        let archive = Archive::new(Vec::new()).expect("an empty archive");
        let (mut made, mut pasted) = (Translator::alone(), Translator::alone());
        let placed = made.translate(&hot(11), 0x8000).expect("all it wants");
        assert!(placed.spreads && made.elsewhere.len() == 1);
        archive.add(&hot(11), 0x8000, &made, &placed);
        let archive = Archive::new(archive.bytes()).expect("its own bytes");
        assert!(archive.paste(&hot(11), 0, &mut pasted, unknown).is_none());
        assert!(archive.paste(&hot(11), 0, &mut pasted, |_| moved).is_none());
        for identity in [5, 6] {
            let there = other(8, identity);
            let request = Request { others: &[there], ..hot(200) };
            let placed = made.translate(&request, 0x12_3450).expect("all it wants");
            let again = archive.paste(&request, 0x12_3450, &mut pasted, |_| there).expect("it is in the archive");
            assert_eq!((&made.a.bytes, &made.elsewhere), (&pasted.a.bytes, &pasted.elsewhere));
            assert_eq!(format!("{placed:?}"), format!("{again:?}"));
        }
    }

    #[test]
    fn a_pasted_translation_is_the_one_that_would_be_made() {
        let archive = Archive::new(Vec::new()).expect("an empty archive");
        let mut made = Translator::alone();
        for bytes in BLOCKS {
            let request = request(bytes, 11);
            let placed = made.translate(&request, 0x8000).expect("whole instructions");
            archive.add(&request, 0x8000, &made, &placed);
        }
        let archive = Archive::new(archive.bytes()).expect("its own bytes");
        let mut pasted = Translator::alone();
        for bytes in BLOCKS {
            let request = request(bytes, 200);
            let there = archive.paste(&request, 0x12_3450, &mut pasted, unknown).expect("it is in the archive");
            let placed = made.translate(&request, 0x12_3450).expect("whole instructions");
            assert_eq!(made.a.bytes, pasted.a.bytes, "{bytes:x?}");
            assert_eq!(format!("{placed:?}"), format!("{there:?}"));
            assert_eq!(format!("{:?}", made.sites), format!("{:?}", pasted.sites));
            assert_eq!((&made.faults, &made.emulated), (&pasted.faults, &pasted.emulated));
        }
        let changed = [0x48, 0x8B, 0x03, 0x48, 0x8B, 0x4B, 0x10, 0x48, 0x01, 0xC8, 0xC3];
        assert!(archive.paste(&request(&changed, 1), 0, &mut pasted, unknown).is_none(), "other bytes");
        let other = Request { window: false, ..request(BLOCKS[0], 1) };
        assert!(archive.paste(&other, 0, &mut pasted, unknown).is_none(), "other settings");
    }

    #[test]
    fn damaged_archives_are_refused_or_find_nothing() {
        let archive = Archive::new(Vec::new()).expect("an empty archive");
        let mut translator = Translator::alone();
        let request = request(BLOCKS[1], 1);
        let placed = translator.translate(&request, 0).expect("whole instructions");
        archive.add(&request, 0, &translator, &placed);
        let bytes = archive.bytes();
        for at in 0..bytes.len() {
            assert!(at == 0 || Archive::new(bytes[..at].to_vec()).is_none(), "cut at {at}");
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x41;
            if let Some(archive) = Archive::new(flipped) {
                archive.paste(&request, 0x1000, &mut translator, unknown);
            }
        }
    }
}
