//! The devices of a machine and their names.

use orrery_cpu::model::ModelFeatures;
use orrery_devices::lapic::LapicConfig;
use orrery_devices::{Cmos, CowDisk, Device, I8042, IoApic, Latency, LocalApic, Power, RandomStream, Serial};
use orrery_guest_image::Content;

use serde::{Deserialize, Serialize};

use super::MachineError;
use super::board::encode;
use super::virtio::VirtioSlot;
use crate::config::{MachineConfig, Seed};
use crate::queue::DeviceId;

/// Ticks of the TSC and of the APIC's bus clock per millisecond: one per nanosecond of virtual time.
pub(super) const TSC_KHZ: u32 = 1_000_000;

/// Everything with registers. A copy shares the disks' contents until one of the two writes.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Devices {
    pub lapic: LocalApic,
    pub ioapic: IoApic,
    pub serial: Serial,
    pub cmos: Cmos,
    pub i8042: I8042,
    pub power: Power,
    pub virtio: Vec<VirtioSlot>,
    /// The stream behind RDRAND and RDSEED.
    pub rdrand: RandomStream,
}

impl Devices {
    pub const LAPIC: DeviceId = DeviceId(0);
    pub const IOAPIC: DeviceId = DeviceId(1);
    pub const SERIAL: DeviceId = DeviceId(2);
    pub const CMOS: DeviceId = DeviceId(3);
    pub const I8042: DeviceId = DeviceId(4);
    pub const POWER: DeviceId = DeviceId(5);
    /// The virtio device in slot n is `VIRTIO + n`.
    const VIRTIO: u16 = 16;

    /// The device in a virtio slot.
    pub fn virtio(slot: u8) -> DeviceId {
        DeviceId(Devices::VIRTIO + u16::from(slot))
    }

    /// True for devices that may read and write RAM.
    pub fn is_virtio(id: DeviceId) -> bool {
        id.0 >= Devices::VIRTIO
    }

    /// The devices at power-on.
    pub fn new(config: &MachineConfig, seed: Seed, disks: &[Content]) -> Result<Devices, MachineError> {
        let timer_latency = Latency { base_ns: 0, jitter_ns: config.timer_jitter_ns };
        Ok(Devices {
            lapic: LocalApic::new(LapicConfig { tsc_khz: u64::from(TSC_KHZ), timer_latency }, seed.0),
            ioapic: IoApic::new(),
            serial: Serial::new(),
            cmos: Cmos::new(config.start_date),
            i8042: I8042::new(),
            power: Power::new(),
            virtio: super::virtio::slots(seed, disks)?,
            rdrand: RandomStream::new(seed.0, "rdrand"),
        })
    }

    /// The device of that name.
    pub fn get_mut(&mut self, id: DeviceId) -> Option<&mut dyn Device> {
        Some(match id {
            Devices::LAPIC => &mut self.lapic,
            Devices::IOAPIC => &mut self.ioapic,
            Devices::SERIAL => &mut self.serial,
            Devices::CMOS => &mut self.cmos,
            Devices::I8042 => &mut self.i8042,
            Devices::POWER => &mut self.power,
            DeviceId(number) => {
                let slot = number.checked_sub(Devices::VIRTIO)?;
                self.virtio.get_mut(usize::from(slot))?.device()
            }
        })
    }

    /// Keys every random stream with another seed, as a branch does at the moment at which it leaves its past.
    pub fn rekey(&mut self, seed: Seed) {
        self.lapic.rekey(seed.0);
        self.rdrand.rekey(seed.0);
        self.virtio.iter_mut().for_each(|slot| slot.rekey(seed));
    }

    /// True if the virtio devices are those of a machine, each in its slot.
    pub fn in_order(&self) -> bool {
        super::virtio::in_order(&self.virtio)
    }

    /// The disks, in their order.
    pub fn disks(&self) -> impl Iterator<Item = &CowDisk> {
        self.virtio.iter().filter_map(VirtioSlot::disk)
    }

    /// The disks, in their order.
    pub fn disks_mut(&mut self) -> impl Iterator<Item = &mut CowDisk> {
        self.virtio.iter_mut().filter_map(VirtioSlot::disk_mut)
    }

    /// Every device's name and serialised state.
    pub fn states(&self) -> Vec<(&'static str, Vec<u8>)> {
        let mut states = vec![
            ("local APIC", encode(&self.lapic)),
            ("I/O APIC", encode(&self.ioapic)),
            ("serial port", encode(&self.serial)),
            ("CMOS clock", encode(&self.cmos)),
            ("keyboard controller", encode(&self.i8042)),
            ("power", encode(&self.power)),
            ("rdrand", encode(&self.rdrand)),
        ];
        states.extend(self.virtio.iter().map(|slot| (slot.name(), slot.state())));
        states
    }
}

/// The CPU model's variable part.
pub(super) fn model_features(config: &MachineConfig) -> ModelFeatures {
    let crypto = config.crypto_extensions;
    ModelFeatures { aes: crypto, pclmulqdq: crypto, sha: crypto, tsc_khz: TSC_KHZ }
}
