//! Files on the guest's disks, as they are at the moment: the image's contents and what the guest has written back.
//! What a program has written and the guest's kernel still keeps in memory is not here.

use std::cell::OnceCell;

use ext4_view::{Ext4, Ext4Read, Path};
use orrery_devices::CowDisk;
use orrery_devices::disk::Disk;

/// Most bytes of one file that are read.
const FILE_MAX: u64 = 1 << 30;

/// Which file it is, and which version of it, as the guest's kernel says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileVersion {
    /// Number of its inode.
    pub inode: u64,
    /// Bytes.
    pub len: u64,
    /// Seconds since 1970 at which it was written.
    pub modified: u64,
}

/// The file systems of the guest's disks.
pub(super) struct Files<'a> {
    disks: Vec<&'a CowDisk>,
    mounted: OnceCell<Vec<Ext4>>,
}

/// Bytes of the superblock with the flags that there is a journal and that it has something to be replayed (Linux,
/// Documentation/filesystems/ext4/super.rst: COMPAT_HAS_JOURNAL and INCOMPAT_RECOVER, both 4).
const JOURNAL_BYTES: [u64; 2] = [1024 + 0x5C, 1024 + 0x60];
const JOURNAL_BIT: u8 = 0x4;

/// A disk for the file system's reader, which wants one of its own. The base is shared; only written pages are copied.
struct Reader {
    disk: CowDisk,
    /// Hides that there is a journal.
    without_journal: bool,
}

impl Ext4Read for Reader {
    fn read(&mut self, start: u64, into: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        self.disk.read_at(start, into)?;
        let places = JOURNAL_BYTES.iter().filter_map(|place| place.checked_sub(start));
        for place in places.filter(|_| self.without_journal) {
            if let Some(byte) = into.get_mut(place as usize) {
                *byte &= !JOURNAL_BIT;
            }
        }
        Ok(())
    }
}

/// The file system of a disk. A mounted one has a journal with changes that are not in their places yet; where the
/// reader cannot replay it, files are as they were before those changes.
fn mount(disk: &CowDisk) -> Option<Ext4> {
    let load = |without_journal| Ext4::load(Box::new(Reader { disk: disk.clone(), without_journal })).ok();
    load(false).or_else(|| load(true))
}

impl<'a> Files<'a> {
    pub fn new(disks: Vec<&'a CowDisk>) -> Files<'a> {
        Files { disks, mounted: OnceCell::new() }
    }

    fn mounted(&self) -> &[Ext4] {
        self.mounted.get_or_init(|| {
            // A disk without an ext4 file system, or with a damaged one, has no files.
            self.disks.iter().filter_map(|disk| mount(disk)).collect()
        })
    }

    /// The contents of a file, from the first disk that has it.
    pub fn read(&self, path: &str) -> Option<Vec<u8>> {
        let path = Path::try_from(path).ok()?;
        self.mounted().iter().find_map(|disk| {
            let metadata = disk.metadata(path).ok()?;
            let wanted = metadata.file_type().is_regular_file() && metadata.len() <= FILE_MAX;
            disk.read(path).ok().filter(|_| wanted)
        })
    }
}
