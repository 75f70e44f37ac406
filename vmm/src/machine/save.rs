//! Saving a machine into host memory and restoring it: the quick kind of snapshot, for debuggers and tests. The store
//! (`crate::store`) keeps snapshots on disk.

use std::sync::Arc;

use orrery_cpu::engine::EngineConfig;
use orrery_cpu::memory::PAGE_SIZE;
use orrery_devices::GuestMemory;
use orrery_guest_image::Image;
use vm_memory::{Bytes, GuestAddress};

use super::state::{MachineState, StateError};
use super::{Machine, MachineError};
use crate::digest::{CHUNK_PAGES, MemoryDigest, read_page};
use crate::page_hash::ZERO_PAGE;
use crate::ram;

type Page = Arc<[u8; PAGE_SIZE as usize]>;

/// The complete state of a machine at a moment. Saves of one machine share the pages that did not change between
/// them, so a save costs what was written since the last one.
#[derive(Clone)]
pub struct SavedMachine {
    state: MachineState,
    digest: MemoryDigest,
    pages: PageTable,
}

impl SavedMachine {
    /// Everything but RAM.
    pub fn state(&self) -> &MachineState {
        &self.state
    }

    /// The digest of RAM.
    pub fn digest(&self) -> &MemoryDigest {
        &self.digest
    }
}

/// Pages by number, in chunks that clones share.
#[derive(Clone, Default)]
struct PageTable {
    chunks: Vec<Option<Arc<Vec<Option<Page>>>>>,
}

impl PageTable {
    fn set(&mut self, page: u64, content: Option<Page>) {
        let (chunk, index) = (page as usize / CHUNK_PAGES, page as usize % CHUNK_PAGES);
        if self.chunks.len() <= chunk {
            self.chunks.resize(chunk + 1, None);
        }
        let chunk = self.chunks[chunk].get_or_insert_with(|| Arc::new(vec![None; CHUNK_PAGES]));
        Arc::make_mut(chunk)[index] = content;
    }

    /// Pages that are not all zeros, ascending.
    fn iter(&self) -> impl Iterator<Item = (u64, &Page)> {
        self.chunks.iter().enumerate().flat_map(|(number, chunk)| {
            let pages = chunk.as_ref().map_or(&[][..], |chunk| &chunk[..]);
            pages
                .iter()
                .enumerate()
                .filter_map(move |(index, page)| Some(((number * CHUNK_PAGES + index) as u64, page.as_ref()?)))
        })
    }
}

/// What the next save builds on.
#[derive(Clone)]
pub(super) struct LastSave {
    digest: MemoryDigest,
    pages: PageTable,
}

impl Machine {
    /// Saves the complete state at this moment. The machine goes on as if nothing had happened.
    pub fn save(&mut self) -> SavedMachine {
        self.update_digest();
        let digest = self.digest.clone();
        let (mut pages, changed) = match self.saved.take() {
            Some(last) => (last.pages, digest.differing_pages(&last.digest)),
            None => (PageTable::default(), digest.pages().map(|(page, _)| page).collect()),
        };
        for page in changed {
            let mut content = [0; PAGE_SIZE as usize];
            let read = read_page(&self.board.memory, page, &mut content);
            debug_assert!(read, "the digest is of RAM");
            pages.set(page, (digest.hash_of(page) != Some(ZERO_PAGE)).then(|| Arc::new(content)));
        }
        self.saved = Some(Box::new(LastSave { digest: digest.clone(), pages: pages.clone() }));
        SavedMachine { state: self.state(), digest, pages }
    }

    /// Makes a machine that goes on from where another was saved. `image` is the one that it was booted from; its
    /// disks are the ones below what the guest has written.
    pub fn restore(image: &Image, saved: &SavedMachine, engine: EngineConfig) -> Result<Machine, MachineError> {
        let disks = saved.state.disks().count();
        if image.disks().len() != disks {
            return Err(StateError::Disks { expected: disks, actual: image.disks().len() }.into());
        }
        let memory = ram::create(saved.state.config().memory_mib << 20)?;
        for (page, content) in saved.pages.iter() {
            write_page(&memory, page, &content[..]);
        }
        let mut machine = Machine::assemble(memory, saved.digest.clone(), saved.state.clone(), engine)?;
        machine.saved = Some(Box::new(LastSave { digest: saved.digest.clone(), pages: saved.pages.clone() }));
        Ok(machine)
    }
}

fn write_page(memory: &GuestMemory, page: u64, content: &[u8]) {
    memory
        .write_slice(content, GuestAddress(page * PAGE_SIZE))
        .expect("a machine with the same description has the same RAM");
}
