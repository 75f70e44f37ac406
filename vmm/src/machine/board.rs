//! The board: the devices, wired. Applies what they want done, holds virtual time and the event queue.
//! [`super::bus`] is how the vCPU reaches it.

use std::collections::VecDeque;
use std::sync::Arc;

use orrery_cpu::{Icount, Past};
use orrery_devices::GuestMemory;
use orrery_devices::lapic::MsrError;
use orrery_devices::{Context, CowDisk, Device, Effect, VirtualNs};
use orrery_devices::{acpi, layout};
use orrery_guest_image::Content;
use vm_memory::{Bytes, GuestAddress};

use super::MachineError;
use super::devices::Devices;
use super::state::BoardState;
use crate::config::{MachineConfig, Seed};
use crate::inputs::InputChannel;
use crate::queue::{DeviceId, EventQueue};
use crate::run::Ended;
use crate::time::Clock;

/// Bytes that left the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Instructions retired before.
    pub icount: Icount,
    /// Virtual time.
    pub time: VirtualNs,
    /// Which channel: "console", "agent".
    pub channel: &'static str,
    /// What was written.
    pub bytes: Vec<u8>,
}

/// Most bytes of output that are kept before the engine is stopped to have them taken.
const OUTPUT_BYTES_MAX: usize = 4096;

/// Everything of the machine but the vCPU.
pub struct Board {
    /// Guest RAM.
    pub memory: GuestMemory,
    pub(super) clock: Clock,
    pub(super) queue: EventQueue,
    pub(super) devices: Devices,
    /// The engine has been asked to stop when it accepts interrupts; a pending one need not stop it before.
    pub(super) window_requested: bool,
    /// Console input that the serial port has had no room for yet.
    backlog: VecDeque<u8>,
    /// Input for the agent that its device has had no room for yet.
    agent_backlog: VecDeque<u8>,
    effects: Vec<Effect>,
    output: Vec<Output>,
    /// Bytes in `output`.
    output_bytes: usize,
    output_line: bool,
    /// Output is wanted line by line: the engine stops after each.
    stop_on_output: bool,
    ended: Option<Ended>,
    attention: bool,
    touched_memory: bool,
    /// What is to be kept of RAM before a device writes to it.
    pub(super) past: Option<Arc<Past>>,
    /// Virtual time up to which the engine runs: an event due before it must stop the engine.
    run_bound: VirtualNs,
    /// The boundary at which things are happening, for stamps.
    icount: Icount,
}

impl Board {
    /// A board at power-on.
    pub(super) fn new(
        memory: GuestMemory,
        config: &MachineConfig,
        seed: Seed,
        disks: &[Content],
    ) -> Result<Board, MachineError> {
        let state = BoardState {
            clock: Clock::new(config.ns_per_instruction),
            queue: EventQueue::default(),
            devices: Devices::new(config, seed, disks)?,
            backlog: VecDeque::new(),
            agent_backlog: VecDeque::new(),
            ended: None,
        };
        Ok(Board::at(memory, state))
    }

    /// Puts the ACPI tables into RAM; returns the address of the root pointer.
    pub(super) fn write_firmware_tables(&mut self) -> Result<u64, MachineError> {
        let slots: Vec<u8> = (0..self.devices.virtio.len() as u8).collect();
        let tables = acpi::tables(&slots);
        let failed = |reason: String| MachineError::Devices { reason };
        if tables.len() as u64 > layout::ACPI_LEN {
            return Err(failed(format!("ACPI tables of {} bytes do not fit their place", tables.len())));
        }
        self.memory
            .write_slice(&tables, GuestAddress(layout::ACPI_START))
            .map_err(|e| failed(format!("ACPI tables: {e}")))?;
        Ok(layout::ACPI_START)
    }

    /// A board over `memory` in the state of a moment. Nothing has been written yet.
    pub(super) fn at(memory: GuestMemory, state: BoardState) -> Board {
        Board {
            devices: state.devices,
            memory,
            clock: state.clock,
            queue: state.queue,
            window_requested: false,
            backlog: state.backlog,
            agent_backlog: state.agent_backlog,
            effects: Vec::new(),
            output: Vec::new(),
            output_bytes: 0,
            output_line: false,
            stop_on_output: false,
            ended: state.ended,
            attention: false,
            touched_memory: false,
            past: None,
            run_bound: VirtualNs(0),
            icount: Icount(0),
        }
    }

    /// Copies what the board's future depends on. Output that waits belongs to the past.
    pub(super) fn state(&self) -> BoardState {
        BoardState {
            clock: self.clock.clone(),
            queue: self.queue.clone(),
            devices: self.devices.clone(),
            backlog: self.backlog.clone(),
            agent_backlog: self.agent_backlog.clone(),
            ended: self.ended.clone(),
        }
    }

    /// The engine is about to run until virtual time `bound`.
    pub(super) fn begin_run(&mut self, bound: VirtualNs, stop_on_output: bool) {
        self.run_bound = bound;
        self.stop_on_output = stop_on_output;
        self.attention = false;
    }

    /// True if something must be looked at before the next instruction.
    pub(super) fn wants_attention(&self) -> bool {
        self.attention
    }

    /// Output since the last call.
    pub(super) fn take_output(&mut self) -> Vec<Output> {
        self.output_line = false;
        self.output_bytes = 0;
        std::mem::take(&mut self.output)
    }

    /// True if a complete line, or a good deal, of output waits.
    pub(super) fn has_output_line(&self) -> bool {
        self.output_line
    }

    /// How the guest ended the run, if it did.
    pub(super) fn ended(&self) -> Option<Ended> {
        self.ended.clone()
    }

    /// True if devices may have written RAM since the last call.
    pub(super) fn devices_touched_memory(&mut self) -> bool {
        std::mem::take(&mut self.touched_memory)
    }

    /// To be called before a device that may write RAM does anything.
    pub(super) fn before_memory_access(&mut self) {
        // Where is known only afterwards.
        if let Some(past) = self.past.take() {
            past.keep_all();
        }
    }

    /// Lets bytes from outside enter.
    pub(super) fn input(&mut self, icount: Icount, channel: InputChannel, data: &[u8]) {
        self.icount = icount;
        match channel {
            InputChannel::Console => {
                self.backlog.extend(data);
                self.offer_input();
            }
            InputChannel::Agent => {
                self.agent_backlog.extend(data);
                self.offer_agent_input();
            }
        }
    }

    /// Gives waiting input to the agent's device, as far as it has room.
    pub(super) fn offer_agent_input(&mut self) {
        if self.agent_backlog.is_empty() {
            return;
        }
        self.before_memory_access();
        let now = self.clock.now(self.icount);
        for slot in 0..self.devices.virtio.len() {
            let mut ctx = Context { now, memory: &self.memory, effects: &mut self.effects };
            let data = self.agent_backlog.make_contiguous();
            if let Some(taken) = self.devices.virtio[slot].agent_input(&mut ctx, data) {
                self.agent_backlog.drain(..taken.min(self.agent_backlog.len()));
                self.touched_memory |= taken > 0;
                self.attention |= taken > 0;
                self.apply(Devices::virtio(slot as u8));
                return;
            }
        }
    }

    /// Gives waiting console input to the serial port, as far as it has room.
    pub(super) fn offer_input(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        let now = self.clock.now(self.icount);
        let mut ctx = Context { now, memory: &self.memory, effects: &mut self.effects };
        let taken = self.devices.serial.input(&mut ctx, self.backlog.make_contiguous());
        self.backlog.drain(..taken.min(self.backlog.len()));
        self.apply(Devices::SERIAL);
    }

    /// Delivers every event due at this boundary.
    pub(super) fn deliver_events(&mut self, icount: Icount) {
        self.icount = icount;
        let now = self.clock.now(icount);
        while let Some(event) = self.queue.pop_due(now) {
            if Devices::is_virtio(event.device) {
                self.before_memory_access();
                self.touched_memory = true;
            }
            self.access(icount, event.device, |device, ctx| device.event(ctx, event.token));
            if event.device == Devices::SERIAL {
                self.offer_input();
            }
        }
    }

    /// True if the local APIC has an interrupt above the processor's priority.
    #[inline]
    pub(super) fn interrupt_pending(&self) -> bool {
        self.devices.lapic.interrupt().is_some()
    }

    /// An NMI waits for the vCPU.
    pub(super) fn nmi_pending(&self) -> bool {
        self.devices.lapic.nmi_pending()
    }

    /// The vCPU takes the NMI.
    pub(super) fn acknowledge_nmi(&mut self) {
        self.devices.lapic.acknowledge_nmi();
    }

    /// Takes the interrupt that is pending.
    pub(super) fn acknowledge_interrupt(&mut self) -> u8 {
        self.devices.lapic.acknowledge()
    }

    /// Calls a device and applies what it wants done.
    #[inline]
    pub(super) fn access(&mut self, icount: Icount, id: DeviceId, call: impl FnOnce(&mut dyn Device, &mut Context)) {
        self.icount = icount;
        let now = self.clock.now(icount);
        let mut ctx = Context { now, memory: &self.memory, effects: &mut self.effects };
        let Some(device) = self.devices.get_mut(id) else { return };
        call(device, &mut ctx);
        self.apply(id);
    }

    /// WRMSR to one of the local APIC's registers.
    pub(super) fn write_lapic_msr(&mut self, icount: Icount, msr: u32, value: u64) -> Result<(), MsrError> {
        self.icount = icount;
        let now = self.clock.now(icount);
        let mut ctx = Context { now, memory: &self.memory, effects: &mut self.effects };
        let result = self.devices.lapic.msr_write(&mut ctx, msr, value);
        self.apply(Devices::LAPIC);
        result
    }

    /// Looks whether an interrupt has become deliverable.
    #[inline]
    pub(super) fn note_interrupts(&mut self) {
        self.attention |= !self.window_requested && self.interrupt_pending() || self.nmi_pending();
    }

    /// Applies the effects that `origin` has left, in order; the interrupt controllers may add to them.
    pub(super) fn apply(&mut self, origin: DeviceId) {
        let mut pending: VecDeque<(DeviceId, Effect)> = VecDeque::new();
        pending.extend(self.effects.drain(..).map(|effect| (origin, effect)));
        let now = self.clock.now(self.icount);
        while let Some((source, effect)) = pending.pop_front() {
            let mut ctx = Context { now, memory: &self.memory, effects: &mut self.effects };
            let mut speaker = source;
            match effect {
                Effect::Line { gsi, level } => {
                    self.devices.ioapic.set_line(&mut ctx, gsi, level);
                    speaker = Devices::IOAPIC;
                }
                Effect::Interrupt { vector, level_triggered } => {
                    self.devices.lapic.set_irq(vector, level_triggered);
                    speaker = Devices::LAPIC;
                }
                Effect::EndOfInterrupt { vector } => {
                    self.devices.ioapic.end_of_interrupt(&mut ctx, vector);
                    speaker = Devices::IOAPIC;
                }
                Effect::Wake { token, at } => {
                    self.queue.schedule(source, token, at);
                    self.attention |= at < self.run_bound;
                }
                Effect::Cancel { token } => self.queue.cancel(source, token),
                Effect::Output { channel, bytes } => self.write_output(now, channel, bytes),
                Effect::PowerOff { code } => self.end(Ended::PowerOff { code }),
                Effect::Reset => self.end(Ended::Reset),
            }
            pending.extend(self.effects.drain(..).map(|effect| (speaker, effect)));
        }
        self.note_interrupts();
    }

    /// The first request to end counts.
    fn end(&mut self, ended: Ended) {
        self.ended.get_or_insert(ended);
        self.attention = true;
    }

    fn write_output(&mut self, time: VirtualNs, channel: &'static str, bytes: Vec<u8>) {
        self.output_bytes += bytes.len();
        if bytes.contains(&b'\n') || self.output_bytes > OUTPUT_BYTES_MAX {
            self.output_line = true;
            self.attention |= self.stop_on_output;
        }
        match self.output.last_mut() {
            Some(last) if last.channel == channel && !last.bytes.ends_with(b"\n") => last.bytes.extend(bytes),
            _ => self.output.push(Output { icount: self.icount, time, channel, bytes }),
        }
    }

    /// A virtio device has been told to work: it may have written RAM, which the engine must learn of.
    pub(super) fn note_virtio_access(&mut self) {
        self.touched_memory = true;
        self.attention = true;
    }

    /// The disks, in the image's order.
    pub fn disks(&self) -> impl Iterator<Item = &CowDisk> {
        self.devices.virtio.iter().filter_map(super::virtio::VirtioSlot::disk)
    }

    /// Every part's name and serialised state, in a fixed order: what a snapshot holds of the board.
    pub fn device_states(&self) -> Vec<(&'static str, Vec<u8>)> {
        let mut states = vec![
            ("clock", encode(&self.clock)),
            ("event queue", encode(&self.queue)),
            ("console backlog", encode(&self.backlog)),
            ("agent backlog", encode(&self.agent_backlog)),
        ];
        states.extend(self.devices.states());
        states
    }
}

/// postcard's encoding of a plain value.
pub(super) fn encode<T: serde::Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("device states are plain data")
}
