//! The local APIC of the one vCPU (Intel SDM volume 3, chapter 11): xAPIC window, x2APIC MSRs, timer.
//!
//! [`LocalApic`] is a [`Device`] for its 4 KiB window; the MSRs come through [`LocalApic::msr_read`] and
//! [`LocalApic::msr_write`]. The machine asks [`LocalApic::interrupt`] for the vector to deliver and takes it
//! with [`LocalApic::acknowledge`]. `registers` decodes accesses, `timer` counts.
//!
//! An NMI that the processor sends itself waits in [`LocalApic::nmi_pending`]; two that meet there are one.
//!
//! Left out, since one vCPU and no legacy controller make them unobservable: INIT and start-up IPIs, ExtINT through
//! LINT0, NMIs through LINT1, performance and thermal interrupts, and moving the window (refused with #GP).

mod registers;
mod timer;

use serde::{Deserialize, Serialize};

use crate::{Context, Device, Effect, Latency, RandomStream, answer, layout, value_of};

pub use registers::MsrError;
pub use timer::TIMER_TOKEN;
use timer::Timer;

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1B;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6E0;
/// First of the x2APIC MSRs.
pub const MSR_X2APIC_FIRST: u32 = 0x800;
/// Last of the x2APIC MSRs.
pub const MSR_X2APIC_LAST: u32 = 0x8FF;

/// Bits of IA32_APIC_BASE.
mod base {
    pub const BSP: u64 = 1 << 8;
    pub const EXTD: u64 = 1 << 10;
    pub const ENABLE: u64 = 1 << 11;
}

const SVR_SOFTWARE_ENABLE: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;

/// A local vector table entry, by its place in [`LocalApic::lvt`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lvt {
    Timer = 0,
    Thermal = 1,
    Performance = 2,
    Lint0 = 3,
    Lint1 = 4,
    Error = 5,
}

/// A 256-bit register: one bit per vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Vectors([u32; 8]);

impl Vectors {
    fn set(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }

    fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] &= !(1 << (vector & 31));
    }

    fn get(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] >> (vector & 31) & 1 == 1
    }

    fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|word| *word != 0)?;
        Some((word as u8) << 5 | (31 - self.0[word].leading_zeros()) as u8)
    }
}

/// What the machine's description says about the local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicConfig {
    /// TSC ticks per millisecond: the unit of IA32_TSC_DEADLINE.
    pub tsc_khz: u64,
    /// What each expiry of the timer takes on top of the time programmed.
    pub timer_latency: Latency,
}

impl Default for LapicConfig {
    /// A TSC that ticks once per nanosecond, no delay.
    fn default() -> LapicConfig {
        LapicConfig { tsc_khz: 1_000_000, timer_latency: Latency::default() }
    }
}

/// The local APIC, ID 0, of the bootstrap processor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LocalApic {
    apic_base: u64,
    task_priority: u8,
    logical_destination: u32,
    destination_format: u32,
    spurious: u32,
    irr: Vectors,
    isr: Vectors,
    tmr: Vectors,
    error_status: u32,
    /// Errors since the last write to the ESR; a write moves them there.
    error_pending: u32,
    interrupt_command: u64,
    lvt: [u32; 6],
    timer: Timer,
    nmi_pending: bool,
}

impl LocalApic {
    /// A local APIC at power-on, enabled in xAPIC mode, its timer's delays drawn under `seed`.
    pub fn new(config: LapicConfig, seed: u64) -> LocalApic {
        LocalApic {
            apic_base: layout::LAPIC_START | base::BSP | base::ENABLE,
            task_priority: 0,
            logical_destination: 0,
            destination_format: u32::MAX,
            spurious: 0xFF,
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            error_status: 0,
            error_pending: 0,
            interrupt_command: 0,
            lvt: [LVT_MASKED; 6],
            timer: Timer::new(config, RandomStream::new(seed, "lapic timer")),
            nmi_pending: false,
        }
    }

    /// An NMI waits for the processor to take it.
    pub fn nmi_pending(&self) -> bool {
        self.nmi_pending
    }

    /// The processor takes the NMI.
    pub fn acknowledge_nmi(&mut self) {
        self.nmi_pending = false;
    }

    /// Gives the timer's delays another seed.
    pub fn rekey(&mut self, seed: u64) {
        self.timer.rekey(seed);
    }

    /// The highest vector that is above the processor priority, if any: what to deliver next.
    pub fn interrupt(&self) -> Option<u8> {
        if !self.enabled() {
            return None;
        }
        self.irr.highest().filter(|vector| vector >> 4 > self.processor_priority() >> 4)
    }

    /// Takes the vector of [`LocalApic::interrupt`] into service. Without one, the spurious vector.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(vector) = self.interrupt() else {
            return self.spurious as u8;
        };
        self.irr.clear(vector);
        self.isr.set(vector);
        vector
    }

    /// An interrupt message with this vector arrives. Vectors below 16 are errors.
    pub fn set_irq(&mut self, vector: u8, level_triggered: bool) {
        if !self.software_enabled() {
            return;
        }
        if vector < 16 {
            self.error(ESR_RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        self.irr.set(vector);
        if level_triggered {
            self.tmr.set(vector);
        } else {
            self.tmr.clear(vector);
        }
    }

    /// CR8: bits 7:4 of the task priority.
    pub fn task_priority(&self) -> u8 {
        self.task_priority >> 4
    }

    /// MOV to CR8.
    pub fn set_task_priority(&mut self, value: u8) {
        self.task_priority = (value & 0xF) << 4;
    }

    /// When the timer is due, in nanoseconds of virtual time; the same time has been asked for with
    /// [`Effect::Wake`].
    pub fn next_timer_ns(&self) -> Option<u64> {
        self.timer.due_ns()
    }

    fn enabled(&self) -> bool {
        self.apic_base & base::ENABLE != 0
    }

    fn x2apic(&self) -> bool {
        self.apic_base & base::EXTD != 0
    }

    fn software_enabled(&self) -> bool {
        self.enabled() && self.spurious & SVR_SOFTWARE_ENABLE != 0
    }

    /// PPR (SDM 11.8.3.1).
    fn processor_priority(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xF0;
        if self.task_priority & 0xF0 >= in_service { self.task_priority } else { in_service }
    }

    fn end_of_interrupt(&mut self, ctx: &mut Context) {
        let Some(vector) = self.isr.highest() else { return };
        self.isr.clear(vector);
        if self.tmr.get(vector) {
            ctx.effects.push(Effect::EndOfInterrupt { vector });
        }
    }

    fn error(&mut self, bit: u32) {
        self.error_pending |= bit;
        let entry = self.lvt[Lvt::Error as usize];
        // An error vector below 16 is itself an error, which is already being reported.
        if entry & LVT_MASKED == 0 && entry as u8 >= 16 {
            self.set_irq(entry as u8, false);
        }
    }

    /// The effect of a write to the interrupt command register (SDM 11.6.1). There is one processor, so only
    /// fixed and lowest-priority interrupts and NMIs that include the sender do anything. A shorthand that includes
    /// the sender is not valid for NMIs (SDM table 11-3).
    fn send(&mut self, destination: u32, command: u32) {
        let vector = command as u8;
        const NMI: u32 = 4;
        let mode = command >> 8 & 7;
        let fixed = matches!(mode, 0 | 1);
        let to_self = match command >> 18 & 3 {
            0 => self.is_destination(destination, command >> 11 & 1 == 1),
            1 | 2 => true,
            _ => false,
        };
        if mode == NMI && to_self && command >> 18 & 3 == 0 {
            self.nmi_pending = true;
        }
        if !fixed || !to_self {
            return;
        }
        if vector < 16 {
            self.error(ESR_SEND_ILLEGAL_VECTOR);
        } else {
            self.set_irq(vector, false);
        }
    }

    fn is_destination(&self, destination: u32, logical: bool) -> bool {
        match (self.x2apic(), logical) {
            (true, false) => destination == 0 || destination == u32::MAX,
            // Cluster 0, member 0 (SDM 11.12.10.2).
            (true, true) => destination == u32::MAX || (destination >> 16 == 0 && destination & 1 == 1),
            (false, false) => destination == 0 || destination == 0xFF,
            (false, true) => {
                let (destination, own) = (destination as u8, (self.logical_destination >> 24) as u8);
                if self.destination_format >> 28 == 0xF {
                    destination & own != 0
                } else {
                    destination == 0xFF || (destination >> 4 == own >> 4 && destination & own & 0xF != 0)
                }
            }
        }
    }

    fn reset(&mut self, ctx: &mut Context) {
        self.task_priority = 0;
        self.logical_destination = 0;
        self.destination_format = u32::MAX;
        self.spurious = 0xFF;
        self.irr = Vectors::default();
        self.isr = Vectors::default();
        self.tmr = Vectors::default();
        self.error_status = 0;
        self.error_pending = 0;
        self.interrupt_command = 0;
        self.lvt = [LVT_MASKED; 6];
        self.timer.reset(ctx);
    }
}

impl Device for LocalApic {
    /// The xAPIC window. Registers are 32 bits wide on 16-byte boundaries (SDM 11.4.1); narrower reads see
    /// part of one.
    fn read(&mut self, ctx: &mut Context, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        let within = (offset & 0xF) as usize;
        if !self.enabled() || self.x2apic() || offset >= layout::LAPIC_LEN || within + data.len() > 4 {
            return;
        }
        let value = self.read_register((offset >> 4) as u32, ctx.now).unwrap_or(0);
        answer(data, u64::from(value) >> (8 * within));
    }

    fn write(&mut self, ctx: &mut Context, offset: u64, data: &[u8]) {
        if !self.enabled() || self.x2apic() || offset >= layout::LAPIC_LEN || offset & 0xF != 0 || data.len() != 4 {
            return;
        }
        self.write_register(ctx, (offset >> 4) as u32, value_of(data) as u32);
    }

    fn event(&mut self, ctx: &mut Context, token: u32) {
        if token == TIMER_TOKEN && self.timer.expire(ctx, self.lvt[Lvt::Timer as usize]) {
            let entry = self.lvt[Lvt::Timer as usize];
            if entry & LVT_MASKED == 0 {
                self.set_irq(entry as u8, false);
            }
        }
    }
}

#[cfg(test)]
mod tests;
