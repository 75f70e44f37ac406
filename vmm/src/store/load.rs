//! From a snapshot on disk to a machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use orrery_cpu::engine::EngineConfig;
use orrery_devices::GuestMemory;
use orrery_devices::disk::{Base, Overlay, PAGE_LEN, Page};
use orrery_guest_image::Image;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Store;
use super::error::SnapshotError;
use super::layer::{self, Entry, RAM};
use super::log::{BlobReference, LayerReference, SnapshotRecord};
use super::pack::{Kind, PAGE_BYTES, Place, Scratch};
use crate::chain::Hash;
use crate::digest::MemoryDigest;
use crate::machine::{Machine, MachineError, MachineState};
use crate::page_hash::ZERO_PAGE;
use crate::ram;

/// Threads that unpack pages, at most.
const THREADS_MAX: usize = 4;
/// Records that a thread takes at once.
const RECORDS_AT_ONCE: usize = 32;

impl Store {
    /// Makes the machine of a snapshot. `image` must be the one that the run was booted from.
    ///
    /// The machine's hash is compared with the recorded one: whatever is damaged, a wrong state is never returned.
    pub fn load(&self, record: &SnapshotRecord, image: &Image, engine: EngineConfig) -> Result<Machine, SnapshotError> {
        let inconsistent = |what: &str| SnapshotError::Inconsistent { icount: record.icount, what: what.to_owned() };
        let mut scratch = Scratch::new();
        let mut state = MachineState::decode(read_blob(self, &record.state, "the state", &mut scratch)?)?;
        if state.icount().0 != record.icount || state.inputs_entered() != record.inputs_entered {
            return Err(inconsistent("the state is of another moment"));
        }
        let memory = ram::create(state.config().memory_mib << 20).map_err(MachineError::from)?;
        let mut table = Table::new(&memory, state.disks().count());
        for reference in record.layers.iter().rev() {
            let entries = read_layer(self, reference, &mut scratch)?;
            if !table.add_below(entries) {
                return Err(inconsistent("a page is outside the machine's memory"));
            }
        }
        let mut digest = MemoryDigest::zeroed(&memory);
        table.ram().filter(|entry| entry.hash != ZERO_PAGE).for_each(|entry| {
            digest.set(entry.page, entry.hash);
        });
        if digest.value() != record.memory {
            return Err(inconsistent("the pages of RAM are not those of the snapshot"));
        }
        let wanted: Vec<Entry> = table.ram().filter(|entry| entry.hash != ZERO_PAGE).copied().collect();
        fill(self, &memory, wanted)?;
        let contents = (0..table.disks()).map(|disk| {
            let base: Base = Arc::new(image.disks().get(disk).cloned().unwrap_or_default());
            Ok((base, read_overlay(self, table.disk(disk), &mut scratch)?))
        });
        let contents = contents.collect::<Result<Vec<_>, SnapshotError>>()?;
        if image.disks().len() != contents.len() {
            return Err(inconsistent("the image has another number of disks"));
        }
        state.attach_disks(contents)?;
        let mut machine = Machine::assemble(memory, digest, state, engine)?;
        if machine.state_hash() != record.state_hash || !machine.at_moment() {
            return Err(inconsistent("the restored machine's hash is not the one that was recorded"));
        }
        Ok(machine)
    }
}

/// Reads a blob, wherever it is now.
pub(super) fn read_blob<'a>(
    store: &Store,
    reference: &BlobReference,
    what: &'static str,
    scratch: &'a mut Scratch,
) -> Result<&'a [u8], SnapshotError> {
    let is_it = |place: Place, scratch: &mut Scratch| -> Result<bool, SnapshotError> {
        let head = store.packs.read(place, scratch)?;
        Ok(head.kind == Kind::Blob && *blake3::hash(&scratch.raw).as_bytes() == reference.hash.0)
    };
    let first = is_it(reference.place, scratch);
    if !matches!(first, Ok(true)) {
        let moved = store.index()?.blob(&reference.hash).filter(|place| *place != reference.place);
        match moved {
            Some(place) if is_it(place, scratch)? => {}
            _ => return Err(first.err().unwrap_or(SnapshotError::Missing { what, hash: reference.hash })),
        }
    }
    Ok(&scratch.raw)
}

/// Reads a layer of a page table.
pub(super) fn read_layer(
    store: &Store,
    reference: &LayerReference,
    scratch: &mut Scratch,
) -> Result<Vec<Entry>, SnapshotError> {
    let bytes = read_blob(store, &reference.blob, "a page table", scratch)?;
    layer::decode(bytes, &store.packs, reference.blob.place)
}

/// The topmost entry of every page.
struct Table {
    /// (first page, number of pages, first index in `pages`) of each region of RAM.
    regions: Vec<(u64, u64, usize)>,
    /// For each page of RAM, one more than the index of its entry.
    pages: Vec<u32>,
    entries: Vec<Entry>,
    disks: Vec<std::collections::BTreeMap<u64, Entry>>,
}

impl Table {
    fn new(memory: &GuestMemory, disks: usize) -> Table {
        let mut regions = Vec::new();
        let mut total = 0;
        for region in memory.iter() {
            let pages = region.len() / PAGE_BYTES as u64;
            regions.push((region.start_addr().0 / PAGE_BYTES as u64, pages, total));
            total += pages as usize;
        }
        Table { regions, pages: vec![0; total], entries: Vec::new(), disks: vec![Default::default(); disks] }
    }

    /// Adds a layer below those that there are; false if it has a page that the machine has not.
    fn add_below(&mut self, layer: Vec<Entry>) -> bool {
        for entry in layer {
            if entry.space != RAM {
                let Some(disk) = self.disks.get_mut(usize::from(entry.space) - 1) else { return false };
                disk.entry(entry.page).or_insert(entry);
                continue;
            }
            let index = self.regions.iter().find_map(|(first, pages, start)| {
                let index = entry.page.checked_sub(*first).filter(|index| index < pages)?;
                Some(start + index as usize)
            });
            let Some(slot) = index.map(|index| &mut self.pages[index]) else { return false };
            if *slot == 0 {
                self.entries.push(entry);
                *slot = self.entries.len() as u32;
            }
        }
        true
    }

    fn ram(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    fn disks(&self) -> usize {
        self.disks.len()
    }

    fn disk(&self, index: usize) -> impl Iterator<Item = &Entry> {
        self.disks[index].values()
    }
}

fn read_overlay<'a>(
    store: &Store,
    entries: impl Iterator<Item = &'a Entry>,
    scratch: &mut Scratch,
) -> Result<Overlay, SnapshotError> {
    let mut entries: Vec<Entry> = entries.copied().collect();
    let mut overlay = Overlay::new();
    each_page(store, &mut entries, scratch, &mut |entry, content| {
        let content: [u8; PAGE_LEN] = content.try_into().expect("a page");
        overlay.insert(entry.page, Page::from(content));
    })?;
    Ok(overlay)
}

/// Reads pages in the order in which they are stored.
fn each_page(
    store: &Store,
    entries: &mut [Entry],
    scratch: &mut Scratch,
    each: &mut dyn FnMut(&Entry, &[u8]),
) -> Result<(), SnapshotError> {
    entries.sort_unstable_by_key(|entry| entry.place);
    let mut astray: Vec<Entry> = Vec::new();
    let mut first_error = None;
    for group in entries.chunk_by(|a, b| a.place == b.place) {
        let head = match store.packs.read(group[0].place, scratch) {
            Ok(head) => head,
            Err(error) => {
                first_error.get_or_insert(error);
                astray.extend(group);
                continue;
            }
        };
        for entry in group {
            let slot = usize::from(entry.slot);
            if head.kind == Kind::Pages && head.hashes.get(slot) == Some(&entry.hash) {
                each(entry, &scratch.raw[slot * PAGE_BYTES..(slot + 1) * PAGE_BYTES]);
            } else {
                astray.push(*entry);
            }
        }
    }
    if astray.is_empty() {
        return Ok(());
    }
    // Pages that have been moved, or are damaged here and perhaps whole elsewhere.
    let index = store.index()?;
    let missing = |hash: Hash| SnapshotError::Missing { what: "a page", hash };
    for entry in astray {
        let found = index.page(&entry.hash).filter(|(place, _)| *place != entry.place);
        let Some((place, slot)) = found else { return Err(first_error.unwrap_or(missing(entry.hash))) };
        store.packs.read(place, scratch)?;
        let start = usize::from(slot) * PAGE_BYTES;
        each(&entry, scratch.raw.get(start..start + PAGE_BYTES).ok_or_else(|| missing(entry.hash))?);
    }
    Ok(())
}

/// Host addresses of RAM, for threads that each write pages of their own.
struct Target {
    /// (first page, number of pages, host address of the first).
    regions: Vec<(u64, u64, *mut u8)>,
}

// SAFETY: the addresses belong to the mapping of a memory that outlives the threads; each page is written by one.
unsafe impl Sync for Target {}

impl Target {
    fn write(&self, page: u64, content: &[u8]) {
        assert_eq!(content.len(), PAGE_BYTES);
        for (first, pages, host) in &self.regions {
            if let Some(index) = page.checked_sub(*first).filter(|index| index < pages) {
                // SAFETY: the page is inside the region's mapping, and no other thread has this page.
                unsafe {
                    let to = host.add(index as usize * PAGE_BYTES);
                    std::ptr::copy_nonoverlapping(content.as_ptr(), to, PAGE_BYTES);
                }
                return;
            }
        }
    }
}

/// Fills RAM with pages that are each there once.
fn fill(store: &Store, memory: &GuestMemory, mut wanted: Vec<Entry>) -> Result<(), SnapshotError> {
    let regions = memory
        .iter()
        .map(|region| (region.start_addr().0 / PAGE_BYTES as u64, region.len() / PAGE_BYTES as u64, region.as_ptr()));
    let target = Target { regions: regions.collect() };
    wanted.sort_unstable_by_key(|entry| entry.place);
    // Pieces that end where a record ends.
    let mut pieces: Vec<&mut [Entry]> = Vec::new();
    let mut rest = &mut wanted[..];
    while !rest.is_empty() {
        let mut end = (RECORDS_AT_ONCE * 16).min(rest.len());
        while end < rest.len() && rest[end].place == rest[end - 1].place {
            end += 1;
        }
        let (piece, behind) = rest.split_at_mut(end);
        pieces.push(piece);
        rest = behind;
    }
    let threads =
        std::thread::available_parallelism().map_or(1, |count| count.get()).min(THREADS_MAX).min(pieces.len());
    let pieces: Vec<_> = pieces.into_iter().map(|piece| std::sync::Mutex::new(Some(piece))).collect();
    let next = AtomicUsize::new(0);
    let work = || -> Result<(), SnapshotError> {
        let mut scratch = Scratch::new();
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let piece = piece.lock().expect("nobody panics with the lock").take();
            let Some(piece) = piece else { continue };
            each_page(store, piece, &mut scratch, &mut |entry, content| target.write(entry.page, content))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mine = work();
        let others = helpers.into_iter().map(|helper| helper.join().expect("a helper does not panic"));
        others.fold(mine, |result, other| result.and(other))
    })
}
