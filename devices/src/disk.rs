//! What a block device stores its sectors in: the [`Disk`] trait and [`CowDisk`], copy-on-write over an immutable
//! base.
//!
//! The serde form of a [`CowDisk`] holds its length and the digest of the pages written, not the pages: it is small,
//! and stands for the content in the hash of the machine's state. A snapshot stores [`CowDisk::overlay`] beside it.
//! A deserialised disk is detached and refuses every access until [`CowDisk::attach`] gives both back; the digest
//! makes sure that they are the right ones.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Bytes of one page of an overlay.
pub const PAGE_LEN: usize = 4096;

/// A disk access that cannot be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The access goes beyond the end.
    #[error("access of {len} bytes at {offset} is beyond the end of a disk of {disk_len} bytes")]
    OutOfRange {
        /// Where it starts.
        offset: u64,
        /// How long it is.
        len: u64,
        /// Length of the disk.
        disk_len: u64,
    },
    /// The disk is read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// A deserialised disk whose base and overlay have not been given back.
    #[error("the disk has been restored without its content")]
    Detached,
}

/// A disk restored with content that is not its own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// The base has another length.
    #[error("the base of the disk has {actual} bytes, but its state was saved with {expected}")]
    BaseLength {
        /// Length in the saved state.
        expected: u64,
        /// Length of the base given.
        actual: u64,
    },
    /// A page of the overlay is beyond the end of the disk.
    #[error("the saved page {page} is beyond the end of the disk")]
    Page {
        /// Its number.
        page: u64,
    },
    /// The overlay differs from what was saved.
    #[error("the pages given are not those that the disk was saved with")]
    Digest,
}

/// Storage of a block device. Offsets and lengths are in bytes.
pub trait Disk {
    /// Length of the disk in bytes.
    fn len(&self) -> u64;
    /// True if the disk has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// True if writes are refused.
    fn read_only(&self) -> bool;
    /// Fills `data` from `offset` on.
    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError>;
    /// Stores `data` at `offset`.
    fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError>;
    /// Makes what was written durable.
    fn flush(&mut self) -> Result<(), DiskError>;
}

/// The immutable content below a [`CowDisk`]: bytes in memory or a mapped file.
pub type Base = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// One page of an overlay. Copies share the content until one of them is written.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct Page(Arc<[u8; PAGE_LEN]>);

impl Page {
    /// The content.
    pub fn bytes(&self) -> &[u8; PAGE_LEN] {
        &self.0
    }

    /// True if the two are copies of one page and neither has been written since. Equal contents may differ in this.
    pub fn is_copy_of(&self, other: &Page) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl From<[u8; PAGE_LEN]> for Page {
    fn from(bytes: [u8; PAGE_LEN]) -> Page {
        Page(Arc::new(bytes))
    }
}

impl From<Page> for Vec<u8> {
    fn from(page: Page) -> Vec<u8> {
        page.0.to_vec()
    }
}

impl TryFrom<Vec<u8>> for Page {
    type Error = String;

    fn try_from(bytes: Vec<u8>) -> Result<Page, String> {
        let len = bytes.len();
        let page: Result<[u8; PAGE_LEN], _> = bytes.try_into();
        page.map(Page::from).map_err(|_| format!("a page of a disk has {PAGE_LEN} bytes, not {len}"))
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Page")
    }
}

/// The pages that differ from the base, by page number.
pub type Overlay = BTreeMap<u64, Page>;

/// Sum of the digests of an overlay's pages, in four wrapping 64-bit lanes: independent of the order of writes, and
/// changed by one page at the cost of hashing that page.
type Digest = [u64; 4];

/// A disk whose writes stay in memory, over a base that never changes. A clone costs the same however much was written:
/// the two share their pages until one of them writes, which then copies the table of pages, and each page that it
/// writes.
#[derive(Clone, Deserialize)]
#[serde(from = "Saved")]
pub struct CowDisk {
    len: u64,
    read_only: bool,
    base: Option<Base>,
    written: Arc<Written>,
    digest: Digest,
}

/// What differs from the base.
#[derive(Clone, Default)]
struct Written {
    overlay: Overlay,
    /// Digest of each page of the overlay.
    digests: BTreeMap<u64, Digest>,
}

/// The serde form of a [`CowDisk`].
#[derive(Serialize, Deserialize)]
struct Saved {
    len: u64,
    read_only: bool,
    digest: Digest,
}

impl From<Saved> for CowDisk {
    fn from(Saved { len, read_only, digest }: Saved) -> CowDisk {
        CowDisk { len, read_only, base: None, written: Arc::default(), digest }
    }
}

impl Serialize for CowDisk {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Saved { len: self.len, read_only: self.read_only, digest: self.digest }.serialize(serializer)
    }
}

impl fmt::Debug for CowDisk {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("CowDisk").field("len", &self.len).field("pages", &self.overlay().len()).finish_non_exhaustive()
    }
}

impl CowDisk {
    /// A disk with the content of `base`.
    pub fn new(base: Base, read_only: bool) -> CowDisk {
        CowDisk {
            len: (*base).as_ref().len() as u64,
            read_only,
            base: Some(base),
            written: Arc::default(),
            digest: [0; 4],
        }
    }

    /// The pages that the guest has written: what a snapshot stores beside the serde form.
    pub fn overlay(&self) -> &Overlay {
        &self.written.overlay
    }

    /// Gives a deserialised disk its content back.
    pub fn attach(&mut self, base: Base, overlay: Overlay) -> Result<(), AttachError> {
        let actual = (*base).as_ref().len() as u64;
        if actual != self.len {
            return Err(AttachError::BaseLength { expected: self.len, actual });
        }
        let pages = self.len.div_ceil(PAGE_LEN as u64);
        if let Some((&page, _)) = overlay.iter().find(|(page, _)| **page >= pages) {
            return Err(AttachError::Page { page });
        }
        let digests: BTreeMap<u64, Digest> =
            overlay.iter().map(|(index, page)| (*index, page_digest(*index, page))).collect();
        if digests.values().fold([0; 4], |sum, digest| add(sum, *digest)) != self.digest {
            return Err(AttachError::Digest);
        }
        self.base = Some(base);
        self.written = Arc::new(Written { overlay, digests });
        Ok(())
    }

    fn check(&self, offset: u64, len: usize) -> Result<&Base, DiskError> {
        let len = len as u64;
        if offset > self.len || len > self.len - offset {
            return Err(DiskError::OutOfRange { offset, len, disk_len: self.len });
        }
        self.base.as_ref().ok_or(DiskError::Detached)
    }
}

/// Part of a page, and of the buffer that is read or written.
struct Piece {
    page: u64,
    /// First byte inside the page.
    start: usize,
    /// Range inside the buffer.
    buffer: std::ops::Range<usize>,
}

/// Splits an access at page boundaries.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let start = (at % PAGE_LEN as u64) as usize;
        let count = (PAGE_LEN - start).min(len - done);
        let piece = Piece { page: at / PAGE_LEN as u64, start, buffer: done..done + count };
        done += count;
        (count > 0).then_some(piece)
    })
}

fn page_digest(index: u64, page: &Page) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&index.to_le_bytes());
    hasher.update(page.bytes());
    let mut lanes = [0; 4];
    for (lane, bytes) in lanes.iter_mut().zip(hasher.finalize().as_bytes().chunks_exact(8)) {
        *lane = crate::value_of(bytes);
    }
    lanes
}

fn add(mut sum: Digest, digest: Digest) -> Digest {
    sum.iter_mut().zip(digest).for_each(|(sum, lane)| *sum = sum.wrapping_add(lane));
    sum
}

fn subtract(mut sum: Digest, digest: Digest) -> Digest {
    sum.iter_mut().zip(digest).for_each(|(sum, lane)| *sum = sum.wrapping_sub(lane));
    sum
}

impl Disk for CowDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        let base = (**self.check(offset, data.len())?).as_ref();
        for piece in pieces(offset, data.len()) {
            let count = piece.buffer.len();
            let into = &mut data[piece.buffer];
            match self.written.overlay.get(&piece.page) {
                Some(page) => into.copy_from_slice(&page.0[piece.start..piece.start + count]),
                None => {
                    let from = piece.page as usize * PAGE_LEN + piece.start;
                    into.copy_from_slice(&base[from..from + count]);
                }
            }
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        let base = Arc::clone(self.check(offset, data.len())?);
        let base = (*base).as_ref();
        let written = Arc::make_mut(&mut self.written);
        for piece in pieces(offset, data.len()) {
            let page = written.overlay.entry(piece.page).or_insert_with(|| {
                let from = piece.page as usize * PAGE_LEN;
                let below = &base[from..base.len().min(from + PAGE_LEN)];
                let mut bytes = [0; PAGE_LEN];
                bytes[..below.len()].copy_from_slice(below);
                Page::from(bytes)
            });
            let bytes = Arc::make_mut(&mut page.0);
            bytes[piece.start..piece.start + piece.buffer.len()].copy_from_slice(&data[piece.buffer]);
            let digest = page_digest(piece.page, page);
            let before = written.digests.insert(piece.page, digest).unwrap_or([0; 4]);
            self.digest = add(subtract(self.digest, before), digest);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn disk(len: usize) -> (Vec<u8>, CowDisk) {
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        (bytes.clone(), CowDisk::new(Arc::new(bytes), false))
    }

    fn restore(disk: &CowDisk) -> CowDisk {
        postcard::from_bytes(&postcard::to_allocvec(disk).unwrap()).unwrap()
    }

    #[test]
    fn the_ends_are_guarded() {
        let (_, mut disk) = disk(10_000);
        assert!(disk.read_at(9_999, &mut [0; 1]).is_ok());
        assert!(disk.read_at(10_000, &mut []).is_ok());
        for (offset, len) in [(9_999, 2), (10_001, 0), (u64::MAX, 1)] {
            let error = DiskError::OutOfRange { offset, len, disk_len: 10_000 };
            assert_eq!(disk.read_at(offset, &mut vec![0; len as usize]), Err(error));
            assert_eq!(disk.write_at(offset, &vec![0; len as usize]), Err(error));
        }
        let mut disk = CowDisk::new(Arc::new(vec![0; 10]), true);
        assert_eq!(disk.write_at(0, &[1]), Err(DiskError::ReadOnly));
    }

    #[test]
    fn a_restored_disk_wants_its_own_content() {
        let (bytes, mut disk) = disk(10_000);
        disk.write_at(5_000, b"hello").unwrap();
        let mut back = restore(&disk);
        assert_eq!(back.read_at(0, &mut [0]), Err(DiskError::Detached));
        let base: Base = Arc::new(bytes);
        assert_eq!(back.attach(Arc::clone(&base), Overlay::new()), Err(AttachError::Digest));
        let short: Base = Arc::new(vec![0; 3]);
        assert!(matches!(back.attach(short, Overlay::new()), Err(AttachError::BaseLength { .. })));
        let overlay: Overlay = postcard::from_bytes(&postcard::to_allocvec(disk.overlay()).unwrap()).unwrap();
        back.attach(base, overlay).unwrap();
        let mut data = [0; 5];
        back.read_at(5_000, &mut data).unwrap();
        assert_eq!(&data, b"hello");
    }

    #[test]
    fn copies_do_not_see_each_others_writes() {
        let (bytes, mut disk) = disk(10_000);
        disk.write_at(5_000, b"common").unwrap();
        let mut copy = disk.clone();
        copy.write_at(5_000, b"mine").unwrap();
        copy.write_at(0, b"new").unwrap();
        disk.write_at(9_000, b"yours").unwrap();
        let read = |disk: &CowDisk, offset, len| {
            let mut data = vec![0; len];
            disk.read_at(offset, &mut data).unwrap();
            data
        };
        assert_eq!((read(&disk, 5_000, 6), read(&copy, 5_000, 6)), (b"common".to_vec(), b"mineon".to_vec()));
        assert_eq!((read(&disk, 0, 3), read(&copy, 0, 3)), (bytes[..3].to_vec(), b"new".to_vec()));
        assert_eq!((read(&disk, 9_000, 5), read(&copy, 9_000, 5)), (b"yours".to_vec(), bytes[9_000..9_005].to_vec()));
        assert_ne!(disk.digest, copy.digest);
    }

    proptest! {
        #[test]
        fn behaves_like_an_array(writes in proptest::collection::vec((0..20_000u64, 0..9_000usize, any::<u8>()), 0..12)) {
            let (mut model, mut disk) = disk(20_000);
            for (offset, len, byte) in writes {
                let len = len.min(20_000 - offset as usize);
                disk.write_at(offset, &vec![byte; len]).unwrap();
                model[offset as usize..offset as usize + len].fill(byte);
            }
            let mut all = vec![0; 20_000];
            disk.read_at(0, &mut all).unwrap();
            prop_assert!(all == model);
            let sum = disk.overlay().iter().fold([0; 4], |sum, (index, page)| add(sum, page_digest(*index, page)));
            prop_assert_eq!(sum, disk.digest);
        }
    }
}
