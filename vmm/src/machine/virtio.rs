//! The virtio devices of a machine, in their slots.

use orrery_devices::Device;
use orrery_guest_image::Content;

use super::MachineError;
use crate::config::Seed;

/// One slot.
pub(super) struct VirtioSlot;

impl VirtioSlot {
    pub fn device(&mut self) -> &mut dyn Device { unreachable!() }
    pub fn name(&self) -> &'static str { "" }
    pub fn state(&self) -> Vec<u8> { Vec::new() }
}
pub(super) fn slots(_seed: Seed, _disks: &[Content]) -> Result<Vec<VirtioSlot>, MachineError> { Ok(Vec::new()) }
