//! Automatic snapshots of a run: when they are taken, and the thread that writes them.
//!
//! The guest goes on while what has changed is hashed and copied. A thread compresses and writes it, then adds it to the
//! run's list. While that thread is busy no further snapshot is taken. None of this can be seen by the guest.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use super::directory::INPUTS;
use crate::machine::Machine;
use crate::machine::hashing::{HashWork, Hashed};
use crate::store::log::{self, SnapshotLog};
use crate::store::{
    Capture, CaptureBase, CaptureStart, PartialLine, SnapshotError, SnapshotRecord, Store, StoreWriter, Timeline,
};

/// Instructions between snapshots.
const EVERY_INSTRUCTIONS: u64 = 1 << 28;
/// How many times as far apart they may be where writing one takes long.
const STRETCH: u64 = 4;
/// Where it does, the writer rests for so many times as long as it wrote.
const REST: u32 = 7;
/// Snapshots that a run keeps.
pub const MOST: usize = 128;
/// Bytes of RAM written after which a snapshot is taken early.
pub const DIRTY_BYTES: u64 = 256 << 20;
/// A snapshot is not taken sooner than this part of the ordinary distance after the last.
const EARLY_PART: u64 = 8;

/// When snapshots are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotOptions {
    /// Instructions between two snapshots.
    pub every_instructions: u64,
    /// How many times as many there may be, so that the writer is at work for an eighth of the time only.
    pub stretch: u64,
    /// Bytes of RAM written since the last snapshot after which the next is taken early.
    pub dirty_bytes: u64,
    /// Snapshots that are kept: when there are more, every second one is removed and the distance doubles.
    pub most: usize,
}

impl Default for SnapshotOptions {
    fn default() -> SnapshotOptions {
        SnapshotOptions {
            every_instructions: EVERY_INSTRUCTIONS,
            stretch: STRETCH,
            dirty_bytes: DIRTY_BYTES,
            most: MOST,
        }
    }
}

impl SnapshotOptions {
    /// True if a snapshot is to be taken so many instructions and bytes written behind the last one, with `every`
    /// instructions between two now; `rests` says whether the writer does.
    fn ask_for(&self, since: u64, every: u64, written: u64, rests: impl FnOnce() -> bool) -> bool {
        let much = written >= self.dirty_bytes && since >= every / EARLY_PART;
        let latest = every.saturating_mul(self.stretch);
        (since >= every || much) && (latest == every || since >= latest || !rests())
    }
}

/// Takes the snapshots of one run.
pub struct Snapshotter {
    options: SnapshotOptions,
    base: Option<CaptureBase>,
    timeline: Option<Timeline>,
    last_icount: u64,
    runs: PathBuf,
    run: PathBuf,
    writer: Option<Writer>,
    started: Option<(CaptureStart, Option<PartialLine>)>,
}

/// A snapshot whose RAM was hashed and copied.
type Begun = (CaptureStart, Hashed, Option<PartialLine>);

struct Writer {
    sender: SyncSender<Begun>,
    thread: JoinHandle<()>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    busy: AtomicBool,
    /// Until when the thread should have nothing to do.
    rest: Mutex<Option<Instant>>,
    /// How often the list was thinned out: the distance has doubled as often.
    thinned: AtomicU32,
    failure: Mutex<Option<SnapshotError>>,
    /// Memory of the capture before.
    memory: Mutex<Vec<u8>>,
}

impl Snapshotter {
    /// Snapshots of the run in directory `run` among `runs`, beginning after `machine`'s moment. Nothing is written yet.
    pub fn new(runs: &Path, run: &Path, options: SnapshotOptions, machine: &Machine) -> Snapshotter {
        Snapshotter {
            options,
            base: None,
            timeline: None,
            last_icount: machine.icount().0,
            runs: runs.to_owned(),
            run: run.to_owned(),
            writer: None,
            started: None,
        }
    }

    /// Lets the first snapshot build on one that is in the store.
    pub fn build_on(&mut self, base: CaptureBase, timeline: Timeline) {
        self.base = Some(base);
        self.timeline = Some(timeline);
    }

    /// Begins a snapshot if one is due and the machine stands at a moment. `line` is console output without an end of
    /// line yet. The caller has the work done and gives the result to [`Snapshotter::write`] before it calls again.
    pub fn begin(
        &mut self,
        machine: &mut Machine,
        line: Option<PartialLine>,
    ) -> Result<Option<HashWork>, SnapshotError> {
        self.failure()?;
        if !self.is_due(machine) {
            return Ok(None);
        }
        let writer = match &self.writer {
            Some(writer) => writer,
            None => self.writer.insert(Writer::start(&self.runs, &self.run, self.options, self.timeline.take())?),
        };
        let memory = std::mem::take(&mut *lock(&writer.shared.memory));
        let (start, work) = CaptureStart::new(machine, self.base.as_ref(), memory)?;
        self.started = Some((start, line));
        self.last_icount = machine.icount().0;
        Ok(Some(work))
    }

    /// Has the snapshot that was begun written. Nothing happens if none was.
    pub fn write(&mut self, hashed: Hashed) {
        if let (Some((start, line)), Some(writer)) = (self.started.take(), &self.writer) {
            self.base = Some(start.base(&hashed));
            writer.shared.busy.store(true, Ordering::Release);
            // A writer that is gone has left its failure.
            let _ = writer.sender.send((start, hashed, line));
        }
    }

    fn is_due(&self, machine: &Machine) -> bool {
        let since = machine.icount().0.saturating_sub(self.last_icount);
        let thinned = self.writer.as_ref().map_or(0, |writer| writer.shared.thinned.load(Ordering::Relaxed));
        let every = self.options.every_instructions.saturating_mul(1 << thinned.min(40));
        let busy = self.writer.as_ref().is_some_and(|writer| writer.shared.busy.load(Ordering::Acquire));
        if busy || since == 0 || !machine.at_moment() {
            return false;
        }
        let rest = || self.writer.as_ref().and_then(|writer| *lock(&writer.shared.rest));
        let rests = || rest().is_some_and(|until| Instant::now() < until);
        self.options.ask_for(since, every, machine.unhashed_bytes(), rests)
    }

    fn failure(&self) -> Result<(), SnapshotError> {
        let failure = self.writer.as_ref().and_then(|writer| lock(&writer.shared.failure).take());
        failure.map_or(Ok(()), Err)
    }

    /// Waits until everything is written.
    pub fn finish(&mut self) -> Result<(), SnapshotError> {
        let Some(Writer { sender, thread, shared }) = self.writer.take() else { return Ok(()) };
        drop(sender);
        // A panic of the writer has been printed; the snapshots that it acknowledged are whole.
        let _ = thread.join();
        let failure = lock(&shared.failure).take();
        failure.map_or(Ok(()), Err)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Writer {
    fn start(
        runs: &Path,
        run: &Path,
        options: SnapshotOptions,
        timeline: Option<Timeline>,
    ) -> Result<Writer, SnapshotError> {
        let (sender, receiver) = sync_channel(1);
        let shared = Arc::new(Shared::default());
        let mut scribe = Scribe {
            writer: StoreWriter::new(Store::open(runs)?),
            timeline: timeline.unwrap_or_default(),
            log: SnapshotLog::open(run)?,
            records: log::read(run)?.records,
            inputs_synced: 0,
            run: run.to_owned(),
            options,
        };
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("snapshots".into())
            .spawn(move || scribe.work(&receiver, &theirs))
            .map_err(|source| SnapshotError::Io { action: "start a thread for", path: "snapshots".into(), source })?;
        Ok(Writer { sender, thread, shared })
    }
}

/// What the thread has.
struct Scribe {
    writer: StoreWriter,
    timeline: Timeline,
    log: SnapshotLog,
    records: Vec<SnapshotRecord>,
    inputs_synced: u64,
    run: PathBuf,
    options: SnapshotOptions,
}

impl Scribe {
    fn work(&mut self, receiver: &Receiver<Begun>, shared: &Shared) {
        while let Ok((start, hashed, line)) = receiver.recv() {
            let begun = Instant::now();
            let capture = start.finish(hashed);
            let written = self.write(&capture, line, shared);
            *lock(&shared.memory) = capture.into_memory();
            if let Err(error) = written {
                lock(&shared.failure).get_or_insert(error);
                // Later captures build on this one.
                return;
            }
            *lock(&shared.rest) = Some(Instant::now() + begun.elapsed() * REST);
            shared.busy.store(false, Ordering::Release);
        }
    }

    fn write(&mut self, capture: &Capture, line: Option<PartialLine>, shared: &Shared) -> Result<(), SnapshotError> {
        let mut record = self.writer.write(&mut self.timeline, capture, false)?;
        record.console_line = line;
        if record.inputs_entered > self.inputs_synced {
            // The snapshot's past must be on disk before the snapshot is.
            let path = self.run.join(INPUTS);
            let synced = File::open(&path).and_then(|file| file.sync_data());
            synced.map_err(|source| SnapshotError::Io { action: "flush", path: path.display().to_string(), source })?;
            self.inputs_synced = record.inputs_entered;
        }
        self.log.append(&record)?;
        self.records.push(record);
        let automatic = self.records.iter().filter(|record| !record.kept).count();
        if automatic > self.options.most.max(2) {
            let mut odd = false;
            self.records.retain(|record| {
                odd ^= !record.kept;
                record.kept || !odd
            });
            log::replace(&self.run, &self.records)?;
            self.log = SnapshotLog::open(&self.run)?;
            shared.thinned.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_that_rests_is_asked_later_but_is_asked() {
        let options = SnapshotOptions { every_instructions: 800, stretch: 4, dirty_bytes: 1000, most: 2 };
        let due = |since, written, rests| options.ask_for(since, 800, written, || rests);
        assert!(due(800, 0, false) && !due(799, 999, false));
        assert!(due(100, 1000, false) && !due(99, 1000, false), "early, but not at once");
        assert!(!due(800, 0, true) && !due(3199, 1000, true) && due(3200, 0, true));
        let exactly = SnapshotOptions { stretch: 1, ..options };
        assert!(exactly.ask_for(800, 800, 0, || true) && exactly.ask_for(100, 800, 1000, || true));
        assert!(!exactly.ask_for(799, 800, 999, || false));
    }
}
