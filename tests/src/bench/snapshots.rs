//! The benchmark of branches and snapshots: how long it takes until another machine runs, in this process.
//!
//! Each line is one kind of operation, done many times; its figures are the median and the 99th percentile in
//! microseconds. The guests are Debian systems that have filled most of their memory (`guests/filler.c`).

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use orrery_cpu::Icount;
use orrery_guest_image::Image;
use orrery_vmm::store::{Capture, Store, StoreWriter, Timeline};
use orrery_vmm::{Limits, Machine, MachineConfig, Pause, Seed, Template};

use super::percentiles::{Line, micros_since};
use crate::workshop;

/// Instructions that a child runs in the lines about throughput.
const CHILD_INSTRUCTIONS: u64 = 100_000;
/// Instructions after which a guest that has said it is ready is taken to be in its stride.
const SETTLE_INSTRUCTIONS: u64 = 50_000_000;
/// Longest boot.
const BOOT_INSTRUCTIONS: u64 = 1 << 38;
/// Pages that a child has written before it goes back.
const RESET_PAGES: usize = 50;
/// Branches of one parent that live at once.
const LIVE: usize = 1_000;

/// What can be measured.
pub const NAMES: [(&str, &str); 12] = [
    ("branch-512", "a new branch of a guest of 512 MiB, until its first instruction has retired"),
    ("reset-50", "going back to the branch point after 50 pages were written"),
    ("branches-per-second", "going back and running 100,000 instructions"),
    ("branch-recycled", "a branch after another one was dropped, until its first instruction has retired"),
    ("grandchild-512", "a branch of a branch that has written 2000 pages, until its first instruction has retired"),
    ("live-1000", "a branch while up to 1000 brothers live that have run 100,000 instructions each"),
    ("branch-4096", "a new branch of a guest of 4 GiB, until its first instruction has retired"),
    ("warm-go", "the first million instructions of branches of a Go guest, and the same of its parent"),
    ("warm-jvm", "the same of a JVM guest"),
    ("warm-filler", "the same of a guest that writes another page every 1400 instructions"),
    ("snapshot-disk", "a snapshot of a booted Go guest on disk, after an earlier one and 10 million instructions more"),
    ("restore-disk", "that guest from its snapshot on disk, until its first instruction has retired"),
];

/// Measures a line of that name so many times.
type Measure = fn(&mut Guest, &str, usize) -> Result<Line>;

/// A guest that has filled its memory, frozen, and the machine that it was.
pub struct Guest {
    parent: Machine,
    template: Template,
}

impl Guest {
    /// Boots the image until it says that memory is filled.
    pub fn boot(image: &Image, memory_mib: u64) -> Result<Guest> {
        let config = MachineConfig { memory_mib, ..Default::default() };
        let mut parent = Machine::new(image, &config, Seed(1), Default::default())?;
        let mut console = Vec::new();
        loop {
            let limits = Limits { pause_on_output: true, ..Limits::until(Icount(BOOT_INSTRUCTIONS)) };
            let pause = parent.run(limits)?;
            parent.take_output().into_iter().for_each(|output| console.extend(output.bytes));
            if String::from_utf8_lossy(&console).contains("\nfilled ") {
                break;
            }
            if pause != Pause::Output {
                bail!("the guest did not fill its memory: {pause:?}\n{}", String::from_utf8_lossy(&console));
            }
        }
        Guest::freeze(parent, memory_mib)
    }

    /// Runs the image up to a moment.
    pub fn at(image: &Image, memory_mib: u64, icount: u64) -> Result<Guest> {
        let config = MachineConfig { memory_mib, ..Default::default() };
        let mut parent = Machine::new(image, &config, Seed(1), Default::default())?;
        run(&mut parent, icount)?;
        Guest::freeze(parent, memory_mib)
    }

    fn freeze(mut parent: Machine, memory_mib: u64) -> Result<Guest> {
        run(&mut parent, SETTLE_INSTRUCTIONS)?;
        let before = Instant::now();
        let template = parent.freeze()?;
        eprintln!("guest of {memory_mib} MiB frozen in {:.1} ms", micros_since(before) / 1e3);
        Ok(Guest { parent, template })
    }

    /// Measures the lines that `wanted` names, but for those of [`branches`].
    pub fn measure(&mut self, wanted: &dyn Fn(&str) -> bool, rounds: usize) -> Result<Vec<Line>> {
        let each: [(&str, Measure); 5] = [
            ("reset-50", Guest::reset),
            ("branches-per-second", Guest::throughput),
            ("branch-recycled", Guest::recycled),
            ("grandchild-512", Guest::grandchild),
            ("live-1000", Guest::live),
        ];
        each.into_iter().filter(|(name, _)| wanted(name)).map(|(name, measure)| measure(self, name, rounds)).collect()
    }

    fn child(&self) -> Result<Machine> {
        Ok(self.template.branch(self.template.seed(), None)?)
    }

    fn reset(&mut self, name: &str, rounds: usize) -> Result<Line> {
        let mut child = self.child()?;
        let mut micros = Vec::new();
        let mut pages = 0;
        for _ in 0..rounds {
            while child.pages_since_branch() < RESET_PAGES {
                run(&mut child, 2_000)?;
            }
            pages += child.pages_since_branch();
            let before = Instant::now();
            child.reset()?;
            micros.push(micros_since(before));
        }
        Ok(Line::of(name, micros).with("pages", pages as f64 / rounds as f64))
    }

    fn throughput(&mut self, name: &str, rounds: usize) -> Result<Line> {
        let mut child = self.child()?;
        run(&mut child, CHILD_INSTRUCTIONS)?;
        let mut micros = Vec::new();
        let start = Instant::now();
        for _ in 0..rounds {
            let before = Instant::now();
            child.reset()?;
            run(&mut child, CHILD_INSTRUCTIONS)?;
            micros.push(micros_since(before));
        }
        let per_second = rounds as f64 / micros_since(start) * 1e6;
        Ok(Line::of(name, micros).with("per_second", per_second))
    }

    fn recycled(&mut self, name: &str, rounds: usize) -> Result<Line> {
        let mut micros = Vec::new();
        for round in 0..rounds {
            let before = Instant::now();
            let mut child = self.template.branch(Seed(round as u64), None)?;
            run(&mut child, 1)?;
            micros.push(micros_since(before));
            run(&mut child, CHILD_INSTRUCTIONS)?;
        }
        Ok(Line::of(name, micros))
    }

    fn grandchild(&mut self, name: &str, rounds: usize) -> Result<Line> {
        let mut child = self.child()?;
        while child.pages_since_branch() < 2_000 {
            run(&mut child, 100_000)?;
        }
        let before = Instant::now();
        let template = child.freeze()?;
        let frozen = micros_since(before) / 1e3;
        Ok(Line::of(name, first_instructions(&template, rounds.min(200))?).with("freeze_ms", frozen))
    }

    fn live(&mut self, name: &str, _rounds: usize) -> Result<Line> {
        let before = resident_mib()?;
        let mut children = Vec::new();
        let mut micros = Vec::new();
        for seed in 0..LIVE {
            let start = Instant::now();
            let mut child = self.template.branch(Seed(seed as u64), None)?;
            run(&mut child, 1)?;
            micros.push(micros_since(start));
            run(&mut child, CHILD_INSTRUCTIONS)?;
            children.push(child);
        }
        let mib = resident_mib()? - before;
        // They do live.
        for child in &mut children {
            run(child, 1)?;
        }
        Ok(Line::of(name, micros).with("beyond_parent_mib", mib))
    }
}

/// Measures new branches of each guest, in turn: so all lines find the host in the same state. Where there is a hypervisor
/// below, a page that it has to provide first takes ten times as long as another.
pub fn branches(guests: &mut [(&str, Guest)], rounds: usize) -> Result<Vec<Line>> {
    for (_, guest) in guests.iter_mut() {
        // So that freezing it again costs little.
        guest.parent.state_hash();
    }
    let mut samples = vec![(Vec::new(), Vec::new()); guests.len()];
    // They live on, so that none goes on in the memory of another.
    let mut children = Vec::new();
    for _ in 0..rounds {
        for ((_, guest), (made, micros)) in guests.iter_mut().zip(&mut samples) {
            let template = guest.parent.freeze()?;
            // In the memory of the one that has looked ahead, as the next one will be.
            let _first = template.branch(template.seed(), None)?;
            let before = Instant::now();
            let mut child = template.branch(template.seed(), None)?;
            made.push(micros_since(before));
            run(&mut child, 1)?;
            micros.push(micros_since(before));
            children.push(child);
        }
    }
    let line = |((name, _), (made, micros)): (&(&str, Guest), _)| {
        Line::of(name, micros).with("made_p50_us", Line::of("", made).p50_us)
    };
    Ok(guests.iter().zip(samples).map(line).collect())
}

/// Snapshots on disk of the image `go`, and back; the store is made below `directory` and removed again.
pub fn disk(image: &Image, directory: &Path, wanted: &dyn Fn(&str) -> bool, rounds: usize) -> Result<Vec<Line>> {
    const BOOTED: u64 = 400_000_000;
    const BETWEEN: u64 = 10_000_000;
    // The guest powers off after some 900 million instructions.
    const DISK_ROUNDS: usize = 48;
    let runs = directory.join("snapshots");
    workshop::empty_directory(&runs)?;
    let config = MachineConfig { memory_mib: 512, ..Default::default() };
    let mut machine = Machine::new(image, &config, Seed(1), Default::default())?;
    run(&mut machine, BOOTED)?;
    let mut writer = StoreWriter::new(Store::open(&runs)?);
    let mut timeline = Timeline::default();
    let before = Instant::now();
    let (capture, mut base) = Capture::take(&mut machine, None)?;
    let mut record = writer.write(&mut timeline, &capture, false)?;
    let first_ms = micros_since(before) / 1e3;
    let (mut micros, mut waits, mut bytes) = (Vec::new(), Vec::new(), 0);
    for _ in 0..rounds.min(DISK_ROUNDS) {
        run(&mut machine, BETWEEN)?;
        let before = Instant::now();
        let (capture, next) = Capture::take(&mut machine, Some(&base))?;
        waits.push(micros_since(before));
        record = writer.write(&mut timeline, &capture, false)?;
        micros.push(micros_since(before));
        bytes += capture.bytes();
        base = next;
    }
    let mut lines = Vec::new();
    if wanted("snapshot-disk") {
        let mib = bytes as f64 / micros.len() as f64 / f64::from(1 << 20);
        let line = Line::of("snapshot-disk", micros).with("first_ms", first_ms).with("mib", mib);
        lines.push(line.with("guest_waits_p50_us", Line::of("", waits).p50_us));
    }
    if wanted("restore-disk") {
        let mut micros = Vec::new();
        for _ in 0..rounds.min(30) {
            let before = Instant::now();
            let mut back = writer.store().load(&record, image, Default::default())?;
            run(&mut back, 1)?;
            micros.push(micros_since(before));
        }
        lines.push(Line::of("restore-disk", micros));
    }
    std::fs::remove_dir_all(&runs).with_context(|| format!("cannot remove {}", runs.display()))?;
    Ok(lines)
}

/// Microseconds from asking for a branch until its first instruction has retired.
fn first_instructions(template: &Template, rounds: usize) -> Result<Vec<f64>> {
    let mut micros = Vec::new();
    // They live on, so that none goes on in the place of another.
    let mut children = Vec::new();
    for _ in 0..rounds {
        let before = Instant::now();
        let mut child = template.branch(template.seed(), None)?;
        run(&mut child, 1)?;
        micros.push(micros_since(before));
        children.push(child);
    }
    Ok(micros)
}

/// Runs so many instructions, all of them.
pub fn run(machine: &mut Machine, instructions: u64) -> Result<()> {
    let until = machine.icount().0 + instructions;
    match machine.run(Limits::until(Icount(until)))? {
        Pause::Limit if machine.icount().0 == until => Ok(()),
        pause => bail!("the guest stopped at {}: {pause:?}", machine.icount().0),
    }
}

/// Page faults of this process that the host has served without a disk.
pub fn page_faults() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/stat")?;
    // proc(5): minflt is field 10; the second field may hold spaces and ends with the last parenthesis.
    let field = text.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(7));
    Ok(field.context("/proc/self/stat has no minflt")?.parse()?)
}

/// Memory of the host that this process has made necessary: what it holds privately, and its page tables.
fn resident_mib() -> Result<f64> {
    let kib = |file: &str, name: &str| -> Result<f64> {
        let text = std::fs::read_to_string(file)?;
        let line =
            text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name} in {file}"))?;
        Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
    };
    let anonymous = kib("/proc/self/status", "RssAnon:")?;
    let tables = kib("/proc/self/status", "VmPTE:")?;
    Ok((anonymous + tables) / 1024.0)
}
