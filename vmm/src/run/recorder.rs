//! Drives a machine to its end and records it: console, inputs, hash chain, manifest.

use std::time::{Duration, Instant};

use orrery_cpu::Icount;
use orrery_devices::VirtualNs;
use serde::Serialize;

use super::beside::Beside;
use super::directory::{RunDirectory, StoreError};
use super::manifest::{self, BranchPoint, Ended, ImageReference, Manifest, Outcome};
use super::snapshots::{SnapshotOptions, Snapshotter};
use crate::chain::{Chain, Hash, Link};
use crate::config::{MachineConfig, Seed};
use crate::inputs::InputChannel;
use crate::machine::{ForeignInputs, Limits, Machine, Pause};
use crate::store::{CaptureBase, SnapshotError, Timeline};

/// Instructions between looks at the host: signals, input, progress.
const SLICE_INSTRUCTIONS: u64 = 1 << 22;
/// Idle time that passes at once after the last input or output, even if someone may be typing, in nanoseconds.
const FREE_IDLE_NS: u64 = 10_000_000_000;
/// Longest wait for input before looking for signals again.
const WAIT_MAX: Duration = Duration::from_millis(100);

/// What [`Host::input`] has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostInput {
    /// Bytes for the console.
    Data(Vec<u8>),
    /// None now, perhaps later.
    Nothing,
    /// None now or ever.
    Closed,
}

/// The world outside a run.
pub trait Host {
    /// Takes output of the guest. False if nobody wants more.
    fn output(&mut self, channel: &str, bytes: &[u8]) -> bool;
    /// Waits up to `wait` for console input.
    fn input(&mut self, wait: Duration) -> HostInput;
    /// A signal that asks to stop.
    fn interrupted(&mut self) -> Option<i32>;
    /// Called now and then.
    fn progress(&mut self, icount: Icount, time: VirtualNs);
}

/// A host without console input that throws output away.
pub struct NoHost;

impl Host for NoHost {
    fn output(&mut self, _: &str, _: &[u8]) -> bool {
        true
    }
    fn input(&mut self, _: Duration) -> HostInput {
        HostInput::Closed
    }
    fn interrupted(&mut self) -> Option<i32> {
        None
    }
    fn progress(&mut self, _: Icount, _: VirtualNs) {}
}

/// What to record, and until when.
#[derive(Clone, Debug)]
pub struct RecorderOptions {
    /// Length of an epoch, in instructions; not zero.
    pub epoch_instructions: u64,
    /// Stop at this icount.
    pub until: Option<Icount>,
    /// Stop at this virtual time.
    pub until_time: Option<VirtualNs>,
    /// Automatic snapshots; None for none. A run that is not recorded has none.
    pub snapshots: Option<SnapshotOptions>,
}

/// What a manifest says about a run before it starts.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Image and its hash.
    pub image: ImageReference,
    /// The machine's description.
    pub machine: MachineConfig,
    /// The seed.
    pub seed: Seed,
    /// Where the run's timeline left others.
    pub branches: Vec<BranchPoint>,
    /// File of inputs that are replayed.
    pub replayed_inputs: Option<String>,
    /// Vendor of the host's processor.
    pub host_cpu_vendor: String,
}

/// A recording that failed. What was acknowledged before is on disk.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The run directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The snapshots.
    #[error(transparent)]
    Snapshots(#[from] SnapshotError),
    /// The replayed inputs.
    #[error(transparent)]
    Inputs(#[from] ForeignInputs),
}

/// The end of a run, for people and programs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Name of the run's directory; none if it was not recorded.
    pub run: Option<String>,
    /// Hash of the image.
    pub image_hash: Hash,
    /// The seed.
    pub seed: u64,
    /// Instructions retired.
    pub icount: u64,
    /// Virtual time, in nanoseconds.
    pub virtual_ns: u64,
    /// Hash of the complete state.
    pub state_hash: Hash,
    /// Last link of the hash chain.
    pub chain: Hash,
    /// How it ended.
    pub ended: Ended,
    /// Time on the host, in seconds.
    pub host_seconds: f64,
    /// Speed on the host.
    pub instructions_per_second: f64,
}

/// Drives one machine.
pub struct Recorder {
    machine: Machine,
    origin: Origin,
    options: RecorderOptions,
    directory: Option<RunDirectory>,
    chain: Chain,
    links: Vec<Link>,
    /// Where the last link belongs that was begun.
    linked: Option<u64>,
    snapshots: Option<Snapshotter>,
    beside: Beside,
    /// A moment is being hashed; whether for a link.
    hashing: Option<bool>,
    input_open: bool,
    /// Virtual time of the last input or output.
    activity: VirtualNs,
}

impl Recorder {
    /// Prepares a recording; the manifest that says "running" is on disk when this returns.
    pub fn new(
        machine: Machine,
        origin: Origin,
        options: RecorderOptions,
        directory: Option<RunDirectory>,
    ) -> Result<Recorder, RecordError> {
        Recorder::resume(machine, origin, options, directory, &[])
    }

    /// Prepares the recording of a machine that has a past: `links` are those of its chain, which the directory has
    /// already.
    pub fn resume(
        machine: Machine,
        origin: Origin,
        options: RecorderOptions,
        directory: Option<RunDirectory>,
        links: &[Link],
    ) -> Result<Recorder, RecordError> {
        assert!(options.epoch_instructions > 0, "an epoch has instructions");
        let snapshots = match (&directory, options.snapshots) {
            (Some(directory), Some(wanted)) => {
                let runs = directory.path().parent().unwrap_or(directory.path());
                Some(Snapshotter::new(runs, directory.path(), wanted, &machine))
            }
            _ => None,
        };
        let recorder = Recorder {
            activity: machine.time(),
            snapshots,
            machine,
            origin,
            options,
            directory,
            chain: Chain::after(links.last()),
            linked: links.last().map(|link| link.icount),
            links: links.to_vec(),
            beside: Beside::default(),
            hashing: None,
            input_open: true,
        };
        recorder.write_manifest(None)?;
        Ok(recorder)
    }

    /// The machine, for looking at.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The links so far.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// Lets the first automatic snapshot build on one that is in the store.
    pub fn build_on(&mut self, base: CaptureBase, timeline: Timeline) {
        if let Some(snapshots) = &mut self.snapshots {
            snapshots.build_on(base, timeline);
        }
    }

    /// The machine, when the recording is over.
    pub fn into_machine(self) -> Machine {
        self.machine
    }

    /// Runs to the end.
    pub fn run(&mut self, host: &mut dyn Host) -> Result<Summary, RecordError> {
        let started = Instant::now();
        let ended = loop {
            if let Some(ended) = self.step(host)? {
                break ended;
            }
        };
        self.exchange(host)?;
        self.finish(ended, started)
    }

    /// Runs to the next look at the host.
    fn step(&mut self, host: &mut dyn Host) -> Result<Option<Ended>, RecordError> {
        let limits = self.limits();
        let pause = self.machine.run(limits)?;
        let open = self.exchange(host)?;
        match pause {
            Pause::Ended(ended) => return Ok(Some(ended)),
            Pause::Limit if self.reached_end() => return Ok(Some(Ended::Limit)),
            Pause::Limit => {
                self.look_back(false)?;
                self.look_at_moment()?;
            }
            Pause::Idle { until } => self.wait(host, until)?,
            // Nothing is observed while a run is recorded.
            Pause::Observed => {}
            Pause::Output | Pause::Unfinished => {}
        }
        if !open {
            return Ok(Some(Ended::ConsoleClosed));
        }
        if let Some(signal) = host.interrupted() {
            return Ok(Some(Ended::Interrupted { signal, unfinished: self.machine.is_unfinished() }));
        }
        if self.input_open {
            let input = host.input(Duration::ZERO);
            self.take_input(input);
        }
        host.progress(self.machine.icount(), self.machine.time());
        Ok(None)
    }

    fn limits(&self) -> Limits {
        let now = self.machine.icount().0;
        let epoch = self.options.epoch_instructions;
        let next_epoch = (now / epoch).saturating_add(1).saturating_mul(epoch);
        let slice = now.saturating_add(SLICE_INSTRUCTIONS);
        let until = self.options.until.map_or(u64::MAX, |until| until.0);
        Limits {
            icount: Icount(next_epoch.min(slice).min(until)),
            time: self.options.until_time.unwrap_or(Limits::NONE.time),
            pause_when_idle: self.input_open,
            pause_on_output: true,
            pause_when_long: true,
        }
    }

    fn reached_end(&self) -> bool {
        self.options.until.is_some_and(|until| self.machine.icount() >= until)
            || self.options.until_time.is_some_and(|until| self.machine.time() >= until)
    }

    /// Carries output and inputs to where they are kept. False if the host wants no more output.
    fn exchange(&mut self, host: &mut dyn Host) -> Result<bool, RecordError> {
        let mut open = true;
        for output in self.machine.take_output() {
            self.activity = output.time;
            if output.channel == "console"
                && let Some(directory) = &mut self.directory
            {
                directory.console(output.icount, output.time, &output.bytes)?;
            }
            open &= host.output(output.channel, &output.bytes);
        }
        for input in self.machine.take_inputs() {
            self.activity = VirtualNs(input.virtual_ns);
            if let Some(directory) = &mut self.directory {
                directory.input(&input)?;
            }
        }
        Ok(open)
    }

    fn take_input(&mut self, input: HostInput) {
        match input {
            HostInput::Data(bytes) => self.machine.input(InputChannel::Console, bytes),
            HostInput::Nothing => {}
            HostInput::Closed => self.input_open = false,
        }
    }

    /// The guest is idle and someone may be typing: lets idle time pass at once for a while, then as on a clock.
    fn wait(&mut self, host: &mut dyn Host, until: Option<VirtualNs>) -> Result<(), RecordError> {
        let now = self.machine.time();
        let target = until.unwrap_or(VirtualNs(u64::MAX));
        let mut skip_to = target;
        if target.0.saturating_sub(self.activity.0) <= FREE_IDLE_NS {
            self.take_input_or(host.input(Duration::ZERO), &mut skip_to, now);
        } else {
            let gap = Duration::from_nanos(target.0 - now.0).min(WAIT_MAX);
            let started = Instant::now();
            let input = host.input(gap);
            let waited = VirtualNs(now.0.saturating_add(started.elapsed().as_nanos() as u64));
            let reached = if until.is_some() { target.min(waited) } else { now };
            if input == HostInput::Nothing {
                skip_to = reached;
            }
            self.take_input_or(input, &mut skip_to, reached);
        }
        if skip_to > now && skip_to.0 < u64::MAX {
            let limits = Limits { pause_when_idle: false, ..self.limits() };
            self.machine.run(Limits { time: skip_to.min(limits.time), ..limits })?;
        }
        Ok(())
    }

    /// Input ends the wait: time goes on to `reached` only.
    fn take_input_or(&mut self, input: HostInput, skip_to: &mut VirtualNs, reached: VirtualNs) {
        if matches!(input, HostInput::Data(_)) {
            *skip_to = reached;
        }
        self.take_input(input);
    }

    /// Begins the link of an epoch that has ended, and a snapshot that is due.
    fn look_at_moment(&mut self) -> Result<(), RecordError> {
        let icount = self.machine.icount().0;
        let links = icount.is_multiple_of(self.options.epoch_instructions) && self.linked.is_none_or(|at| at < icount);
        if links {
            self.look_back(true)?;
        }
        let snapshot = match (&mut self.snapshots, &self.directory) {
            (Some(snapshots), Some(directory)) if self.hashing.is_none() => {
                snapshots.begin(&mut self.machine, directory.partial_line())?
            }
            _ => None,
        };
        if links || snapshot.is_some() {
            let work = snapshot.unwrap_or_else(|| self.machine.begin_hash(None));
            self.beside.run(work);
            self.hashing = Some(links);
            self.linked = Some(icount).filter(|_| links).or(self.linked);
        }
        Ok(())
    }

    /// Takes the hash of the moment before, when it is there.
    fn look_back(&mut self, wait: bool) -> Result<(), RecordError> {
        let Some(links) = self.hashing else { return Ok(()) };
        let Some(hashed) = self.machine.take_hashed(wait) else {
            assert!(!wait, "hashing does not panic");
            return Ok(());
        };
        self.hashing = None;
        if links {
            self.append_link(hashed.icount, hashed.state_hash)?;
        }
        if let Some(snapshots) = &mut self.snapshots {
            snapshots.write(hashed);
        }
        Ok(())
    }

    fn append_link(&mut self, icount: Icount, state: Hash) -> Result<Link, RecordError> {
        let link = self.chain.append(icount, state);
        self.linked = self.linked.max(Some(icount.0));
        self.links.push(link);
        if let Some(directory) = &mut self.directory {
            directory.link(&link)?;
        }
        Ok(link)
    }

    fn finish(&mut self, ended: Ended, started: Instant) -> Result<Summary, RecordError> {
        // In the middle of an instruction there is no state that another run could have.
        self.look_back(true)?;
        let state_hash = self.machine.state_hash();
        if !self.machine.is_unfinished() {
            self.append_link(self.machine.icount(), state_hash)?;
        }
        let host_seconds = started.elapsed().as_secs_f64();
        let outcome = Outcome {
            ended: ended.clone(),
            icount: self.machine.icount().0,
            virtual_ns: self.machine.time().0,
            state_hash,
            chain: self.links.last().map(|link| link.link).unwrap_or_default(),
        };
        if let Some(snapshots) = &mut self.snapshots {
            snapshots.finish()?;
        }
        if let Some(directory) = &mut self.directory {
            directory.flush()?;
        }
        self.write_manifest(Some(outcome.clone()))?;
        Ok(Summary {
            run: self.directory.as_ref().map(|directory| directory.path().display().to_string()),
            image_hash: self.origin.image.hash,
            seed: self.origin.seed.0,
            icount: outcome.icount,
            virtual_ns: outcome.virtual_ns,
            state_hash: outcome.state_hash,
            chain: outcome.chain,
            ended,
            host_seconds,
            instructions_per_second: if host_seconds > 0.0 { outcome.icount as f64 / host_seconds } else { 0.0 },
        })
    }

    fn write_manifest(&self, outcome: Option<Outcome>) -> Result<(), StoreError> {
        let Some(directory) = &self.directory else { return Ok(()) };
        directory.write_manifest(&Manifest {
            format: manifest::FORMAT.to_owned(),
            version: manifest::VERSION,
            id: directory.id().to_owned(),
            orrery_version: env!("CARGO_PKG_VERSION").to_owned(),
            image: self.origin.image.clone(),
            machine: self.origin.machine.clone(),
            seed: self.origin.seed.0,
            branches: self.origin.branches.clone(),
            replayed_inputs: self.origin.replayed_inputs.clone(),
            epoch_instructions: self.options.epoch_instructions,
            host_cpu_vendor: self.origin.host_cpu_vendor.clone(),
            outcome,
            checksum: String::new(),
        })
    }
}
