//! The hash of the complete state: vCPU, devices, time, event queue, RAM.

use orrery_cpu::{CpuState, Icount};

use super::Board;
use crate::chain::{Hash, hash_cpu};
use crate::digest::Lanes;

/// Begins BLAKE3 over a fixed serialisation of everything that a snapshot would have to hold: all but RAM.
pub(super) fn begin(icount: Icount, cpu: &CpuState, board: &Board) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"orrery state 2");
    hasher.update(&icount.0.to_le_bytes());
    hasher.update(&board.clock.now(icount).0.to_le_bytes());
    hash_cpu(&mut hasher, cpu);
    for (name, state) in board.device_states() {
        hasher.update(name.as_bytes());
        hasher.update(&(state.len() as u64).to_le_bytes());
        hasher.update(&state);
    }
    hasher
}

/// Ends it with the digest of RAM.
pub(super) fn finish(mut hasher: blake3::Hasher, memory: Lanes) -> Hash {
    for lane in memory {
        hasher.update(&lane.to_le_bytes());
    }
    Hash(*hasher.finalize().as_bytes())
}
