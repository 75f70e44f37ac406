//! Arbitrary bytes as guest code, in every mode that the engine knows, in two engines that work differently and are
//! interrupted at different places.
//!
//! The oracle is the contract of `Engine::run`: no panic, no fault of the host, no hang; at a limit the icount is
//! exactly the limit; and nothing about how an engine works shows in registers, memory, the accesses to the bus (with
//! their times), the moments at which interrupts are accepted, or how the run ends.

mod bus;
mod instructions;
mod start;
mod world;

use std::cell::RefCell;

use orrery_cpu::engine::{EngineConfig, Observation, Stop};
use orrery_cpu::{CpuState, Icount};

use bus::Recorder;
use start::{Happening, Start};
use world::World;

pub use instructions::mutate;
pub use start::HEADER_BYTES;

/// More stops than this without an end mean that the engine makes no progress.
const STOPS_MAX: u32 = 100_000;
/// An input whose string instructions are not done after so many stops of the reference engine in their middle is given
/// up: they may be at work for years.
const UNFINISHED_MAX: u32 = 8;
/// Cuts of the other engine's run.
const SLICES_MAX: u32 = 12;
/// One in this many inputs is followed by a comparison of all of RAM.
const FULL_COMPARISON_EVERY: u64 = 64;

/// The engines, made once.
struct Bench {
    pristine: Vec<u8>,
    reference: World,
    others: Vec<World>,
    /// Icount at which the next input starts: it never goes back.
    origin: u64,
}

/// What a run leaves besides the state and RAM.
#[derive(Clone, Debug)]
struct Outcome {
    icount: u64,
    /// Interrupts and how it ended, with their icounts.
    log: Vec<(u64, String)>,
    bus: Recorder,
    /// It was given up in the middle of an instruction.
    abandoned: bool,
}

impl Bench {
    fn new() -> Bench {
        let pristine = world::pristine();
        let base = EngineConfig { code_cache_bytes: 8 << 20, patience: 1 << 12, ..EngineConfig::default() };
        let small = EngineConfig {
            tlb_bits: 1,
            max_block_instructions: 1,
            chaining: false,
            grouping: false,
            patience: 1,
            ..base.clone()
        };
        let others = [
            small.clone(),
            EngineConfig { tlb_bits: 3, chaos_seed: Some(1), patience: 3, ..base.clone() },
            EngineConfig { code_cache_bytes: 256 << 10, max_block_instructions: 3, tlb_bits: 2, ..base.clone() },
            EngineConfig { grouping: false, chaining: true, tlb_bits: 1, ..base.clone() },
            EngineConfig { max_block_instructions: 7, chaos_seed: Some(2), ..base.clone() },
            EngineConfig { chaining: false, ..base.clone() },
        ];
        Bench {
            reference: World::new(base, &pristine),
            others: others.map(|config| World::new(config, &pristine)).into(),
            pristine,
            origin: 0,
        }
    }
}

thread_local! {
    static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
}

/// Runs one input in two engines and compares. Panics if a promise is broken.
pub fn execute(data: &[u8]) {
    let _running = crate::watch::input(data, true);
    BENCH.with_borrow_mut(|bench| bench.get_or_insert_with(Bench::new).execute(data));
}

impl Bench {
    fn execute(&mut self, data: &[u8]) {
        let start = Start::new(data);
        let verbose = std::env::var_os("FUZZ_TRACE").is_some();
        let other = usize::from(start.variant) % self.others.len();
        let origin = self.origin;
        self.origin += start.budget + 1;
        let first = run(&mut self.reference, &start, origin, false, verbose);
        if first.abandoned {
            self.reference.restore(&self.pristine);
            return;
        }
        let second = run(&mut self.others[other], &start, origin, true, verbose);
        if verbose {
            eprintln!("{}\nthen\n{}", describe(&start.state), describe(self.reference.engine.state()));
            eprintln!("{first:#?}");
        }
        let (a, b) = (&mut self.reference, &mut self.others[other]);
        let differences = compare(a, &first, b, &second);
        if !differences.is_empty() {
            let cause = self.narrow(&start, other);
            panic!("engine {other} differs:\n{differences}\nstarted as\n{}\n{cause}", describe(&start.state));
        }
        if bus::mix(first.bus.digest, first.icount) % FULL_COMPARISON_EVERY == 0 || verbose {
            for world in [&*a, &*b] {
                for page in 0..world::RAM_BYTES / world::PAGE {
                    let before = &self.pristine[(page * world::PAGE) as usize..][..world::PAGE as usize];
                    let clean = world.touched().binary_search(&page).is_err();
                    assert!(!clean || world.page(page) == before, "page {page:#x} was written and is not in the list");
                }
            }
        }
        self.reference.restore(&self.pristine);
        self.others[other].restore(&self.pristine);
        if verbose {
            for (name, world) in [("reference", &self.reference), ("other", &self.others[other])] {
                for page in 0..world::RAM_BYTES / world::PAGE {
                    let before = &self.pristine[(page * world::PAGE) as usize..][..world::PAGE as usize];
                    assert!(world.page(page) == before, "page {page:#x} of the {name} engine was not restored");
                }
            }
        }
    }
}

impl Bench {
    /// Looks for the first instruction after which the engines differ, for the message.
    fn narrow(&mut self, start: &Start, other: usize) -> String {
        let mut before = String::from("(at once)");
        for budget in 1..=start.budget {
            let shorter = Start { budget, ..start.clone() };
            let worlds = [&mut self.reference, &mut self.others[other]];
            for world in worlds {
                world.restore(&self.pristine);
            }
            self.origin += budget;
            let first = run(&mut self.reference, &shorter, self.origin, false, true);
            let second = run(&mut self.others[other], &shorter, self.origin, true, true);
            let differences = compare(&self.reference, &first, &self.others[other], &second);
            let state = self.reference.engine.state();
            if !differences.is_empty() {
                return format!(
                    "first after {budget} instructions, the last of which is that at {before}\n{differences}\n{first:#x?}\n{second:#x?}"
                );
            }
            before = format!("{}{}", describe(state), self.disassemble());
        }
        String::from("not again when run step by step: what the engines remembered matters")
    }

    /// The instructions at RIP, as the supervisor's mapping or the low one shows them.
    fn disassemble(&self) -> String {
        let state = self.reference.engine.state();
        let page = match state.rip / world::PAGE {
            page if state.rip >= world::HIGH => page & 0x1FF,
            page => world::test_page(page.wrapping_sub(world::LOW / world::PAGE) % world::TEST_PAGES, 0) / world::PAGE,
        };
        let at = (state.rip % world::PAGE) as usize;
        let Some(bytes) = self.reference.ram().get((page * world::PAGE) as usize..).and_then(|bytes| bytes.get(at..))
        else {
            return String::new();
        };
        let bitness = match (state.is_64bit(), state.seg[1].default_big()) {
            (true, _) => 64,
            (_, true) => 32,
            _ => 16,
        };
        let bytes = &bytes[..bytes.len().min(15)];
        let instruction = iced_x86::Decoder::with_ip(bitness, bytes, state.rip, 0).decode();
        format!("{:?} ({bytes:02x?})", instruction.code())
    }
}

/// Runs an input in one engine; leaves state and RAM as they are at the end, and the list of pages collected.
fn run(world: &mut World, start: &Start, origin: u64, sliced: bool, trace: bool) -> Outcome {
    for (gpa, bytes) in &start.pokes {
        world.write(*gpa, bytes);
    }
    *world.engine.state_mut() = start.state.clone();
    world.engine.state_replaced();
    world.engine.set_icount(Icount(origin));
    world.engine.request_interrupt_window(false);
    // Somebody looks at the sliced run.
    let observation = if sliced { start.observation.clone() } else { Observation::default() };
    world.engine.observe(&observation);
    let mut drive = Drive {
        // Attention is asked for after accesses of the sliced run only: stopping there must not matter either.
        bus: Recorder::new(origin, if sliced { start.attention_every } else { 0 }, trace),
        log: Vec::new(),
        origin,
        pending: None,
        slices: sliced.then_some(Slices { seed: start.slices, done: 0 }),
        stops: 0,
        unfinished: 0,
    };
    let mut events = start.events.iter().peekable();
    let mut running = true;
    while running {
        let until = events.peek().map_or(start.budget, |event| event.0.min(start.budget));
        running = drive.until(world, origin + until);
        let now = world.engine.icount().0 - origin;
        if !running {
            // HLT waits for an interrupt, if one is still to come.
            let wakes = events.find_map(|event| match event.1 {
                Happening::Interrupt(vector) => Some(vector),
                _ => None,
            });
            if let Some(vector) = wakes
                && world.engine.state().halted
                && world.engine.can_interrupt()
                && now < start.budget
            {
                running = drive.interrupt(world, vector);
            }
            continue;
        }
        if now >= start.budget {
            break;
        }
        let Some((_, happening)) = events.next() else { continue };
        match *happening {
            Happening::Interrupt(vector) => {
                drive.pending = Some(vector);
                if world.engine.can_interrupt() {
                    running = drive.interrupt(world, vector);
                } else {
                    world.engine.request_interrupt_window(true);
                }
            }
            Happening::Write { gpa, value } => world.write(gpa, &value.to_le_bytes()),
            Happening::TakeDirty => world.collect_dirty(),
            Happening::Forget => world.engine.state_replaced(),
        }
    }
    world.collect_dirty();
    world.engine.observe(&Observation::default());
    world.engine.take_hits();
    let abandoned = world.engine.is_unfinished();
    Outcome { icount: world.engine.icount().0 - origin, log: drive.log, bus: drive.bus, abandoned }
}

/// Lengths of the pieces in which a run is executed.
struct Slices {
    seed: u8,
    done: u32,
}

impl Slices {
    fn next(&mut self) -> u64 {
        self.done += 1;
        if self.seed == 0 || self.done > SLICES_MAX {
            return u64::MAX;
        }
        match self.seed {
            1 => 1,
            2 => 2,
            seed => 1 + bus::mix(seed.into(), self.done.into()) % u64::from(seed),
        }
    }
}

struct Drive {
    bus: Recorder,
    log: Vec<(u64, String)>,
    origin: u64,
    /// The vector of an interrupt that waits.
    pending: Option<u8>,
    slices: Option<Slices>,
    stops: u32,
    /// Stops in the middle of an instruction.
    unfinished: u32,
}

impl Drive {
    /// Runs until the icount is `target`; false if the run ended before.
    fn until(&mut self, world: &mut World, target: u64) -> bool {
        loop {
            let now = world.engine.icount().0;
            if now == target {
                return true;
            }
            let piece = self.slices.as_mut().map_or(u64::MAX, Slices::next);
            let limit = now.saturating_add(piece).min(target);
            self.bus.begin_run();
            let stop = world.engine.run(Icount(limit), &mut self.bus);
            let after = world.engine.icount().0;
            assert!(after >= now && after <= limit, "{stop:?} at {after}, from {now} to {limit}");
            assert!(stop != Stop::Limit || after == limit, "the limit of {limit} was missed: {after}");
            if stop == Stop::Unfinished {
                self.unfinished += 1;
                // The other engine goes to the end of what the reference has come to the end of.
                if self.slices.is_none() && self.unfinished == UNFINISHED_MAX {
                    return false;
                }
                continue;
            }
            self.stops += 1;
            assert!(self.stops < STOPS_MAX, "no progress at {after}: {stop:?}");
            match stop {
                Stop::Limit | Stop::Attention => {}
                Stop::Observed => drop(world.engine.take_hits()),
                Stop::InterruptWindow => {
                    assert!(world.engine.can_interrupt(), "an open window that is none");
                    let vector = self.pending.take().expect("a window is reported only if one is wanted");
                    if !self.interrupt(world, vector) {
                        return false;
                    }
                }
                Stop::Halted => {
                    assert!(world.engine.state().halted, "Stop::Halted without HLT");
                    let wakes = self.pending.is_some() && world.engine.can_interrupt();
                    let vector = if wakes { self.pending.take() } else { None };
                    if vector.is_none_or(|vector| !self.interrupt(world, vector)) {
                        self.note(world, "halted".to_owned());
                        return false;
                    }
                }
                Stop::Unfinished => unreachable!("handled above"),
                Stop::TripleFault | Stop::Unsupported { .. } => {
                    self.note(world, format!("{stop:x?}"));
                    return false;
                }
            }
        }
    }

    /// Delivers an interrupt; false if that ends the run.
    fn interrupt(&mut self, world: &mut World, vector: u8) -> bool {
        self.pending = None;
        world.engine.request_interrupt_window(false);
        self.note(world, format!("interrupt {vector}"));
        match world.engine.interrupt(vector, &mut self.bus) {
            Ok(()) => true,
            Err(stop) => {
                self.note(world, format!("{stop:x?}"));
                false
            }
        }
    }

    fn note(&mut self, world: &World, what: String) {
        self.log.push((world.engine.icount().0 - self.origin, what));
    }
}

fn compare(a: &World, first: &Outcome, b: &World, second: &Outcome) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    if first.icount != second.icount || first.log != second.log || first.bus.digest != second.bus.digest {
        let _ = write!(text, "{first:x?}\n{second:x?}\n");
    }
    if a.engine.state() != b.engine.state() {
        let _ = write!(text, "{}{}", describe(a.engine.state()), describe(b.engine.state()));
        let (a, b) = (&a.engine.state().fpu.0, &b.engine.state().fpu.0);
        for at in (0..a.len()).filter(|at| a[*at] != b[*at]).take(16) {
            let _ = writeln!(text, "fpu image {at}: {:02x} {:02x}", a[at], b[at]);
        }
    }
    let mut pages: Vec<u64> = a.touched().iter().chain(b.touched()).copied().collect();
    pages.sort_unstable();
    pages.dedup();
    for page in pages {
        if a.page(page) != b.page(page) {
            let at = (0..4096).find(|at| a.page(page)[*at] != b.page(page)[*at]).unwrap_or(0);
            let word = at & !7;
            let _ = writeln!(
                text,
                "RAM at {:#x}: {:02x?} {:02x?}",
                page << 12 | word as u64,
                &a.page(page)[word..word + 8],
                &b.page(page)[word..word + 8]
            );
        }
    }
    text
}

/// The state for people, without x87, SSE and AVX.
fn describe(state: &CpuState) -> String {
    format!(
        "rip {:x} rflags {:x} cpl {} gpr {:x?}\ncr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x} xcr0 {:x} dr {:x?} \
         shadow {} halted {}\nseg {:x?}\n",
        state.rip,
        state.rflags,
        state.cpl,
        state.gpr,
        state.cr0,
        state.cr2,
        state.cr3,
        state.cr4,
        state.efer,
        state.xcr0,
        state.dr,
        state.interrupt_shadow,
        state.halted,
        state.seg,
    )
}
