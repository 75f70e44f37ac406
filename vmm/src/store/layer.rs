//! Page tables of snapshots. A snapshot's pages are a stack of layers: a page is what the topmost layer that has it
//! says, and zero if none does. A layer is a blob in the store. Taking a snapshot adds one layer with what has changed;
//! layers of similar size are merged into one, so that a stack has few and each snapshot needs no other snapshot.

use super::error::SnapshotError;
use super::pack::{Packs, Place};
use crate::chain::Hash;

/// Which memory a page belongs to: 0 is RAM, n + 1 is disk n.
pub type Space = u16;

/// RAM.
pub const RAM: Space = 0;

/// Most spaces: RAM and as many disks as a machine has slots, and then some.
pub const SPACES_MAX: Space = 256;

/// Bytes of an entry on disk.
const ENTRY_BYTES: usize = 54;
const MAGIC: &[u8; 8] = b"ORRYLAY1";

/// A page of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which memory.
    pub space: Space,
    /// Number of the page in it.
    pub page: u64,
    /// Hash of its content; zeros for a page of zeros.
    pub hash: Hash,
    /// Where it was when the layer was written. It may have been moved since; the hash decides.
    pub place: Place,
    /// Which page of the record there.
    pub slot: u16,
}

impl Entry {
    fn key(&self) -> (Space, u64) {
        (self.space, self.page)
    }
}

/// The form on disk.
pub fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MAGIC.len() + ENTRY_BYTES * entries.len());
    bytes.extend(MAGIC);
    for entry in entries {
        bytes.extend(entry.space.to_le_bytes());
        bytes.extend(entry.page.to_le_bytes());
        bytes.extend(entry.place.pack.to_le_bytes());
        bytes.extend(entry.place.offset.to_le_bytes()[..6].iter());
        bytes.extend(entry.slot.to_le_bytes());
        bytes.extend(entry.hash.0);
    }
    bytes
}

/// Reads the form on disk: entries in ascending order.
pub fn decode(bytes: &[u8], packs: &Packs, place: Place) -> Result<Vec<Entry>, SnapshotError> {
    let damaged = |what: &str| packs.damaged(place, format!("a page table {what}"));
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| damaged("does not begin like one"))?;
    if rest.len() % ENTRY_BYTES != 0 {
        return Err(damaged("has a part of an entry"));
    }
    let entries: Vec<Entry> = rest.chunks_exact(ENTRY_BYTES).map(decode_entry).collect();
    if !entries.is_sorted_by(|a, b| a.key() < b.key()) {
        return Err(damaged("is not in order"));
    }
    if entries.last().is_some_and(|last| last.space >= SPACES_MAX) {
        return Err(damaged("names a memory that no machine has"));
    }
    Ok(entries)
}

fn decode_entry(bytes: &[u8]) -> Entry {
    let number = |at: usize, len: usize| {
        let mut word = [0; 8];
        word[..len].copy_from_slice(&bytes[at..at + len]);
        u64::from_le_bytes(word)
    };
    Entry {
        space: number(0, 2) as u16,
        page: number(2, 8),
        place: Place { pack: number(10, 4) as u32, offset: number(14, 6) },
        slot: number(20, 2) as u16,
        hash: Hash(bytes[22..54].try_into().expect("32 bytes")),
    }
}

/// One layer out of two: where both have a page, `above` counts.
pub fn merge(below: &[Entry], above: &[Entry]) -> Vec<Entry> {
    let mut merged = Vec::with_capacity(below.len() + above.len());
    let mut below = below.iter().peekable();
    for entry in above {
        while let Some(lower) = below.next_if(|lower| lower.key() < entry.key()) {
            merged.push(*lower);
        }
        below.next_if(|lower| lower.key() == entry.key());
        merged.push(*entry);
    }
    merged.extend(below);
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn entry(space: u16, page: u64, byte: u8) -> Entry {
        let place = Place { pack: 7, offset: u64::from(byte) << 33 };
        Entry { space, page, hash: Hash([byte; 32]), place, slot: u16::from(byte) }
    }

    fn layer(pages: &BTreeMap<(u16, u64), u8>) -> Vec<Entry> {
        pages.iter().map(|((space, page), byte)| entry(*space, *page, *byte)).collect()
    }

    #[test]
    fn disorder_is_damage() {
        let packs = Packs::new("nowhere".into());
        let read = |bytes: &[u8]| decode(bytes, &packs, Place::default());
        let good = encode(&[entry(0, 1, 1), entry(1, 0, 2)]);
        assert!(read(&good).is_ok());
        assert!(read(&good[1..]).is_err());
        assert!(read(&good[..good.len() - 1]).is_err());
        assert!(read(&encode(&[entry(0, 1, 1), entry(0, 1, 2)])).is_err());
        assert!(read(&encode(&[entry(300, 1, 1)])).is_err());
    }

    proptest! {
        #[test]
        fn merging_is_laying_over(
            below in proptest::collection::btree_map((0..3u16, 0..50u64), any::<u8>(), 0..60),
            above in proptest::collection::btree_map((0..3u16, 0..50u64), any::<u8>(), 0..60),
        ) {
            let mut model = below.clone();
            model.extend(above.clone());
            let merged = merge(&layer(&below), &layer(&above));
            prop_assert_eq!(&merged, &layer(&model));
            let packs = Packs::new("nowhere".into());
            prop_assert_eq!(decode(&encode(&merged), &packs, Place::default()).unwrap(), merged);
        }
    }
}
