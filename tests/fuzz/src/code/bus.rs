//! The machine around the vCPU: answers that depend on nothing but the order of the questions, and a digest of
//! every question with its time.

use orrery_cpu::bus::MsrRefused;
use orrery_cpu::{Bus, Icount};

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Recorder {
    /// Digest of all questions and answers so far.
    pub digest: u64,
    /// How many there were.
    pub count: u64,
    /// The icount that counts as zero.
    origin: u64,
    /// One in this many accesses asks for attention; 0 means none.
    attention_every: u64,
    /// The questions, for people.
    trace: Option<Vec<String>>,
    attention: bool,
    task_priority: u8,
}

/// A step of a mixing function (the finaliser of SplitMix64).
pub fn mix(state: u64, value: u64) -> u64 {
    let mut z = (state ^ value).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Recorder {
    /// Nothing asked yet. `trace` keeps the questions for people.
    pub fn new(origin: u64, attention_every: u64, trace: bool) -> Recorder {
        Recorder { origin, attention_every, trace: trace.then(Vec::new), ..Recorder::default() }
    }

    /// Before each run of the engine.
    pub fn begin_run(&mut self) {
        self.attention = false;
    }

    fn ask(&mut self, now: Icount, what: &str, a: u64, b: u64) -> u64 {
        let now = now.0.wrapping_sub(self.origin);
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now}: {what} {a:#x} {b:#x}"));
        }
        for value in [now, what.len() as u64 ^ u64::from(what.as_bytes()[0]) << 8, a, b] {
            self.digest = mix(self.digest, value);
        }
        self.count += 1;
        if self.attention_every != 0 && self.digest % self.attention_every == 0 {
            self.attention = true;
        }
        // Small numbers, zeros and ones now and then: guests branch on what they read.
        match self.digest & 7 {
            0 => 0,
            1 => u64::MAX,
            2 => self.digest >> 60,
            _ => mix(self.digest, 1),
        }
    }
}

impl Bus for Recorder {
    fn port_read(&mut self, now: Icount, port: u16, size: usize) -> u32 {
        assert!(matches!(size, 1 | 2 | 4), "IN of {size} bytes");
        self.ask(now, "in", port.into(), size as u64) as u32
    }
    fn port_write(&mut self, now: Icount, port: u16, size: usize, value: u32) {
        assert!(matches!(size, 1 | 2 | 4), "OUT of {size} bytes");
        let value = value & (u64::MAX >> (64 - 8 * size)) as u32;
        self.ask(now, "out", u64::from(port) | (size as u64) << 16, value.into());
    }
    fn mmio_read(&mut self, now: Icount, gpa: u64, data: &mut [u8]) {
        assert!(!data.is_empty() && data.len() <= 4096, "a read of {} bytes", data.len());
        let mut answer = self.ask(now, "mmio read", gpa, data.len() as u64);
        for chunk in data.chunks_mut(8) {
            chunk.copy_from_slice(&answer.to_le_bytes()[..chunk.len()]);
            answer = mix(answer, 2);
        }
    }
    fn mmio_write(&mut self, now: Icount, gpa: u64, data: &[u8]) {
        assert!(!data.is_empty() && data.len() <= 4096, "a write of {} bytes", data.len());
        let digest = data.iter().fold(data.len() as u64, |digest, byte| mix(digest, (*byte).into()));
        self.ask(now, "mmio write", gpa, digest);
    }
    fn msr_read(&mut self, now: Icount, msr: u32) -> Result<u64, MsrRefused> {
        let answer = self.ask(now, "rdmsr", msr.into(), 0);
        if answer & 3 == 0 { Err(MsrRefused) } else { Ok(answer) }
    }
    fn msr_write(&mut self, now: Icount, msr: u32, value: u64) -> Result<(), MsrRefused> {
        let answer = self.ask(now, "wrmsr", msr.into(), value);
        if answer & 3 == 0 { Err(MsrRefused) } else { Ok(()) }
    }
    fn task_priority(&mut self, now: Icount) -> u8 {
        self.ask(now, "cr8", 0, 0);
        self.task_priority
    }
    fn set_task_priority(&mut self, now: Icount, value: u8) {
        self.ask(now, "to cr8", value.into(), 0);
        self.task_priority = value;
    }
    fn tsc(&mut self, now: Icount) -> u64 {
        now.0.wrapping_sub(self.origin).wrapping_mul(3)
    }
    fn random(&mut self) -> u64 {
        self.digest = mix(self.digest, 3);
        self.digest
    }
    fn attention(&self) -> bool {
        self.attention
    }
}
