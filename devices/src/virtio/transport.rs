//! The memory-mapped transport (virtio 1.2, 4.2), version 2.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::queue::{QueueError, Virtqueue};
use crate::{Context, Device, Effect, answer, layout, value_of};

/// VIRTIO_F_RING_INDIRECT_DESC (virtio 1.2, 6).
const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_VERSION_1.
const F_VERSION_1: u64 = 1 << 32;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"ORRY");
const CONFIG: u64 = 0x100;

mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00C;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const DESCRIPTORS_LOW: u64 = 0x080;
    pub const DESCRIPTORS_HIGH: u64 = 0x084;
    pub const DRIVER_LOW: u64 = 0x090;
    pub const DRIVER_HIGH: u64 = 0x094;
    pub const DEVICE_LOW: u64 = 0x0A0;
    pub const DEVICE_HIGH: u64 = 0x0A4;
    pub const SHARED_MEMORY_FIRST: u64 = 0x0B0;
    pub const SHARED_MEMORY_LAST: u64 = 0x0BC;
    pub const CONFIG_GENERATION: u64 = 0x0FC;
}

mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const DEVICE_NEEDS_RESET: u8 = 64;
}

mod interrupt {
    pub const USED_BUFFER: u32 = 1;
    pub const CONFIGURATION: u32 = 2;
}

/// The virtqueues of a device during a call, and whether the driver is to be told.
pub struct Queues<'a> {
    queues: &'a mut [Virtqueue],
    interrupt: bool,
}

impl Queues<'_> {
    /// Takes the next available chain of a queue.
    pub fn pop(&mut self, ctx: &Context, queue: u16) -> Result<Option<super::queue::Chain>, QueueError> {
        match self.queues.get_mut(usize::from(queue)) {
            Some(queue) => queue.pop(ctx.memory),
            None => Ok(None),
        }
    }

    /// Gives a chain back with the number of bytes written, and interrupts the driver unless it wants none.
    pub fn push_used(&mut self, ctx: &Context, queue: u16, head: u16, len: u32) -> Result<(), QueueError> {
        let queue = self.queues.get_mut(usize::from(queue)).ok_or(QueueError::Ring)?;
        queue.push_used(ctx.memory, head, len)?;
        self.interrupt |= queue.wants_interrupt(ctx.memory);
        Ok(())
    }

    /// Number of descriptors of a queue.
    pub fn size(&self, queue: u16) -> u16 {
        self.queues.get(usize::from(queue)).map_or(0, Virtqueue::size)
    }
}

/// What makes a transport a disk, a network card and so on.
pub trait VirtioDevice {
    /// Virtio device ID (virtio 1.2, 5).
    fn id(&self) -> u32;
    /// Feature bits 0 to 23 of this kind of device; the transport adds its own.
    fn features(&self) -> u64;
    /// Largest size of each virtqueue, powers of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// The configuration structure.
    fn config(&self) -> Vec<u8>;
    /// The driver has made chains available in `queue`.
    fn notify(&mut self, ctx: &mut Context, queues: &mut Queues, queue: u16) -> Result<(), QueueError>;
    /// A wake-up that the device asked for is due.
    fn event(&mut self, ctx: &mut Context, queues: &mut Queues, token: u32) -> Result<(), QueueError>;
    /// The driver has reset the device: what is pending is forgotten, and its wake-ups taken back.
    fn reset(&mut self, ctx: &mut Context);
    /// Gives the device's random numbers another seed.
    fn rekey(&mut self, seed: u64);
}

/// A virtio device with its registers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VirtioMmio<T> {
    slot: u8,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: u8,
    interrupt_status: u32,
    line: bool,
    queues: Vec<Virtqueue>,
    device: T,
}

impl<T: VirtioDevice> VirtioMmio<T> {
    /// Puts a device into the window and on the interrupt of `slot`, see [`layout::virtio_window`].
    ///
    /// # Panics
    ///
    /// If there is no such slot.
    pub fn new(slot: u8, device: T) -> VirtioMmio<T> {
        assert!(slot < layout::VIRTIO_SLOTS_MAX, "virtio slot {slot} does not exist");
        let queues = device.queue_sizes().iter().map(|size| Virtqueue::new(*size)).collect();
        VirtioMmio {
            slot,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            interrupt_status: 0,
            line: false,
            queues,
            device,
        }
    }

    /// Which window and interrupt.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// The device behind the transport.
    pub fn device(&self) -> &T {
        &self.device
    }

    /// The device behind the transport, to attach its disk or seed after it was restored.
    pub fn device_mut(&mut self) -> &mut T {
        &mut self.device
    }

    /// Gives the device's random numbers another seed.
    pub fn rekey(&mut self, seed: u64) {
        self.device.rekey(seed);
    }

    /// True while the driver runs the device.
    pub fn driver_ready(&self) -> bool {
        self.status & (status::DRIVER_OK | status::DEVICE_NEEDS_RESET) == status::DRIVER_OK
    }

    /// Lets the device work on its queues, and settles what comes of it. Nothing happens while no driver runs it.
    pub(super) fn work<R: Default>(
        &mut self,
        ctx: &mut Context,
        work: impl FnOnce(&mut T, &mut Context, &mut Queues) -> Result<R, QueueError>,
    ) -> R {
        if !self.driver_ready() {
            return R::default();
        }
        let mut queues = Queues { queues: &mut self.queues, interrupt: false };
        let result = work(&mut self.device, ctx, &mut queues);
        if queues.interrupt {
            self.interrupt_status |= interrupt::USED_BUFFER;
        }
        let answer = result.unwrap_or_else(|_| {
            self.needs_reset();
            R::default()
        });
        self.update_line(ctx);
        answer
    }

    /// The driver has broken the rules: the device stops until it is reset (virtio 1.2, 2.1.2).
    fn needs_reset(&mut self) {
        self.status |= status::DEVICE_NEEDS_RESET;
        if self.status & status::DRIVER_OK != 0 {
            self.interrupt_status |= interrupt::CONFIGURATION;
        }
    }

    fn update_line(&mut self, ctx: &mut Context) {
        let level = self.interrupt_status != 0;
        if level != self.line {
            self.line = level;
            ctx.effects.push(Effect::Line { gsi: layout::virtio_gsi(self.slot), level });
        }
    }

    fn features(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_INDIRECT_DESC
    }

    fn reset(&mut self, ctx: &mut Context) {
        self.device.reset(ctx);
        self.queues.iter_mut().for_each(|queue| queue.registers().reset());
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.status = 0;
        self.interrupt_status = 0;
        self.update_line(ctx);
    }

    fn write_status(&mut self, ctx: &mut Context, value: u32) {
        if value == 0 {
            return self.reset(ctx);
        }
        let mut value = value as u8 & !status::DEVICE_NEEDS_RESET | self.status;
        let acceptable = self.driver_features & !self.features() == 0 && self.driver_features & F_VERSION_1 != 0;
        if self.status & status::FEATURES_OK == 0 && !acceptable {
            // The driver reads back that its choice of features is refused.
            value &= !status::FEATURES_OK;
        }
        self.status = value;
    }

    fn queue(&mut self) -> Option<&mut Virtqueue> {
        self.queues.get_mut(self.queue_select as usize)
    }

    fn write_queue_ready(&mut self, ctx: &mut Context, ready: bool) {
        let Some(queue) = self.queue() else { return };
        queue.registers().set_ready(ready);
        if ready && !queue.valid(ctx.memory) {
            queue.registers().set_ready(false);
            self.needs_reset();
        }
    }

    /// Queues may be set up only before they are enabled.
    fn write_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queue().filter(|queue| !queue.ready()) else { return };
        let queue = queue.registers();
        match offset {
            // A size that is not allowed is ignored.
            register::QUEUE_SIZE => queue.set_size(u16::try_from(value).unwrap_or(0)),
            register::DESCRIPTORS_LOW => queue.set_desc_table_address(Some(value), None),
            register::DESCRIPTORS_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        let half = |word: u64, select: u32| match select {
            0 => word as u32,
            1 => (word >> 32) as u32,
            _ => 0,
        };
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.id(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.features(), self.device_features_select),
            register::QUEUE_SIZE_MAX => self.queue().map_or(0, |queue| u32::from(queue.registers().max_size())),
            register::QUEUE_READY => self.queue().map_or(0, |queue| u32::from(queue.ready())),
            register::INTERRUPT_STATUS => self.interrupt_status,
            register::STATUS => u32::from(self.status),
            // No shared memory regions: length and base read as all ones (4.2.2).
            register::SHARED_MEMORY_FIRST..=register::SHARED_MEMORY_LAST => u32::MAX,
            // The configuration never changes behind the driver's back.
            register::CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    fn write_register(&mut self, ctx: &mut Context, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SELECT => self.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            register::DRIVER_FEATURES if self.status & status::FEATURES_OK == 0 => {
                let word = &mut self.driver_features;
                match self.driver_features_select {
                    0 => *word = *word & !0xFFFF_FFFF | u64::from(value),
                    1 => *word = *word & 0xFFFF_FFFF | u64::from(value) << 32,
                    _ => {}
                }
            }
            register::QUEUE_SELECT => self.queue_select = value,
            register::QUEUE_READY => self.write_queue_ready(ctx, value & 1 == 1),
            register::QUEUE_NOTIFY => {
                if let Ok(queue) = u16::try_from(value) {
                    self.work(ctx, |device, ctx, queues| device.notify(ctx, queues, queue));
                }
            }
            register::INTERRUPT_ACKNOWLEDGE => self.interrupt_status &= !value,
            register::STATUS => self.write_status(ctx, value),
            _ => self.write_queue(offset, value),
        }
        self.update_line(ctx);
    }
}

impl<T: VirtioDevice> Device for VirtioMmio<T> {
    fn read(&mut self, _ctx: &mut Context, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            let config = self.device.config();
            let start = usize::try_from(offset - CONFIG).unwrap_or(usize::MAX);
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = start.checked_add(index).and_then(|at| config.get(at)).copied().unwrap_or(0);
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            answer(data, u64::from(self.read_register(offset)));
        } else {
            // Registers are 32 bits wide, aligned (4.2.2.2).
            data.fill(0);
        }
    }

    fn write(&mut self, ctx: &mut Context, offset: u64, data: &[u8]) {
        // No device here has configuration that the driver may write.
        if offset < CONFIG && data.len() == 4 && offset.is_multiple_of(4) {
            self.write_register(ctx, offset, value_of(data) as u32);
        }
    }

    fn event(&mut self, ctx: &mut Context, token: u32) {
        self.work(ctx, |device, ctx, queues| device.event(ctx, queues, token));
    }
}
