//! Guest-physical RAM as the engine sees it: host pointers behind bounds checks.

use std::any::Any;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::Past;

/// RAM that nobody but the vCPU writes.
pub type GuestMemory = GuestMemoryMmap;

/// Size of a page and of every per-page record, in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// The bits of an address that say where in its page it is.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;

/// The bytes of one page.
pub type PageBytes = [u8; PAGE_SIZE as usize];

/// One contiguous range of RAM.
#[derive(Clone, Copy, Debug)]
struct Region {
    start: u64,
    len: u64,
    host: *mut u8,
}

/// RAM for the vCPU: finds the host address of a guest-physical one. Holds the mapping alive.
pub struct PhysMemory {
    regions: Vec<Region>,
    /// What is to be kept of pages before they are written.
    past: Option<Arc<Past>>,
    _owner: Box<dyn Any + Send>,
}

// SAFETY: the pointers belong to the mapping in `_owner`, which is itself Send; the single vCPU that owns this
// value is the only one to dereference them while it runs.
unsafe impl Send for PhysMemory {}

impl PhysMemory {
    /// Takes the machine's RAM, however it notes what devices write: the engine has notes of its own. Regions must
    /// start and end on page boundaries.
    pub fn new<B: Bitmap + Send + Sync + 'static>(memory: GuestMemoryMmap<B>) -> PhysMemory {
        let regions = memory
            .iter()
            .map(|region| {
                let region: &vm_memory::GuestRegionMmap<B> = region;
                Region { start: region.start_addr().0, len: region.len(), host: region.as_ptr() }
            })
            .collect::<Vec<_>>();
        for region in &regions {
            assert!(region.start % PAGE_SIZE == 0 && region.len % PAGE_SIZE == 0, "RAM is made of whole pages");
        }
        PhysMemory { regions, past: None, _owner: Box::new(memory) }
    }

    /// One past the highest guest-physical address of RAM.
    pub fn end(&self) -> u64 {
        self.regions.iter().map(|r| r.start + r.len).max().unwrap_or(0)
    }

    /// The ranges of RAM: first guest-physical address, length in bytes, host address.
    pub fn regions(&self) -> impl Iterator<Item = (u64, u64, *mut u8)> + '_ {
        self.regions.iter().map(|r| (r.start, r.len, r.host))
    }

    /// Host address of `len` bytes of RAM at `gpa`, or None if any of them is not RAM.
    #[inline]
    pub fn host(&self, gpa: u64, len: u64) -> Option<*mut u8> {
        for region in &self.regions {
            let offset = gpa.wrapping_sub(region.start);
            if offset < region.len && len <= region.len - offset {
                // SAFETY: offset is inside the mapping of this region.
                return Some(unsafe { region.host.add(offset as usize) });
            }
        }
        None
    }

    /// Reads a little-endian u64 of RAM; None outside it.
    #[inline]
    pub fn read_u64(&self, gpa: u64) -> Option<u64> {
        // SAFETY: `host` has checked the range; unaligned reads are allowed.
        self.host(gpa, 8).map(|p| unsafe { p.cast::<u64>().read_unaligned() })
    }

    /// Writes a little-endian u64 of RAM; None outside it.
    #[inline]
    pub fn write_u64(&self, gpa: u64, value: u64) -> Option<()> {
        let host = self.host(gpa, 8)?;
        self.keep(gpa / PAGE_SIZE);
        // SAFETY: `host` has checked the range; unaligned writes are allowed.
        unsafe { host.cast::<u64>().write_unaligned(value) };
        Some(())
    }

    /// Whose past is to be kept from now on; None for none.
    pub fn keep_past(&mut self, past: Option<Arc<Past>>) {
        self.past = past;
    }

    /// Keeps the past of a page that is about to be written.
    #[inline]
    pub fn keep(&self, page: u64) {
        if let Some(past) = &self.past {
            past.keep(page);
        }
    }
}
