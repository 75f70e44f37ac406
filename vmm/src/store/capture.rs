//! What a snapshot takes from a machine.

use orrery_cpu::Icount;
use orrery_devices::VirtualNs;
use orrery_devices::disk::CowDisk;

use super::error::SnapshotError;
use super::layer::{RAM, Space};
use crate::chain::Hash;
use crate::digest::MemoryDigest;
use crate::machine::Machine;
use crate::machine::hashing::{HashWork, Hashed, Wanted};
use crate::machine::state::MachineState;

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

/// A moment taken down for a capture, without RAM: the guest may go on.
pub(crate) struct CaptureStart {
    state: MachineState,
    seed: u64,
    disks: Vec<CowDisk>,
    /// The disks of the capture that it builds on.
    base: Vec<CowDisk>,
}

impl CaptureStart {
    /// Begins a capture of what has changed since `base` (or since power-on). `contents` is the memory of an earlier
    /// one: fresh memory from the host costs as much as the copy.
    pub fn new(
        machine: &mut Machine,
        base: Option<&CaptureBase>,
        contents: Vec<u8>,
    ) -> Result<(CaptureStart, HashWork), SnapshotError> {
        if !machine.at_moment() {
            return Err(SnapshotError::NotAMoment(machine.icount()));
        }
        let wanted = Wanted { base: base.map(|base| base.digest.clone()), contents };
        let work = machine.begin_hash(Some(wanted));
        let start = CaptureStart {
            state: machine.state(),
            seed: machine.seed().0,
            disks: machine.board().disks().cloned().collect(),
            base: base.map(|base| base.disks.clone()).unwrap_or_default(),
        };
        Ok((start, work))
    }

    /// What the next capture builds on, once RAM was hashed.
    pub fn base(&self, hashed: &Hashed) -> CaptureBase {
        CaptureBase { digest: hashed.digest.clone(), disks: self.disks.clone() }
    }

    /// Puts the parts together.
    pub fn finish(self, hashed: Hashed) -> Capture {
        let Hashed { state_hash, digest, changed, mut contents, .. } = hashed;
        let mut changed: Vec<Changed> =
            changed.into_iter().map(|(page, hash)| Changed { space: RAM, page, hash }).collect();
        for (index, disk) in self.disks.iter().enumerate() {
            let before = self.base.get(index).map(CowDisk::overlay);
            for (page, bytes) in disk.overlay() {
                let bytes = bytes.bytes();
                if before.and_then(|before| before.get(page)).is_some_and(|old| std::ptr::eq(old.bytes(), bytes)) {
                    continue;
                }
                // A page of zeros, too: over a base that is not, it must be in the table.
                let hash = Hash(*blake3::hash(bytes).as_bytes());
                contents.extend_from_slice(bytes);
                changed.push(Changed { space: index as Space + 1, page: *page, hash });
            }
        }
        Capture {
            icount: self.state.icount(),
            time: self.state.time(),
            inputs_entered: self.state.inputs_entered(),
            seed: self.seed,
            state_hash,
            memory: digest.value(),
            state: self.state.encode(),
            changed,
            contents,
        }
    }
}

impl Capture {
    /// Copies what has changed since `base` (or since power-on) and everything beside RAM. Gives the next base.
    pub fn take(machine: &mut Machine, base: Option<&CaptureBase>) -> Result<(Capture, CaptureBase), SnapshotError> {
        let (start, work) = CaptureStart::new(machine, base, Vec::new())?;
        work.run();
        let hashed = machine.take_hashed(true).expect("the work is done");
        let base = start.base(&hashed);
        Ok((start.finish(hashed), base))
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
