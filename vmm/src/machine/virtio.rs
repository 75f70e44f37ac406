//! The virtio devices of a machine, in their slots: entropy, agent console, network card, then the disks.

use std::sync::Arc;

use orrery_devices::{Block, Console, Context, CowDisk, Device, Entropy, Latency, Net, VirtioMmio, layout};
use orrery_guest_image::Content;

use serde::{Deserialize, Serialize};

use super::MachineError;
use super::board::encode;
use crate::config::Seed;

/// How long a disk takes for a request: a fast solid-state drive.
const DISK_LATENCY: Latency = Latency { base_ns: 20_000, jitter_ns: 20_000 };
/// Address of the network card: locally administered.
const MAC: [u8; 6] = [0x02, b'o', b'r', b'r', 0, 1];
/// Slots before the first disk.
const FIXED_SLOTS: usize = 3;

/// One slot.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) enum VirtioSlot {
    Entropy(Box<VirtioMmio<Entropy>>),
    Agent(VirtioMmio<Console>),
    Net(VirtioMmio<Net>),
    Disk(Box<VirtioMmio<Block>>),
}

impl VirtioSlot {
    /// The device with its registers.
    pub fn device(&mut self) -> &mut dyn Device {
        match self {
            VirtioSlot::Entropy(device) => device.as_mut(),
            VirtioSlot::Agent(device) => device,
            VirtioSlot::Net(device) => device,
            VirtioSlot::Disk(device) => device.as_mut(),
        }
    }

    /// What it is, for people and for the state's hash.
    pub fn name(&self) -> &'static str {
        match self {
            VirtioSlot::Entropy(_) => "virtio entropy",
            VirtioSlot::Agent(_) => "virtio console",
            VirtioSlot::Net(_) => "virtio net",
            VirtioSlot::Disk(_) => "virtio block",
        }
    }

    /// Its number, which says where its registers and its interrupt are.
    pub fn number(&self) -> u8 {
        match self {
            VirtioSlot::Entropy(device) => device.slot(),
            VirtioSlot::Agent(device) => device.slot(),
            VirtioSlot::Net(device) => device.slot(),
            VirtioSlot::Disk(device) => device.slot(),
        }
    }

    /// The disk behind it, if it is one.
    pub fn disk(&self) -> Option<&CowDisk> {
        match self {
            VirtioSlot::Disk(device) => Some(device.device().disk()),
            _ => None,
        }
    }

    /// The disk behind it, if it is one.
    pub fn disk_mut(&mut self) -> Option<&mut CowDisk> {
        match self {
            VirtioSlot::Disk(device) => Some(device.device_mut().disk_mut()),
            _ => None,
        }
    }

    /// Gives the device's random numbers another seed.
    pub fn rekey(&mut self, seed: Seed) {
        match self {
            VirtioSlot::Entropy(device) => device.rekey(seed.0),
            VirtioSlot::Agent(device) => device.rekey(seed.0),
            VirtioSlot::Net(device) => device.rekey(seed.0),
            VirtioSlot::Disk(device) => device.rekey(seed.0),
        }
    }

    /// Its serialised state.
    pub fn state(&self) -> Vec<u8> {
        match self {
            VirtioSlot::Entropy(device) => encode(device),
            VirtioSlot::Agent(device) => encode(device),
            VirtioSlot::Net(device) => encode(device),
            VirtioSlot::Disk(device) => encode(device),
        }
    }

    /// Bytes for the guest's agent: how many were taken, if this is its channel.
    pub fn agent_input(&mut self, ctx: &mut Context, data: &[u8]) -> Option<usize> {
        match self {
            VirtioSlot::Agent(device) => Some(device.agent_input(ctx, data)),
            _ => None,
        }
    }
}

/// The devices at power-on.
pub(super) fn slots(seed: Seed, disks: &[Content]) -> Result<Vec<VirtioSlot>, MachineError> {
    let most = usize::from(layout::VIRTIO_SLOTS_MAX) - FIXED_SLOTS;
    if disks.len() > most {
        let reason = format!("the image has {} disks and a machine has room for {most}", disks.len());
        return Err(MachineError::Devices { reason });
    }
    let mut slots = vec![
        VirtioSlot::Entropy(Box::new(VirtioMmio::new(0, Entropy::new(seed.0)))),
        VirtioSlot::Agent(VirtioMmio::new(1, Console::new())),
        VirtioSlot::Net(VirtioMmio::new(2, Net::new(MAC))),
    ];
    for (index, disk) in disks.iter().enumerate() {
        let slot = (FIXED_SLOTS + index) as u8;
        let disk = CowDisk::new(Arc::new(disk.clone()), false);
        let block = Block::new(disk, &format!("disk{index}"), DISK_LATENCY, seed.0);
        slots.push(VirtioSlot::Disk(Box::new(VirtioMmio::new(slot, block))));
    }
    Ok(slots)
}

/// True if these are the devices of a machine, each in its slot.
pub(super) fn in_order(slots: &[VirtioSlot]) -> bool {
    let kinds = slots.iter().enumerate().all(|(index, slot)| {
        let kind = match slot {
            VirtioSlot::Entropy(_) => index == 0,
            VirtioSlot::Agent(_) => index == 1,
            VirtioSlot::Net(_) => index == 2,
            VirtioSlot::Disk(_) => index >= FIXED_SLOTS,
        };
        kind && usize::from(slot.number()) == index
    });
    kinds && (FIXED_SLOTS..=usize::from(layout::VIRTIO_SLOTS_MAX)).contains(&slots.len())
}
