//! Removing what nobody needs: snapshots beyond a size or an age, contents that no snapshot refers to, and damage.
//!
//! The order makes a crash harmless: contents are copied and flushed, lists replaced, and only then packs removed.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::Store;
use super::check::{Contents, runs_in, verify_packs};
use super::error::{SnapshotError, io_error};
use super::index::Index;
use super::layer::{self, Entry};
use super::log::{self, BlobReference, LayerReference, SnapshotRecord};
use super::pack::{Kind, PAGE_BYTES, PackWriter, Place, RECORD_PAGES_MAX, Scratch, sync_directory};
use crate::chain::Hash;
use crate::page_hash::ZERO_PAGE;

/// A pack is rewritten when less than this part of its contents (in percent) is needed.
const LIVE_PERCENT_MIN: u64 = 70;

/// What to remove.
#[derive(Clone, Copy, Debug, Default)]
pub struct GcOptions {
    /// Automatic snapshots of the runs written to longest ago go until the rest needs at most this.
    pub bytes_max: Option<u64>,
    /// Automatic snapshots of runs that have not been written to for so long go.
    pub age_max: Option<Duration>,
    /// Only say what would happen.
    pub dry_run: bool,
}

/// What was removed, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Bytes of packs before.
    pub bytes_before: u64,
    /// Bytes of packs after; an estimate if nothing was really removed.
    pub bytes_after: u64,
    /// Moments whose snapshots are removed.
    pub removed: Vec<String>,
    /// Moments whose snapshots were damaged and are removed.
    pub damaged: Vec<String>,
    /// Snapshots that stay.
    pub kept: usize,
}

/// A run's snapshots.
struct RunSnapshots {
    name: String,
    path: PathBuf,
    written: SystemTime,
    records: Vec<SnapshotRecord>,
    /// The list on disk says something else.
    changed: bool,
}

/// Everything that some snapshot needs.
#[derive(Default)]
struct Live {
    pages: HashSet<Hash>,
    blobs: HashSet<Hash>,
    layers: HashMap<Hash, Vec<Entry>>,
}

/// Removes what is not needed. The store must be held exclusively.
pub fn gc(
    runs: &Path,
    store: &Store,
    options: &GcOptions,
    progress: &mut dyn FnMut(u64),
) -> Result<GcReport, SnapshotError> {
    let mut report = GcReport::default();
    let contents = verify_packs(store, &mut Vec::new(), progress)?;
    report.bytes_before = contents.pack_bytes.values().sum();
    let page_bytes = report.bytes_before / (contents.pages.len() as u64).max(1);
    let mut lists = read_lists(runs)?;
    // The run written to last is the last to lose anything.
    lists.sort_by_key(|list| std::cmp::Reverse(list.written));
    let mut live = Live::default();
    for list in &mut lists {
        let age = list.written.elapsed().unwrap_or_default();
        let too_old = options.age_max.is_some_and(|most| age > most);
        let before = list.records.len();
        let mut records = std::mem::take(&mut list.records);
        records.retain(|record| {
            let moment = || format!("{}@{}", list.name, record.icount);
            let Ok(layers) = contents.follow(store, record) else {
                report.damaged.push(moment());
                return false;
            };
            let fresh = live.missing(&layers) as u64 * page_bytes;
            let too_much = options.bytes_max.is_some_and(|most| live.bytes(page_bytes) + fresh > most);
            if !record.kept && (too_old || too_much) {
                report.removed.push(moment());
                return false;
            }
            live.add(record, layers);
            true
        });
        list.changed |= records.len() != before;
        list.records = records;
        report.kept += list.records.len();
    }
    let per_pack = live.bytes_per_pack(&contents, page_bytes);
    let rewrite: HashSet<u32> = contents
        .pack_bytes
        .iter()
        .filter(|(pack, bytes)| {
            let needed = per_pack.get(pack).copied().unwrap_or(0);
            contents.damaged_packs.contains(pack) || needed * 100 < **bytes * LIVE_PERCENT_MIN
        })
        .map(|(pack, _)| *pack)
        .collect();
    let stays = |packs: &HashSet<u32>| -> u64 {
        contents.pack_bytes.iter().filter(|(pack, _)| !packs.contains(pack)).map(|(_, bytes)| bytes).sum()
    };
    let moved: u64 = rewrite.iter().map(|pack| per_pack.get(pack).copied().unwrap_or(0)).sum();
    report.bytes_after = stays(&rewrite) + moved;
    if !options.dry_run {
        let mut mover = Mover { store, contents: &contents, rewrite: &rewrite, writer: None, index: Index::default() };
        mover.move_all(&live, &mut lists)?;
        for list in lists.iter().filter(|list| list.changed) {
            log::replace(&list.path, &list.records)?;
        }
        for pack in &rewrite {
            let path = store.packs.path(*pack);
            std::fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
        if store.packs.directory().is_dir() {
            sync_directory(store.packs.directory())?;
        }
        let left = store.packs.list()?.into_iter();
        report.bytes_after = left.map(|pack| std::fs::metadata(store.packs.path(pack)).map_or(0, |m| m.len())).sum();
    }
    Ok(report)
}

fn read_lists(runs: &Path) -> Result<Vec<RunSnapshots>, SnapshotError> {
    let mut lists = Vec::new();
    for (name, path) in runs_in(runs) {
        let list = log::read(&path)?;
        if list.records.is_empty() && list.damage.is_empty() {
            continue;
        }
        let file = path.join(log::SNAPSHOTS);
        let written = std::fs::metadata(&file).and_then(|metadata| metadata.modified());
        let written = written.map_err(io_error("look at", &file))?;
        lists.push(RunSnapshots { name, path, written, changed: !list.damage.is_empty(), records: list.records });
    }
    Ok(lists)
}

impl Live {
    fn missing(&self, layers: &[(Hash, Vec<Entry>)]) -> usize {
        let entries = layers.iter().filter(|(hash, _)| !self.layers.contains_key(hash)).flat_map(|(_, list)| list);
        entries.filter(|entry| !self.pages.contains(&entry.hash)).count()
    }

    fn bytes(&self, page_bytes: u64) -> u64 {
        self.pages.len() as u64 * page_bytes
    }

    fn add(&mut self, record: &SnapshotRecord, layers: Vec<(Hash, Vec<Entry>)>) {
        self.blobs.insert(record.state.hash);
        for (hash, entries) in layers {
            self.pages.extend(entries.iter().map(|entry| entry.hash).filter(|hash| *hash != ZERO_PAGE));
            self.layers.insert(hash, entries);
        }
    }

    fn bytes_per_pack(&self, contents: &Contents, page_bytes: u64) -> HashMap<u32, u64> {
        let mut bytes = HashMap::new();
        for (place, _) in self.pages.iter().filter_map(|hash| contents.pages.get(hash)) {
            *bytes.entry(place.pack).or_default() += page_bytes;
        }
        bytes
    }
}

/// Copies what is needed out of packs that go.
struct Mover<'a> {
    store: &'a Store,
    contents: &'a Contents,
    rewrite: &'a HashSet<u32>,
    writer: Option<PackWriter>,
    index: Index,
}

impl Mover<'_> {
    fn goes(&self, place: Place) -> bool {
        self.rewrite.contains(&place.pack)
    }

    fn writer(&mut self) -> Result<&mut PackWriter, SnapshotError> {
        if self.writer.is_none() {
            self.writer = Some(PackWriter::create(&self.store.packs)?);
        }
        Ok(self.writer.as_mut().expect("it was just made"))
    }

    fn move_all(&mut self, live: &Live, lists: &mut [RunSnapshots]) -> Result<(), SnapshotError> {
        self.move_pages(live)?;
        let mut layers: HashMap<Hash, LayerReference> = HashMap::new();
        for list in lists {
            for record in &mut list.records {
                for reference in &mut record.layers {
                    let moved = match layers.get(&reference.blob.hash) {
                        Some(moved) => *moved,
                        None => {
                            let moved = self.move_layer(reference, &live.layers[&reference.blob.hash])?;
                            layers.insert(reference.blob.hash, moved);
                            moved
                        }
                    };
                    list.changed |= moved != *reference;
                    *reference = moved;
                }
                let state = self.move_blob(record.state)?;
                list.changed |= state != record.state;
                record.state = state;
            }
        }
        match &mut self.writer {
            Some(writer) => writer.sync(),
            None => Ok(()),
        }
    }

    fn move_pages(&mut self, live: &Live) -> Result<(), SnapshotError> {
        let mut scratch = Scratch::new();
        let mut pages: Vec<(Place, u16, Hash)> = live
            .pages
            .iter()
            .filter_map(|hash| self.contents.pages.get(hash).map(|(place, slot)| (*place, *slot, *hash)))
            .filter(|(place, ..)| self.goes(*place))
            .collect();
        pages.sort_unstable();
        let (mut hashes, mut content) = (Vec::new(), Vec::new());
        let mut at = None;
        for (place, slot, hash) in pages {
            if at != Some(place) {
                self.store.packs.verify(place, &mut scratch)?;
                at = Some(place);
            }
            let start = usize::from(slot) * PAGE_BYTES;
            hashes.push(hash);
            content.extend_from_slice(&scratch.raw[start..start + PAGE_BYTES]);
            if hashes.len() == RECORD_PAGES_MAX {
                self.write_group(&mut hashes, &mut content)?;
            }
        }
        self.write_group(&mut hashes, &mut content)
    }

    fn write_group(&mut self, hashes: &mut Vec<Hash>, content: &mut Vec<u8>) -> Result<(), SnapshotError> {
        if !hashes.is_empty() {
            let place = self.writer()?.write(Kind::Pages, hashes, content)?;
            self.index.add_pages(place, hashes);
            hashes.clear();
            content.clear();
        }
        Ok(())
    }

    /// A layer with its hints put right.
    fn move_layer(&mut self, reference: &LayerReference, entries: &[Entry]) -> Result<LayerReference, SnapshotError> {
        let stale = entries.iter().any(|entry| self.goes(entry.place) && entry.hash != ZERO_PAGE);
        if !stale {
            let blob = self.move_blob(reference.blob)?;
            return Ok(LayerReference { blob, ..*reference });
        }
        let mut entries = entries.to_vec();
        for entry in &mut entries {
            let known = self.contents.pages.get(&entry.hash).copied().filter(|(place, _)| !self.goes(*place));
            if let Some((place, slot)) = self.index.page(&entry.hash).or(known) {
                (entry.place, entry.slot) = (place, slot);
            }
        }
        let bytes = layer::encode(&entries);
        let hash = Hash(*blake3::hash(&bytes).as_bytes());
        let place = self.writer()?.write(Kind::Blob, &[hash], &bytes)?;
        Ok(LayerReference { blob: BlobReference { hash, place }, ..*reference })
    }

    fn move_blob(&mut self, reference: BlobReference) -> Result<BlobReference, SnapshotError> {
        let lost = SnapshotError::Missing { what: "a blob", hash: reference.hash };
        let place = *self.contents.blobs.get(&reference.hash).ok_or(lost)?;
        if !self.goes(place) {
            return Ok(BlobReference { place, ..reference });
        }
        if let Some(place) = self.index.blob(&reference.hash) {
            return Ok(BlobReference { place, ..reference });
        }
        let mut scratch = Scratch::new();
        self.store.packs.verify(place, &mut scratch)?;
        let place = self.writer()?.write(Kind::Blob, &[reference.hash], &scratch.raw)?;
        self.index.add_blob(reference.hash, place);
        Ok(BlobReference { place, ..reference })
    }
}
