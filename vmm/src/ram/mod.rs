//! Guest RAM: one memfd, mapped shared until it is frozen and private from then on, so that branches can map it too.

mod frozen;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use orrery_devices::layout::ram_ranges;
use orrery_devices::{GuestMemory, WrittenPages};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

pub use frozen::{FrozenFile, FrozenRam, Page};
pub(crate) use frozen::{host_page, overwrite_page};

/// RAM could not be had from the host.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// memfd_create or ftruncate failed.
    #[error("cannot create {bytes} bytes of guest memory: {source}")]
    Create {
        /// Size asked for.
        bytes: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The memory cannot be made immutable.
    #[error("cannot freeze {bytes} bytes of guest memory for branches: {source}")]
    Freeze {
        /// Size of RAM.
        bytes: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// mmap failed.
    #[error("cannot map {bytes} bytes of guest memory at {start:#x}: {reason}")]
    Map {
        /// Guest-physical start.
        start: u64,
        /// Size of the region.
        bytes: u64,
        /// What the mapping library says.
        reason: String,
    },
}

/// Creates zeroed guest RAM of `bytes`, a multiple of 4096.
pub fn create(bytes: u64) -> Result<GuestMemory, RamError> {
    let file = Arc::new(memory_file(bytes).map_err(|source| RamError::Create { bytes, source })?);
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, len) in ram_ranges(bytes) {
        let failed = |reason: String| RamError::Map { start, bytes: len, reason };
        let file = FileOffset::from_arc(Arc::clone(&file), offset);
        let region = GuestRegionMmap::from_range(GuestAddress(start), len as usize, Some(file))
            .map_err(|e| failed(e.to_string()))?;
        advise(&region);
        regions.push(region);
        offset += len;
    }
    GuestMemory::from_regions(regions).map_err(|e| RamError::Map { start: 0, bytes, reason: e.to_string() })
}

/// Asks for huge pages, which make the engine's loads and stores cheaper. Only an advice: failure is fine.
fn advise(region: &GuestRegionMmap<WrittenPages>) {
    // SAFETY: the range is exactly the mapping that `region` owns, and MADV_HUGEPAGE changes no content.
    unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
}

fn memory_file(bytes: u64) -> io::Result<File> {
    // SAFETY: the name is a C string and the flags are valid; the result is checked.
    let fd = unsafe { libc::memfd_create(c"orrery-ram".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is a fresh descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    debug_assert!(file.as_raw_fd() >= 0);
    Ok(file)
}

/// One past the highest guest-physical address of RAM.
pub fn end(memory: &GuestMemory) -> u64 {
    memory.iter().map(|region| region.start_addr().0 + region.len()).max().unwrap_or(0)
}

/// Bytes of RAM in all regions.
pub fn size(memory: &GuestMemory) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn created_ram_has_the_size_asked_for() {
        let memory = create(16 << 20).unwrap();
        assert_eq!(size(&memory), 16 << 20);
    }
}
