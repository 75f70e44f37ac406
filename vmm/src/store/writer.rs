//! Writing captures into the store.

use std::sync::Arc;

use super::Store;
use super::capture::Capture;
use super::error::SnapshotError;
use super::index::Index;
use super::layer::{self, Entry};
use super::log::{BlobReference, LAYERS_MAX, LayerReference, SnapshotRecord};
use super::pack::{Kind, PACK_BYTES_MAX, PAGE_BYTES, PackWriter, RECORD_PAGES_MAX, Scratch};
use crate::chain::Hash;
use crate::page_hash::ZERO_PAGE;

/// A layer is merged with the one above it unless it has this many times as many pages.
const LAYER_RATIO: usize = 3;

/// The page table of the last snapshot of a timeline, which the next one builds on.
#[derive(Clone, Default)]
pub struct Timeline {
    layers: Vec<(LayerReference, Arc<Vec<Entry>>)>,
}

impl Timeline {
    /// The page table of a snapshot in the store, to go on from it.
    pub fn of(store: &Store, record: &SnapshotRecord) -> Result<Timeline, SnapshotError> {
        let mut scratch = Scratch::new();
        let mut layers = Vec::new();
        for reference in &record.layers {
            let entries = super::load::read_layer(store, reference, &mut scratch)?;
            layers.push((*reference, Arc::new(entries)));
        }
        Ok(Timeline { layers })
    }
}

/// Appends to a store. Several may do so at once, in packs of their own.
pub struct StoreWriter {
    store: Store,
    index: Option<Index>,
    pack: Option<PackWriter>,
}

impl StoreWriter {
    /// A writer that has not written anything.
    pub fn new(store: Store) -> StoreWriter {
        StoreWriter { store, index: None, pack: None }
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Writes a capture whose base was what `timeline` last wrote. When this returns, everything that the record
    /// refers to is on disk; it counts once it is in a run's list.
    pub fn write(
        &mut self,
        timeline: &mut Timeline,
        capture: &Capture,
        kept: bool,
    ) -> Result<SnapshotRecord, SnapshotError> {
        if self.index.is_none() {
            self.index = Some(Index::build(&self.store.packs)?);
        }
        let entries = self.write_pages(capture)?;
        let mut layers = timeline.layers.clone();
        if !entries.is_empty() || layers.is_empty() {
            let mut top = entries;
            while layers.len() >= LAYERS_MAX
                || layers.last().is_some_and(|(_, below)| below.len() < LAYER_RATIO * top.len())
            {
                let Some((_, below)) = layers.pop() else { break };
                top = layer::merge(&below, &top);
            }
            let blob = self.write_blob(&layer::encode(&top))?;
            layers.push((LayerReference { blob, pages: top.len() as u64 }, Arc::new(top)));
        }
        let state = self.write_blob(&capture.state)?;
        if let Some(pack) = &mut self.pack {
            pack.sync()?;
        }
        timeline.layers = layers;
        Ok(SnapshotRecord {
            icount: capture.icount.0,
            virtual_ns: capture.time.0,
            seed: capture.seed,
            inputs_entered: capture.inputs_entered,
            state_hash: capture.state_hash,
            memory: capture.memory,
            state,
            layers: timeline.layers.iter().map(|(reference, _)| *reference).collect(),
            console_line: None,
            kept,
        })
    }

    /// Writes the pages that the store does not have; gives the layer of all.
    fn write_pages(&mut self, capture: &Capture) -> Result<Vec<Entry>, SnapshotError> {
        let mut entries: Vec<Entry> = Vec::with_capacity(capture.changed.len());
        let mut group = Group::default();
        let mut contents = capture.contents.chunks_exact(PAGE_BYTES);
        for changed in &capture.changed {
            let (space, page, hash) = (changed.space, changed.page, changed.hash);
            let known = if hash == ZERO_PAGE { Some(Default::default()) } else { self.index().page(&hash) };
            let (place, slot) = known.unwrap_or_default();
            entries.push(Entry { space, page, hash, place, slot });
            if hash == ZERO_PAGE {
                continue;
            }
            let content = contents.next().expect("a capture holds the contents of its pages");
            if known.is_none() {
                group.push(entries.len() - 1, hash, content);
                if group.hashes.len() == RECORD_PAGES_MAX {
                    self.write_group(&mut group, &mut entries)?;
                }
            }
        }
        self.write_group(&mut group, &mut entries)?;
        Ok(entries)
    }

    fn write_group(&mut self, group: &mut Group, entries: &mut [Entry]) -> Result<(), SnapshotError> {
        if group.hashes.is_empty() {
            return Ok(());
        }
        let place = self.pack()?.write(Kind::Pages, &group.hashes, &group.content)?;
        self.index().add_pages(place, &group.hashes);
        for (slot, index) in group.entries.iter().enumerate() {
            if let Some(entry) = entries.get_mut(*index) {
                (entry.place, entry.slot) = (place, slot as u16);
            }
        }
        *group = Group::default();
        Ok(())
    }

    fn write_blob(&mut self, content: &[u8]) -> Result<BlobReference, SnapshotError> {
        let hash = Hash(*blake3::hash(content).as_bytes());
        let place = match self.index().blob(&hash) {
            Some(place) => place,
            None => {
                let place = self.pack()?.write(Kind::Blob, &[hash], content)?;
                self.index().add_blob(hash, place);
                place
            }
        };
        Ok(BlobReference { hash, place })
    }

    fn index(&mut self) -> &mut Index {
        self.index.get_or_insert_default()
    }

    /// The pack to append to.
    fn pack(&mut self) -> Result<&mut PackWriter, SnapshotError> {
        if let Some(pack) = self.pack.take_if(|pack| pack.bytes() >= PACK_BYTES_MAX) {
            let mut pack = pack;
            pack.sync()?;
        }
        if self.pack.is_none() {
            self.pack = Some(PackWriter::create(&self.store.packs)?);
        }
        Ok(self.pack.as_mut().expect("it was just made"))
    }
}

/// Pages on their way into one record.
#[derive(Default)]
struct Group {
    hashes: Vec<Hash>,
    content: Vec<u8>,
    /// Which entries they are.
    entries: Vec<usize>,
}

impl Group {
    fn push(&mut self, entry: usize, hash: Hash, content: &[u8]) {
        self.hashes.push(hash);
        self.content.extend_from_slice(content);
        self.entries.push(entry);
    }
}
