//! Which contents the store has, and where: rebuilt from the heads of all records whenever it is needed.

use std::collections::HashMap;

use super::error::SnapshotError;
use super::pack::{Kind, PACK_HEADER_BYTES, Packs, Place, RecordHead};
use crate::chain::Hash;

/// Contents by hash.
#[derive(Default)]
pub struct Index {
    pages: HashMap<Hash, (Place, u16)>,
    blobs: HashMap<Hash, Place>,
}

impl Index {
    /// Reads the heads of all records, and puts on disk what other writers may have left in memory: what is found here
    /// may be referred to.
    ///
    /// The end of a pack that is being written looks like damage.
    pub fn build(packs: &Packs) -> Result<Index, SnapshotError> {
        let mut index = Index::default();
        for pack in packs.list()? {
            let Ok(file) = packs.file(pack) else { continue };
            for_each_record(packs, pack, &mut |place, head| index.add(place, &head));
            // Failure is of no consequence for what is in memory, and a read-only store takes no references.
            let _ = file.sync_data();
        }
        Ok(index)
    }

    /// Notes what a record holds.
    pub fn add(&mut self, place: Place, head: &RecordHead) {
        match head.kind {
            Kind::Pages => self.add_pages(place, &head.hashes),
            Kind::Blob => head.hashes.iter().for_each(|hash| self.add_blob(*hash, place)),
        }
    }

    /// Notes a group of pages.
    pub fn add_pages(&mut self, place: Place, hashes: &[Hash]) {
        for (slot, hash) in hashes.iter().enumerate() {
            self.pages.entry(*hash).or_insert((place, slot as u16));
        }
    }

    /// Notes a blob.
    pub fn add_blob(&mut self, hash: Hash, place: Place) {
        self.blobs.entry(hash).or_insert(place);
    }

    /// Where a page is.
    pub fn page(&self, hash: &Hash) -> Option<(Place, u16)> {
        self.pages.get(hash).copied()
    }

    /// Where a blob is.
    pub fn blob(&self, hash: &Hash) -> Option<Place> {
        self.blobs.get(hash).copied()
    }
}

/// Calls `each` for every record of a pack; returns the first damage, if any. Records behind it are found again.
pub fn for_each_record(packs: &Packs, pack: u32, each: &mut dyn FnMut(Place, RecordHead)) -> Option<SnapshotError> {
    let mut place = Place { pack, offset: PACK_HEADER_BYTES };
    let mut damage = None;
    loop {
        match packs.head(place) {
            Ok(Some(head)) => {
                let next = Place { offset: place.offset + head.bytes(), ..place };
                each(place, head);
                place = next;
            }
            Ok(None) => return damage,
            Err(error) => {
                damage.get_or_insert(error);
                match packs.record_behind(place) {
                    Some(found) => place = found,
                    None => return damage,
                }
            }
        }
    }
}
