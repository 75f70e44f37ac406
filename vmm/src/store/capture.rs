//! What a snapshot takes from a machine: the only part of a snapshot for which the guest waits.

use orrery_cpu::Icount;
use orrery_cpu::memory::PAGE_SIZE;
use orrery_devices::VirtualNs;
use orrery_devices::disk::CowDisk;

use super::error::SnapshotError;
use super::layer::{RAM, Space};
use super::pack::PAGE_BYTES;
use crate::chain::Hash;
use crate::digest::{MemoryDigest, read_page};
use crate::machine::Machine;
use crate::page_hash::{ZERO_PAGE, content_hash};

/// What the next capture of the same timeline builds on.
#[derive(Clone)]
pub struct CaptureBase {
    digest: MemoryDigest,
    disks: Vec<CowDisk>,
}

impl CaptureBase {
    /// A machine as it stands, whose pages are all in the store: after it was loaded from there.
    pub fn of(machine: &mut Machine) -> CaptureBase {
        machine.update_digest();
        let disks = machine.board().disks().cloned().collect();
        CaptureBase { digest: machine.memory_digest().clone(), disks }
    }
}

/// One page that has changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Changed {
    pub space: Space,
    pub page: u64,
    pub hash: Hash,
}

/// A moment of a machine, copied out of it.
pub struct Capture {
    pub(super) icount: Icount,
    pub(super) time: VirtualNs,
    pub(super) inputs_entered: u64,
    pub(super) seed: u64,
    pub(super) state_hash: Hash,
    pub(super) memory: [u64; 4],
    pub(super) state: Vec<u8>,
    /// Changed pages, ascending.
    pub(super) changed: Vec<Changed>,
    /// Contents of those that are not zeros, one after the other.
    pub(super) contents: Vec<u8>,
}

impl Capture {
    /// Copies what has changed since `base` (or since power-on) and everything beside RAM. Gives the next base.
    pub fn take(machine: &mut Machine, base: Option<&CaptureBase>) -> Result<(Capture, CaptureBase), SnapshotError> {
        Capture::take_into(Vec::new(), machine, base)
    }

    /// The same, with the memory of an earlier capture: fresh memory from the host costs as much as the copy.
    pub(crate) fn take_into(
        mut contents: Vec<u8>,
        machine: &mut Machine,
        base: Option<&CaptureBase>,
    ) -> Result<(Capture, CaptureBase), SnapshotError> {
        if !machine.at_moment() {
            return Err(SnapshotError::NotAMoment(machine.icount()));
        }
        let state_hash = machine.state_hash();
        let state = machine.state();
        let digest = machine.memory_digest().clone();
        let pages = match base {
            Some(base) => digest.differing_pages(&base.digest),
            None => digest.pages().map(|(page, _)| page).collect(),
        };
        let mut changed = Vec::with_capacity(pages.len());
        contents.clear();
        contents.reserve(pages.len() * PAGE_BYTES);
        let mut content = [0; PAGE_SIZE as usize];
        for page in pages {
            let hash = digest.hash_of(page).unwrap_or(ZERO_PAGE);
            if hash != ZERO_PAGE {
                read_page(&machine.board().memory, page, &mut content);
                contents.extend_from_slice(&content);
            }
            changed.push(Changed { space: RAM, page, hash });
        }
        let disks: Vec<CowDisk> = machine.board().disks().cloned().collect();
        for (index, disk) in disks.iter().enumerate() {
            let before = base.and_then(|base| base.disks.get(index)).map(CowDisk::overlay);
            for (page, bytes) in disk.overlay() {
                let bytes = bytes.bytes();
                if before.and_then(|before| before.get(page)).is_some_and(|old| std::ptr::eq(old.bytes(), bytes)) {
                    continue;
                }
                // A page of zeros over a base that is not must be in the table.
                let hash = match content_hash(bytes) {
                    ZERO_PAGE => Hash(*blake3::hash(bytes).as_bytes()),
                    hash => hash,
                };
                contents.extend_from_slice(bytes);
                changed.push(Changed { space: index as Space + 1, page: *page, hash });
            }
        }
        let capture = Capture {
            icount: state.icount(),
            time: state.time(),
            inputs_entered: state.inputs_entered(),
            seed: machine.seed().0,
            state_hash,
            memory: digest.value(),
            state: state.encode(),
            changed,
            contents,
        };
        Ok((capture, CaptureBase { digest, disks }))
    }

    /// Where it was taken.
    pub fn icount(&self) -> Icount {
        self.icount
    }

    /// The memory that it holds, to be used again.
    pub(crate) fn into_memory(self) -> Vec<u8> {
        self.contents
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.state.len() + self.contents.len()
    }
}
