//! Looking for damage, and for what it costs.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde::Serialize;

use super::error::SnapshotError;
use super::index::for_each_record;
use super::layer::{self, Entry};
use super::log::{self, SnapshotRecord};
use super::pack::{Kind, Place, Scratch};
use super::{STORE, Store};
use crate::chain::Hash;
use crate::machine::MachineState;
use crate::page_hash::ZERO_PAGE;
use crate::run::directory::MANIFEST;

/// What is in a store, and what is wrong with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Packs.
    pub packs: usize,
    /// Bytes of all packs.
    pub bytes: u64,
    /// Pages that are whole.
    pub pages: usize,
    /// Snapshots that are whole.
    pub snapshots: usize,
    /// Each damage, in words.
    pub damage: Vec<String>,
    /// Moments (`RUN@ICOUNT`) whose snapshots are lost. The moments themselves can be reached from an earlier one.
    pub lost: Vec<String>,
}

/// Contents that are whole, and where they are.
#[derive(Default)]
pub(super) struct Contents {
    pub pages: HashMap<Hash, (Place, u16)>,
    pub blobs: HashMap<Hash, Place>,
    /// Packs that have damage.
    pub damaged_packs: HashSet<u32>,
    /// Bytes of each pack.
    pub pack_bytes: HashMap<u32, u64>,
}

/// The runs beside a store: names and paths.
pub(super) fn runs_in(runs: &Path) -> Vec<(String, std::path::PathBuf)> {
    let entries = std::fs::read_dir(runs).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .filter(|(name, path)| name != STORE && (path.join(MANIFEST).is_file() || path.join(log::SNAPSHOTS).is_file()))
        .collect();
    found.sort();
    found
}

/// Reads and verifies everything in the packs. `progress` gets bytes done.
pub(super) fn verify_packs(
    store: &Store,
    damage: &mut Vec<String>,
    progress: &mut dyn FnMut(u64),
) -> Result<Contents, SnapshotError> {
    let mut contents = Contents::default();
    let mut scratch = Scratch::new();
    let mut done = 0;
    for pack in store.packs.list()? {
        let path = store.packs.path(pack);
        let len = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        contents.pack_bytes.insert(pack, len);
        let mut places = Vec::new();
        let end = match store.packs.file(pack) {
            Ok(_) => for_each_record(&store.packs, pack, &mut |place, _| places.push(place)),
            Err(error) => Some(error),
        };
        // What a crashed writer has left unfinished is no damage.
        if let Some(error) = end.filter(|error| !matches!(error, SnapshotError::Cut { .. })) {
            damage.push(error.to_string());
            contents.damaged_packs.insert(pack);
        }
        for place in places {
            match store.packs.verify(place, &mut scratch) {
                Ok(head) => {
                    for (slot, hash) in head.hashes.iter().enumerate() {
                        match head.kind {
                            Kind::Pages => {
                                contents.pages.entry(*hash).or_insert((place, slot as u16));
                            }
                            Kind::Blob => {
                                contents.blobs.entry(*hash).or_insert(place);
                            }
                        }
                    }
                }
                Err(error) => {
                    damage.push(error.to_string());
                    contents.damaged_packs.insert(pack);
                }
            }
            progress(done + place.offset);
        }
        done += len;
    }
    Ok(contents)
}

impl Contents {
    /// Everything that a snapshot refers to, if it is whole: its layers' entries.
    pub fn follow(&self, store: &Store, record: &SnapshotRecord) -> Result<Vec<(Hash, Vec<Entry>)>, SnapshotError> {
        let mut scratch = Scratch::new();
        let missing = |what: &'static str, hash: Hash| SnapshotError::Missing { what, hash };
        let state = *self.blobs.get(&record.state.hash).ok_or_else(|| missing("the state", record.state.hash))?;
        store.packs.read(state, &mut scratch)?;
        MachineState::decode(&scratch.raw)?;
        let mut layers = Vec::new();
        for reference in &record.layers {
            let hash = reference.blob.hash;
            let place = *self.blobs.get(&hash).ok_or_else(|| missing("a page table", hash))?;
            store.packs.read(place, &mut scratch)?;
            let entries = layer::decode(&scratch.raw, &store.packs, place)?;
            layers.push((hash, entries));
        }
        // A page that a higher layer replaces does not matter.
        let mut seen = HashSet::new();
        for (_, entries) in layers.iter().rev() {
            for entry in entries {
                let fresh = seen.insert((entry.space, entry.page));
                if fresh && entry.hash != ZERO_PAGE && !self.pages.contains_key(&entry.hash) {
                    return Err(missing("a page", entry.hash));
                }
            }
        }
        Ok(layers)
    }
}

/// Checks a store and the snapshots of all runs beside it.
pub fn check(runs: &Path, store: &Store, progress: &mut dyn FnMut(u64)) -> Result<CheckReport, SnapshotError> {
    let mut report = CheckReport::default();
    let contents = verify_packs(store, &mut report.damage, progress)?;
    report.packs = contents.pack_bytes.len();
    report.bytes = contents.pack_bytes.values().sum();
    report.pages = contents.pages.len();
    for (name, path) in runs_in(runs) {
        let list = match log::read(&path) {
            Ok(list) => list,
            Err(error) => {
                report.damage.push(error.to_string());
                continue;
            }
        };
        report.damage.extend(list.damage.iter().map(ToString::to_string));
        for record in &list.records {
            match contents.follow(store, record) {
                Ok(_) => report.snapshots += 1,
                Err(error) => {
                    report.damage.push(format!("{name}@{}: {error}", record.icount));
                    report.lost.push(format!("{name}@{}", record.icount));
                }
            }
        }
    }
    Ok(report)
}
