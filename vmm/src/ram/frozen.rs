//! RAM at a moment, which nobody writes any more: what the machines that branch off there map privately.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::{io, slice};

use orrery_cpu::memory::PAGE_SIZE;
use orrery_devices::{GuestMemory, WrittenPages};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::{RamError, memory_file};

const PAGE_BYTES: usize = PAGE_SIZE as usize;
/// Bytes that are copied at once from one file to another.
const COPY_BYTES: usize = 1 << 20;

/// One page of RAM.
pub type Page = [u8; PAGE_BYTES];

/// RAM that no longer changes: a file, and pages that differ from it.
///
/// The machine that RAM was frozen from, and all that branch off, map the file privately: what they write is theirs
/// alone. The file refuses to be mapped writable and shared from then on.
pub struct FrozenRam {
    file: Arc<FrozenFile>,
    /// Numbers of the pages that differ from the file, ascending.
    patched: Vec<u64>,
    /// Their contents, in the same order.
    patches: Vec<u8>,
}

/// A memory file that is not written any more.
pub struct FrozenFile {
    regions: Vec<Region>,
}

/// One range of RAM and a read-only mapping of it.
struct Region {
    first_page: u64,
    view: MmapRegion<()>,
    file: FileOffset,
}

impl FrozenRam {
    /// Freezes RAM that [`super::create`] has mapped, and replaces that mapping by a private one at the same host
    /// addresses, so that its owner goes on as if nothing had happened.
    ///
    /// `memory` must be the only mapping of its file.
    pub fn freeze(memory: &GuestMemory) -> Result<FrozenRam, RamError> {
        let failed = |source| RamError::Freeze { bytes: super::size(memory), source };
        for region in memory.iter() {
            let file = region.file_offset().ok_or_else(|| failed(io::ErrorKind::Unsupported.into()))?;
            make_private(region, file).map_err(failed)?;
        }
        FrozenRam::of_files(memory).map_err(failed)
    }

    /// Freezes the content of a private mapping of `base` whose pages `written` (ascending, without duplicates) may
    /// differ from the file. Costs what was written.
    pub fn freeze_private(base: &Arc<FrozenFile>, memory: &GuestMemory, written: Vec<u64>) -> FrozenRam {
        let mut patches = vec![0; written.len() * PAGE_BYTES];
        for (page, content) in written.iter().zip(patches.chunks_exact_mut(PAGE_BYTES)) {
            content.copy_from_slice(host_page(memory, *page).expect("written pages are RAM"));
        }
        FrozenRam { file: Arc::clone(base), patched: written, patches }
    }

    /// The same content in a file of its own, without patches. Costs what RAM holds.
    pub fn flatten(&self) -> Result<FrozenRam, RamError> {
        let bytes = self.file.regions.iter().map(|region| region.view.size() as u64).sum();
        self.copy(bytes).map_err(|source| RamError::Freeze { bytes, source })
    }

    fn of_files(memory: &GuestMemory) -> io::Result<FrozenRam> {
        let mut regions = Vec::new();
        for region in memory.iter() {
            let file = region.file_offset().cloned().ok_or(io::ErrorKind::Unsupported)?;
            seal(&file)?;
            regions.push(Region::new(region.start_addr(), region.len(), file)?);
        }
        Ok(FrozenRam { file: Arc::new(FrozenFile { regions }), patched: Vec::new(), patches: Vec::new() })
    }

    fn copy(&self, bytes: u64) -> io::Result<FrozenRam> {
        let file = Arc::new(memory_file(bytes)?);
        let mut regions = Vec::new();
        for region in &self.file.regions {
            // Both files are laid out alike.
            let start = region.file.start();
            for (from, to) in data_ranges(region.file.file(), start, start + region.view.size() as u64)? {
                let bytes = &region.bytes()[(from - start) as usize..(to - start) as usize];
                for (index, piece) in bytes.chunks(COPY_BYTES).enumerate() {
                    file.write_all_at(piece, from + (index * COPY_BYTES) as u64)?;
                }
            }
            let first = self.patched.partition_point(|page| *page < region.first_page);
            for (index, page) in self.patched.iter().enumerate().skip(first) {
                let at = (page - region.first_page) * PAGE_SIZE;
                if at < region.view.size() as u64 {
                    file.write_all_at(&self.patches[index * PAGE_BYTES..][..PAGE_BYTES], start + at)?;
                }
            }
            let place = FileOffset::from_arc(Arc::clone(&file), start);
            regions.push((GuestAddress(region.first_page * PAGE_SIZE), region.view.size() as u64, place));
        }
        let regions = regions.into_iter().map(|(start, bytes, place)| {
            seal(&place)?;
            Region::new(start, bytes, place)
        });
        let file = Arc::new(FrozenFile { regions: regions.collect::<io::Result<_>>()? });
        Ok(FrozenRam { file, patched: Vec::new(), patches: Vec::new() })
    }

    /// The file below.
    pub fn file(&self) -> &Arc<FrozenFile> {
        &self.file
    }

    /// Pages that differ from the file, ascending.
    pub fn patched(&self) -> &[u64] {
        &self.patched
    }

    /// RAM with this content, for one machine to read and write.
    pub fn map(&self) -> Result<GuestMemory, RamError> {
        let memory = self.file.map()?;
        for (page, content) in self.patched.iter().zip(self.patches.chunks_exact(PAGE_BYTES)) {
            let target = host_address(&memory, *page).expect("patched pages are RAM");
            // SAFETY: `target` is a page of the mapping just made, which nobody else knows.
            unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), target, PAGE_BYTES) };
        }
        Ok(memory)
    }

    /// A page by its number (guest-physical address / 4096); None outside RAM.
    pub fn page(&self, page: u64) -> Option<&Page> {
        if let Ok(at) = self.patched.binary_search(&page) {
            return self.patches[at * PAGE_BYTES..].first_chunk();
        }
        self.file.page(page)
    }

    /// Writes the page's frozen content over a machine's own page, see [`overwrite_page`].
    pub fn restore_page(&self, memory: &GuestMemory, page: u64, changed: impl FnMut(u64, u64)) {
        if let Some(frozen) = self.page(page) {
            overwrite_page(memory, page, frozen, changed);
        }
    }
}

/// Writes `content` over a machine's page and calls `changed` with each range of bytes (offset in the page, length;
/// multiples of 64) that was different.
pub fn overwrite_page(memory: &GuestMemory, page: u64, content: &Page, mut changed: impl FnMut(u64, u64)) {
    const LINE: usize = 64;
    let Some(target) = host_address(memory, page) else { return };
    // SAFETY: a page of RAM; the machine does not run, so nobody else writes it while the reference lives.
    let current = unsafe { &mut *target.cast::<Page>() };
    let mut run: Option<usize> = None;
    for (index, (now, then)) in current.chunks_exact_mut(LINE).zip(content.chunks_exact(LINE)).enumerate() {
        if *now != *then {
            now.copy_from_slice(then);
            run.get_or_insert(index);
        } else if let Some(first) = run.take() {
            changed((first * LINE) as u64, ((index - first) * LINE) as u64);
        }
    }
    if let Some(first) = run {
        changed((first * LINE) as u64, (PAGE_BYTES - first * LINE) as u64);
    }
}

impl FrozenFile {
    /// Maps the file privately.
    fn map(&self) -> Result<GuestMemory, RamError> {
        let mut regions = Vec::new();
        for region in &self.regions {
            let start = region.first_page * PAGE_SIZE;
            let bytes = region.view.size();
            let failed = |reason: String| RamError::Map { start, bytes: bytes as u64, reason };
            let mapping = MmapRegionBuilder::new_with_bitmap(bytes, WrittenPages::default())
                .with_file_offset(region.file.clone())
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
                .build()
                .map_err(|e| failed(e.to_string()))?;
            let mapping = GuestRegionMmap::new(mapping, GuestAddress(start));
            regions.push(mapping.ok_or_else(|| failed("the end of the region overflows".to_owned()))?);
        }
        GuestMemory::from_regions(regions).map_err(|e| RamError::Map { start: 0, bytes: 0, reason: e.to_string() })
    }

    fn page(&self, page: u64) -> Option<&Page> {
        self.regions.iter().find_map(|region| {
            let at = page.checked_sub(region.first_page)?.checked_mul(PAGE_SIZE)?;
            region.bytes().get(usize::try_from(at).ok()?..)?.first_chunk()
        })
    }

    /// Pages that the host has provided for the file.
    pub fn allocated_pages(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let file = self.regions.first().and_then(|region| region.file.file().metadata().ok());
        file.map_or(0, |metadata| metadata.blocks() * 512 / PAGE_SIZE)
    }
}

impl Region {
    fn new(start: GuestAddress, bytes: u64, file: FileOffset) -> io::Result<Region> {
        let view = MmapRegionBuilder::new(bytes as usize)
            .with_file_offset(file.clone())
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| io::Error::other(e.to_string()))?;
        Ok(Region { first_page: start.0 / PAGE_SIZE, view, file })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is `size` bytes long and lives as long as `self`; the file below is sealed against
        // writing and its last shared mapping is gone, so the bytes do not change.
        unsafe { slice::from_raw_parts(self.view.as_ptr(), self.view.size()) }
    }
}

/// Replaces the shared mapping of a region by a private one of the same bytes at the same place.
fn make_private(region: &GuestRegionMmap<WrittenPages>, file: &FileOffset) -> io::Result<()> {
    let offset = i64::try_from(file.start()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the range is exactly the mapping that `region` owns, and stays mapped with the same content and rights.
    let mapped = unsafe {
        libc::mmap(
            region.as_ptr().cast(),
            region.len() as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.file().as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// From now on the file cannot be written, mapped writable and shared, or changed in length.
fn seal(file: &FileOffset) -> io::Result<()> {
    let seals = libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    // SAFETY: the descriptor is open; the call takes an integer.
    let result = unsafe { libc::fcntl(file.file().as_raw_fd(), libc::F_ADD_SEALS, seals) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The parts of `start..end` of a file that are not holes.
fn data_ranges(file: &std::fs::File, start: u64, end: u64) -> io::Result<Vec<(u64, u64)>> {
    let seek = |from: u64, whence| {
        // SAFETY: the descriptor is open; its position is used by nobody.
        let at = unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) };
        if at < 0 { Err(io::Error::last_os_error()) } else { Ok((at as u64).min(end)) }
    };
    let mut ranges = Vec::new();
    let mut at = start;
    while at < end {
        let from = match seek(at, libc::SEEK_DATA) {
            Ok(from) if from < end => from,
            Err(error) if error.raw_os_error() != Some(libc::ENXIO) => return Err(error),
            _ => break,
        };
        let to = seek(from, libc::SEEK_HOLE)?;
        ranges.push((from, to));
        at = to;
    }
    Ok(ranges)
}

fn host_address(memory: &GuestMemory, page: u64) -> Option<*mut u8> {
    let gpa = GuestAddress(page.checked_mul(PAGE_SIZE)?);
    let (region, offset) = memory.to_region_addr(gpa)?;
    // SAFETY: the offset is inside the region's mapping; regions are whole pages.
    Some(unsafe { region.as_ptr().add(offset.0 as usize) })
}

pub fn host_page(memory: &GuestMemory, page: u64) -> Option<&Page> {
    // SAFETY: a page of the mapping that `memory` holds; the machine does not run while the reference lives.
    host_address(memory, page).map(|at| unsafe { &*at.cast::<Page>() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    const BYTES: u64 = 16 << 20;

    fn byte(memory: &GuestMemory, gpa: u64) -> u8 {
        memory.read_obj(GuestAddress(gpa)).unwrap()
    }

    fn write(memory: &GuestMemory, gpa: u64, value: u8) {
        memory.write_obj(value, GuestAddress(gpa)).unwrap();
    }

    #[test]
    fn what_is_frozen_stays_and_what_is_mapped_is_private() {
        let memory = crate::ram::create(BYTES).unwrap();
        write(&memory, 0x5000, 1);
        let before = host_address(&memory, 5);
        let frozen = FrozenRam::freeze(&memory).unwrap();
        assert_eq!(host_address(&memory, 5), before, "the owner's addresses stay");
        let (a, b) = (frozen.map().unwrap(), frozen.map().unwrap());
        write(&memory, 0x5000, 2);
        write(&a, 0x5000, 3);
        write(&a, 0x6000, 4);
        assert_eq!([byte(&memory, 0x5000), byte(&a, 0x5000), byte(&b, 0x5000)], [2, 3, 1]);
        assert_eq!(byte(&b, 0x6000), 0);
        assert_eq!(frozen.page(5).unwrap()[0], 1);
        assert!(frozen.page(BYTES / PAGE_SIZE).is_none() && frozen.page(u64::MAX).is_none());
    }

    #[test]
    fn a_frozen_file_refuses_to_be_written() {
        let memory = crate::ram::create(BYTES).unwrap();
        let frozen = FrozenRam::freeze(&memory).unwrap();
        assert!(frozen.file.regions[0].file.file().write_at(&[1], 0).is_err());
        assert!(frozen.file.regions[0].file.file().set_len(1).is_err());
    }

    #[test]
    fn a_private_mapping_freezes_as_patches_and_flattens_to_a_file() {
        let memory = crate::ram::create(BYTES).unwrap();
        write(&memory, 0x5000, 1);
        write(&memory, 0x9000, 9);
        let frozen = FrozenRam::freeze(&memory).unwrap();
        let child = frozen.map().unwrap();
        write(&child, 0x5000, 2);
        write(&child, BYTES - 1, 7);
        let last = BYTES / PAGE_SIZE - 1;
        let patched = FrozenRam::freeze_private(frozen.file(), &child, vec![5, last]);
        assert_eq!(patched.patched(), [5, last]);
        let flat = patched.flatten().unwrap();
        assert!(flat.patched().is_empty());
        assert_eq!(flat.file().allocated_pages(), 3, "holes stay holes");
        for again in [patched, flat] {
            let grandchild = again.map().unwrap();
            let read = [0x5000, 0x9000, BYTES - 1, 0x7000].map(|gpa| byte(&grandchild, gpa));
            assert_eq!(read, [2, 9, 7, 0]);
            assert_eq!(again.page(5).unwrap()[0], 2);
            assert_eq!(again.page(9).unwrap()[0], 9);
        }
    }

    #[test]
    fn restoring_tells_what_was_different() {
        let memory = crate::ram::create(BYTES).unwrap();
        write(&memory, 0x5000, 1);
        let frozen = FrozenRam::freeze(&memory).unwrap();
        let child = frozen.map().unwrap();
        for gpa in [0x5000, 0x5041, 0x5FFF] {
            write(&child, gpa, 0x55);
        }
        let mut ranges = Vec::new();
        frozen.restore_page(&child, 5, |offset, len| ranges.push((offset, len)));
        assert_eq!(ranges, [(0, 128), (4096 - 64, 64)]);
        assert_eq!([0x5000, 0x5041, 0x5FFF].map(|gpa| byte(&child, gpa)), [1, 0, 0]);
        frozen.restore_page(&child, 5, |_, _| panic!("nothing differs any more"));
    }
}
