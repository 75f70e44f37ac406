//! Proving that runs are equal, and finding the first instruction after which they are not.

use orrery_cpu::engine::EngineConfig;
use orrery_cpu::{CpuState, Icount};
use orrery_devices::VirtualNs;
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use crate::chain::Hash;
use crate::digest::read_page;
use crate::machine::{ForeignInputs, Limits, Machine, MachineError, Pause};
use crate::perturb::{Course, CourseError, Stage};
use crate::run::Ended;

/// Points compared in one pass of the search for the first difference.
const POINTS_PER_PASS: u64 = 1024;
/// Passes after which the search gives up: each divides the interval by [`POINTS_PER_PASS`].
const PASSES_MAX: u32 = 16;
/// Differences of one kind that are listed.
const LISTED_MAX: usize = 16;

/// A comparison that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// No machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The inputs.
    #[error(transparent)]
    Inputs(#[from] ForeignInputs),
    /// The way through a run.
    #[error(transparent)]
    Course(#[from] CourseError),
}

/// State at an epoch's end, or at the run's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// Instructions retired.
    pub icount: u64,
    /// Virtual time, in nanoseconds.
    pub virtual_ns: u64,
    /// Hash of the complete state.
    pub state: Hash,
    /// How the run ended, at its last sample.
    pub ended: Option<Ended>,
}

/// Where a run is to stop.
#[derive(Clone, Copy, Debug, Default)]
pub struct Until {
    /// After so many instructions.
    pub icount: Option<Icount>,
    /// At this virtual time.
    pub time: Option<VirtualNs>,
}

/// A machine on its way, sampled at each epoch.
pub struct Sampler {
    course: Course,
    epoch: u64,
    until: Until,
    done: bool,
}

impl Sampler {
    /// Samples a machine, or a course through a plan, from power-on.
    pub fn new(course: impl Into<Course>, epoch: u64, until: Until) -> Sampler {
        Sampler { course: course.into(), epoch, until, done: false }
    }

    /// Runs to the next sample; None after the last.
    pub fn next_sample(&mut self) -> Result<Option<Sample>, CourseError> {
        if self.done {
            return Ok(None);
        }
        let next = (self.course.machine().icount().0 / self.epoch).saturating_add(1).saturating_mul(self.epoch);
        let last = self.until.icount.unwrap_or(Icount(u64::MAX));
        let time = self.until.time.unwrap_or(Limits::NONE.time);
        let pause = self.course.run(Icount(next).min(last), time)?;
        let machine = self.course.machine_mut();
        let ended = match pause {
            Pause::Ended(ended) => Some(ended),
            _ if machine.icount() >= last || machine.time() >= time => Some(Ended::Limit),
            _ => None,
        };
        self.done = ended.is_some();
        Ok(Some(Sample {
            icount: machine.icount().0,
            virtual_ns: machine.time().0,
            state: machine.state_hash(),
            ended,
        }))
    }

    /// What is sampled.
    pub fn course(&self) -> &Course {
        &self.course
    }
}

/// The first difference between two runs.
#[derive(Clone, Debug, Serialize)]
pub struct Divergence {
    /// The states are equal after this many instructions.
    pub equal_at: u64,
    /// And differ after this many.
    pub differs_at: u64,
    /// The instruction that makes the difference, disassembled, in each of the runs.
    pub instructions: Vec<String>,
    /// What differs after it, as text.
    pub differences: Vec<String>,
    /// How the second machine had been perturbed up to there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<Stage>,
}

/// Makes the first (0) or second (1) of two courses, at power-on.
type Build<'a> = &'a mut dyn FnMut(usize) -> Result<Course, MachineError>;

/// Finds the first difference between two machines that are equal at `equal_at` and differ at `differs_at`.
/// `build` makes the first (0) or second (1) machine, or its course, at power-on. None if the difference does not come
/// again.
pub fn locate<C: Into<Course>>(
    build: &mut dyn FnMut(usize) -> Result<C, MachineError>,
    equal_at: u64,
    differs_at: u64,
) -> Result<Option<Divergence>, VerifyError> {
    narrow(&mut |which| Ok(build(which)?.into()), equal_at, differs_at)
}

fn narrow(build: Build, equal_at: u64, differs_at: u64) -> Result<Option<Divergence>, VerifyError> {
    let (mut low, mut high) = (equal_at, differs_at);
    for _ in 0..PASSES_MAX {
        let step = (high - low).div_ceil(POINTS_PER_PASS).max(1);
        let points: Vec<u64> = (low..high).step_by(step as usize).chain([high]).collect();
        // One after the other, as the runs that differed were: two machines at once may not do the same.
        let expected = hashes(&mut build(0)?, &points)?;
        let mut second = build(1)?;
        let Some(index) = first_difference(&mut second, &points, &expected)? else {
            return bisect(build, low, high);
        };
        if index == 0 {
            if low == 0 {
                return report(build, 0, 0).map(Some);
            }
            (low, high) = (0, low);
            continue;
        }
        (low, high) = (points[index - 1], points[index]);
        if step == 1 {
            return report(build, low, high).map(Some);
        }
    }
    Ok(None)
}

/// Narrows by whole runs that stop nowhere else: for differences that stopping at many points hides. None if the
/// difference does not come again.
fn bisect(build: Build, mut low: u64, mut high: u64) -> Result<Option<Divergence>, VerifyError> {
    let mut differs = |icount| -> Result<bool, VerifyError> {
        Ok(advance(&mut build(0)?, icount)? != advance(&mut build(1)?, icount)?)
    };
    if !differs(high)? {
        return Ok(None);
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if differs(middle)? {
            high = middle;
        } else {
            low = middle;
        }
    }
    report(build, low, high).map(Some)
}

fn hashes(course: &mut Course, points: &[u64]) -> Result<Vec<Hash>, CourseError> {
    points.iter().map(|point| advance(course, *point)).collect()
}

/// Index of the first of the points at which the machine's hash is not the expected one.
fn first_difference(course: &mut Course, points: &[u64], expected: &[Hash]) -> Result<Option<usize>, CourseError> {
    for (index, (point, hash)) in points.iter().zip(expected).enumerate() {
        if advance(course, *point)? != *hash {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// Brings a machine to an icount, or to its end before it, and hashes its state.
fn advance(course: &mut Course, icount: u64) -> Result<Hash, CourseError> {
    course.run(Icount(icount), Limits::NONE.time)?;
    Ok(course.machine_mut().state_hash())
}

/// Runs both machines to the moments around the difference and describes it.
fn report(build: Build, equal_at: u64, differs_at: u64) -> Result<Divergence, VerifyError> {
    let mut courses = Vec::new();
    let mut instructions = Vec::new();
    for which in 0..2 {
        let mut before = build(which)?;
        advance(&mut before, equal_at)?;
        instructions.push(disassemble(before.machine()));
        // In one stretch from power-on: stopping just before might hide the difference.
        let mut after = build(which)?;
        advance(&mut after, differs_at)?;
        courses.push(after);
    }
    let differences = differences(courses[0].machine(), courses[1].machine());
    let stages = courses[1].stages().to_vec();
    Ok(Divergence { equal_at, differs_at, instructions, differences, stages })
}

/// What differs between two machines whose states have been hashed, as text.
pub fn differences(a: &Machine, b: &Machine) -> Vec<String> {
    let mut differences = Vec::new();
    if a.icount() != b.icount() || a.time() != b.time() {
        let moment = |m: &Machine| format!("icount {} virtual {} ns", m.icount().0, m.time().0);
        differences.push(format!("moment: {} / {}", moment(a), moment(b)));
    }
    if a.ended() != b.ended() {
        differences.push(format!("end: {:?} / {:?}", a.ended(), b.ended()));
    }
    differences.extend(cpu_differences(a.cpu(), b.cpu()));
    for ((name, mine), (_, theirs)) in a.board().device_states().into_iter().zip(b.board().device_states()) {
        if mine != theirs {
            let at = mine.iter().zip(&theirs).position(|(x, y)| x != y).unwrap_or(mine.len().min(theirs.len()));
            differences.push(format!("{name}: serialised states differ from byte {at} on"));
        }
    }
    differences.extend(memory_differences(a, b));
    differences
}

/// Registers that differ, as `name: first / second`.
pub fn cpu_differences(a: &CpuState, b: &CpuState) -> Vec<String> {
    let mut differences = Vec::new();
    let (first, second) = (crate::machine::registers(a), crate::machine::registers(b));
    // The dump is `name value` pairs in the same order for both.
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let (first, second) = (words(&first), words(&second));
    for (pair, other) in first.chunks(2).zip(second.chunks(2)) {
        if pair != other {
            differences.push(format!("{}: {} / {}", pair[0], pair[1..].concat(), other[1..].concat()));
        }
    }
    if a.fpu != b.fpu {
        let bytes = a.fpu.0.iter().zip(&b.fpu.0).enumerate().filter(|(_, (x, y))| x != y);
        let offsets: Vec<String> = bytes.take(LISTED_MAX).map(|(at, _)| at.to_string()).collect();
        differences.push(format!("x87/SSE/AVX: bytes {} of the XSAVE image", offsets.join(" ")));
    }
    if differences.is_empty() && a != b {
        differences.push("vCPU: registers beyond those of the dump (descriptors, MSRs, debug)".to_owned());
    }
    differences
}

fn memory_differences(a: &Machine, b: &Machine) -> Vec<String> {
    let pages = a.memory_digest().differing_pages(b.memory_digest());
    let mut differences = Vec::new();
    for page in pages.iter().take(LISTED_MAX) {
        let (mut mine, mut theirs) = ([0; 4096], [0; 4096]);
        read_page(&a.board().memory, *page, &mut mine);
        read_page(&b.board().memory, *page, &mut theirs);
        let Some(at) = mine.iter().zip(&theirs).position(|(x, y)| x != y) else { continue };
        let end = (at + 8).min(4096);
        differences.push(format!(
            "memory {:#x}: {:02x?} / {:02x?}",
            page * 4096 + at as u64,
            &mine[at..end],
            &theirs[at..end]
        ));
    }
    if pages.len() > LISTED_MAX {
        differences.push(format!("memory: {} pages differ in all", pages.len()));
    }
    differences
}

/// The instruction at RIP, as text.
pub fn disassemble(machine: &Machine) -> String {
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
    let cpu = machine.cpu();
    let Some(bytes) = code_bytes(machine) else { return format!("{:#x}: (not mapped)", cpu.rip) };
    let bitness = if cpu.is_64bit() { 64 } else { 32 };
    let mut decoder = Decoder::with_ip(bitness, &bytes, cpu.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let mut text = String::new();
    IntelFormatter::new().format(&instruction, &mut text);
    format!("{:#x}: {text}", cpu.rip)
}

/// Up to 15 bytes at CS:RIP, through the guest's page tables and without touching accessed bits.
fn code_bytes(machine: &Machine) -> Option<Vec<u8>> {
    let cpu = machine.cpu();
    let base = if cpu.is_64bit() { 0 } else { cpu.seg[orrery_cpu::state::seg::CS].base };
    let linear = base.wrapping_add(cpu.rip);
    let mut bytes = Vec::new();
    for offset in 0..15 {
        let Some(gpa) = translate(machine, linear.wrapping_add(offset)) else { break };
        let mut byte = [0];
        if machine.board().memory.read_slice(&mut byte, GuestAddress(gpa)).is_err() {
            break;
        }
        bytes.push(byte[0]);
    }
    (!bytes.is_empty()).then_some(bytes)
}

/// Guest-physical address of a linear one by a four-level walk (Intel SDM volume 3, section 4.5).
fn translate(machine: &Machine, linear: u64) -> Option<u64> {
    const FRAME: u64 = 0x000F_FFFF_FFFF_F000;
    let cpu = machine.cpu();
    if cpu.cr0 & orrery_cpu::state::control::CR0_PG == 0 {
        return Some(linear);
    }
    let mut table = cpu.cr3 & FRAME;
    for shift in [39, 30, 21, 12] {
        let mut entry = [0; 8];
        let slot = table + 8 * ((linear >> shift) & 511);
        machine.board().memory.read_slice(&mut entry, GuestAddress(slot)).ok()?;
        let entry = u64::from_le_bytes(entry);
        if entry & 1 == 0 {
            return None;
        }
        if shift == 12 || (shift < 39 && entry & 0x80 != 0) {
            let offset = (1u64 << shift) - 1;
            return Some((entry & FRAME & !offset) | (linear & offset));
        }
        table = entry & FRAME;
    }
    None
}

/// How the engine works in the `index`-th of a few fixed ways (`verify --perturbation`); the 0th is plain.
pub fn perturbed(base: &EngineConfig, index: u32) -> EngineConfig {
    let mut config = base.clone();
    match index % 6 {
        0 => {}
        1 => config.max_block_instructions = 1,
        2 => config.tlb_bits = 2,
        3 => config.chaining = false,
        4 => config.grouping = false,
        _ => config.chaos_seed = Some(u64::from(index)),
    }
    if index >= 6 {
        config.chaos_seed = Some(u64::from(index));
    }
    config
}
