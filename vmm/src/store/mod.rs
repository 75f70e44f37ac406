//! Snapshots on disk: `store/` in the directory of runs.
//!
//! Contents (pages of RAM and of disks, states of everything else, page tables) are in [`pack`] files, each content
//! once, under its BLAKE3 hash, whichever runs it belongs to. A run names its snapshots in its `snapshots.jsonl`, one
//! line per snapshot, written after everything that the line refers to is on disk. So a crash at any moment leaves a
//! store that is whole up to the last line, and perhaps some bytes that nobody refers to, which `orrery store gc`
//! removes.
//!
//! Everything read from here is checked: packs by checksums, lines by theirs, and at last the restored machine's hash
//! against the one that the line promises. Writing never changes what a guest computes.

mod capture;
pub mod check;
mod error;
pub mod gc;
mod index;
pub mod layer;
mod load;
pub mod log;
pub mod pack;
mod writer;

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

pub(crate) use capture::CaptureStart;
pub use capture::{Capture, CaptureBase};
pub use error::SnapshotError;
pub use log::{BlobReference, LayerReference, PartialLine, SnapshotRecord};
pub use writer::{StoreWriter, Timeline};

use error::io_error;
use pack::Packs;

/// Name of the store in the directory of runs. No run has such a name: theirs end in numbers.
pub const STORE: &str = "store";

/// A store, held open: nobody removes anything from it meanwhile.
pub struct Store {
    path: PathBuf,
    packs: Packs,
    /// Built when something is not where it was said to be.
    index: std::sync::OnceLock<index::Index>,
    /// Locked shared by those who read and write, exclusively by those who remove.
    lock: Option<File>,
}

impl Store {
    /// Opens the store beside the runs, making it if there is none.
    pub fn open(runs: &Path) -> Result<Store, SnapshotError> {
        let path = runs.join(STORE);
        std::fs::create_dir_all(&path).map_err(io_error("create directory", &path))?;
        let lock = lock_file(&path, true)?;
        lock_with(&lock, &path, libc::LOCK_SH)?;
        Ok(Store { packs: Packs::new(path.join("packs")), path, lock: Some(lock), index: Default::default() })
    }

    /// Opens the store for reading; None if there is none.
    pub fn existing(runs: &Path) -> Result<Option<Store>, SnapshotError> {
        let path = runs.join(STORE);
        if !path.is_dir() {
            return Ok(None);
        }
        // A store on a read-only file system has nobody who removes things.
        let lock = lock_file(&path, false).ok();
        if let Some(lock) = &lock {
            lock_with(lock, &path, libc::LOCK_SH)?;
        }
        Ok(Some(Store { packs: Packs::new(path.join("packs")), path, lock, index: Default::default() }))
    }

    /// Waits for nobody: all others must have closed it. For removing things.
    pub fn exclusive(runs: &Path) -> Result<Option<Store>, SnapshotError> {
        let path = runs.join(STORE);
        if !path.is_dir() {
            return Ok(None);
        }
        let lock = lock_file(&path, true)?;
        lock_with(&lock, &path, libc::LOCK_EX | libc::LOCK_NB)?;
        Ok(Some(Store { packs: Packs::new(path.join("packs")), path, lock: Some(lock), index: Default::default() }))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its packs.
    pub fn packs(&self) -> &Packs {
        &self.packs
    }

    /// Where everything is, as of the first time that this was asked.
    fn index(&self) -> Result<&index::Index, SnapshotError> {
        if self.index.get().is_none() {
            let built = index::Index::build(&self.packs)?;
            let _ = self.index.set(built);
        }
        Ok(self.index.get().expect("it was just set"))
    }

    /// True if nobody can remove anything meanwhile.
    pub fn is_locked(&self) -> bool {
        self.lock.is_some()
    }
}

fn lock_file(store: &Path, create: bool) -> Result<File, SnapshotError> {
    let path = store.join("lock");
    let file = OpenOptions::new().read(true).write(create).create(create).truncate(false).open(&path);
    file.map_err(io_error("open", &path))
}

fn lock_with(file: &File, store: &Path, how: i32) -> Result<(), SnapshotError> {
    use std::os::fd::AsRawFd;
    loop {
        // SAFETY: the descriptor is open; flock touches no memory.
        if unsafe { libc::flock(file.as_raw_fd(), how) } == 0 {
            return Ok(());
        }
        let error = std::io::Error::last_os_error();
        match error.kind() {
            std::io::ErrorKind::Interrupted => {}
            std::io::ErrorKind::WouldBlock => return Err(SnapshotError::Busy { path: store.display().to_string() }),
            _ => return Err(io_error("lock", store)(error)),
        }
    }
}
