//! Machines from images, run to their end, for all whole-system tests.

#![allow(dead_code)]

use std::fmt::Display;
use std::path::PathBuf;

use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_guest_image::Image;
use orrery_tests::workshop;
use orrery_vmm::chain::Hash;
use orrery_vmm::run::Ended;
use orrery_vmm::{Limits, Machine, MachineConfig, Pause, Seed};

/// Instructions after which a test gives up: several times what the longest guest takes.
pub const ICOUNT_MAX: u64 = 200_000_000_000;

/// Set to anything: a test that cannot run for want of an image or a tool fails, instead of being skipped.
const REQUIRE: &str = "ORRERY_REQUIRE_GUESTS";

/// The value, or a message that the test is skipped.
pub fn available<T>(what: &str, value: Result<T, impl Display>) -> Option<T> {
    match value {
        Ok(value) => Some(value),
        Err(error) if std::env::var_os(REQUIRE).is_some() => panic!("{what} cannot be had: {error:#}"),
        Err(error) => {
            eprintln!("SKIPPED: {what} cannot be had ({REQUIRE}=1 makes this a failure): {error:#}");
            None
        }
    }
}

/// A demo image made by `make images`.
pub fn demo(name: &str) -> Option<Image> {
    let path = workshop::target().join(format!("images/{name}.img"));
    let image = if path.exists() {
        Image::open(&path).map_err(|error| error.to_string())
    } else {
        Err(format!("{} does not exist; `make images` builds it", path.display()))
    };
    available(&format!("the image {name}"), image)
}

/// An image of small guests.
pub fn guests(names: &[&str]) -> Option<Image> {
    let built: Option<PathBuf> = available("the image of the small guests", orrery_tests::guests::image(names));
    Some(Image::open(built?).expect("an image that was just built can be opened"))
}

/// A machine at power-on.
pub fn machine(image: &Image, seed: u64, engine: EngineConfig) -> Machine {
    let config = MachineConfig { memory_mib: 512, ..MachineConfig::default() };
    Machine::new(image, &config, Seed(seed), engine).expect("the machine can be put together")
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The end itself.
    pub ended: Option<Ended>,
    /// Instructions retired.
    pub icount: u64,
    /// Virtual time, in nanoseconds.
    pub virtual_ns: u64,
    /// Hash of the complete state.
    pub state: Hash,
    /// What the console showed since the machine was last asked.
    pub console: String,
}

/// Runs up to an icount, or to the guest's end if that is earlier.
pub fn run_until(machine: &mut Machine, icount: u64) -> Outcome {
    let mut console = Vec::new();
    let ended = loop {
        let limits = Limits { pause_on_output: true, ..Limits::until(Icount(icount)) };
        let pause = machine.run(limits).expect("nothing is replayed");
        for output in machine.take_output() {
            if output.channel == "console" {
                console.extend(output.bytes);
            }
        }
        match pause {
            Pause::Ended(ended) => break Some(ended),
            Pause::Limit => break None,
            Pause::Output => {}
            Pause::Idle { .. } | Pause::Observed | Pause::Unfinished => unreachable!("nobody asks for these pauses"),
        }
    };
    Outcome {
        ended,
        icount: machine.icount().0,
        virtual_ns: machine.time().0,
        state: machine.state_hash(),
        console: String::from_utf8_lossy(&console).into_owned(),
    }
}

/// Runs to the guest's end.
pub fn run(image: &Image, seed: u64, engine: EngineConfig) -> Outcome {
    let outcome = run_until(&mut machine(image, seed, engine), ICOUNT_MAX);
    assert!(outcome.ended.is_some(), "the guest did not end; its console:\n{}", outcome.console);
    outcome
}

/// Asserts that the guest powered off with code 0.
pub fn assert_success(outcome: &Outcome) {
    assert_eq!(
        outcome.ended,
        Some(Ended::PowerOff { code: 0 }),
        "icount {}; the console:\n{}",
        outcome.icount,
        outcome.console
    );
}

/// Asserts that two runs were equal, and otherwise says in what they differ.
pub fn assert_equal(run: &Outcome, expected: &Outcome, what: &str) {
    if run == expected {
        return;
    }
    let mut differences = Vec::new();
    let mut compare = |name: &str, found: &dyn std::fmt::Debug, wanted: &dyn std::fmt::Debug| {
        let (found, wanted) = (format!("{found:?}"), format!("{wanted:?}"));
        if found != wanted {
            differences.push(format!("{name}: {found} instead of {wanted}"));
        }
    };
    compare("end", &run.ended, &expected.ended);
    compare("icount", &run.icount, &expected.icount);
    compare("virtual time", &run.virtual_ns, &expected.virtual_ns);
    compare("state", &run.state, &expected.state);
    let (mut found, mut wanted) = (run.console.lines(), expected.console.lines());
    while let (line, other @ Some(_)) | (line @ Some(_), other) = (found.next(), wanted.next()) {
        if line != other {
            compare("console", &line, &other);
            break;
        }
    }
    panic!("{what}: {}", differences.join("\n"));
}

/// xorshift64*, for choices that a test makes: the same in every run of the test.
pub struct Choices(pub u64);

impl Choices {
    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}
