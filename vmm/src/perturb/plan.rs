//! What is changed, and when: drawn from a number, so that a run that differs can be had again.

use std::fmt;

use orrery_cpu::engine::{EngineConfig, EngineKind};
use serde::Serialize;

/// What a stage may cost, in nanoseconds by the estimates below: so that slow ways of working get as much of the
/// host's time as quick ones, and not as many instructions.
const STAGE_NS: (u32, u32) = (24, 31);
/// Estimated cost of an instruction where nothing slows the engine down, and of a stop.
const PLAIN_NS: u64 = 3;
const STOP_NS: u64 = 3_000;

/// A generator for choices that must not matter; its numbers never reach the guest.
#[derive(Clone, Debug)]
pub struct Draws(u64);

impl Draws {
    /// Numbers that follow from `seed`.
    pub fn new(seed: u64) -> Draws {
        Draws(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// A number of any size up to 2^`bits.1`, at least 2^`bits.0`: sizes are equally likely, not numbers.
    pub fn size(&mut self, bits: (u32, u32)) -> u64 {
        let magnitude = 1 << (u64::from(bits.0) + self.below(u64::from(bits.1 - bits.0)));
        magnitude + self.below(magnitude)
    }
}

/// How a machine comes into a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entry {
    /// Its state moves to a new engine, which has translated nothing.
    NewEngine,
    /// It is saved, and another machine, with a new engine, is restored from that.
    Restore,
    /// It is frozen, and a branch goes on with its translations.
    Branch,
    /// It is frozen, a branch runs ahead for so many instructions, goes back, and goes on from there.
    Rewind {
        /// Instructions.
        ahead: u64,
    },
    /// As it is: only the slices change.
    Continue,
}

/// Where the machine is stopped, only to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Slicing {
    /// After up to so many instructions.
    pub icount_max: u64,
    /// After up to so many nanoseconds of virtual time, in idle time too.
    pub time_max_ns: Option<u64>,
    /// Whenever a line of output is complete.
    pub at_output: bool,
    /// Out of so many stops, the state is hashed at one.
    pub stops_per_hash: Option<u64>,
}

/// One way of working, from one moment to the next.
#[derive(Clone, Debug, Serialize)]
pub struct Stage {
    /// It begins at the first stop at which so many instructions have retired.
    pub from: u64,
    /// How.
    pub entry: Entry,
    /// How the engine works.
    #[serde(serialize_with = "engine_text")]
    pub engine: EngineConfig,
    /// Where it stops.
    pub slicing: Slicing,
}

fn engine_text<S: serde::Serializer>(engine: &EngineConfig, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{engine:?}"))
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stage { from, entry, engine, slicing } = self;
        write!(f, "from {from}: ")?;
        match entry {
            Entry::NewEngine => write!(f, "a new engine")?,
            Entry::Restore => write!(f, "saved and restored, a new engine")?,
            Entry::Branch => write!(f, "a branch")?,
            Entry::Rewind { ahead } => write!(f, "a branch that came back from {ahead} instructions ahead")?,
            Entry::Continue => write!(f, "the same engine")?,
        }
        write!(f, ", TLBs 2^{}, blocks up to {}", engine.tlb_bits, engine.max_block_instructions)?;
        write!(f, ", code memory {} MiB", engine.code_cache_bytes >> 20)?;
        for (off, what) in [(!engine.chaining, "no chaining"), (!engine.grouping, "no groups")] {
            if off {
                write!(f, ", {what}")?;
            }
        }
        if engine.engine != EngineKind::Soft {
            write!(f, ", user code: {:?}", engine.engine)?;
        }
        if let Some(seed) = engine.chaos_seed {
            write!(f, ", chaos {seed:#x}")?;
        }
        write!(f, "; stops after up to {} instructions", slicing.icount_max)?;
        if let Some(time) = slicing.time_max_ns {
            write!(f, " or {time} ns")?;
        }
        if slicing.at_output {
            write!(f, ", at lines of output")?;
        }
        if let Some(stops) = slicing.stops_per_hash {
            write!(f, ", hashed at one stop in {stops}")?;
        }
        Ok(())
    }
}

/// An endless sequence of stages.
#[derive(Clone, Debug)]
pub struct Plan {
    seed: u64,
    draws: Draws,
    base: EngineConfig,
    /// How the engine of the last stage works.
    engine: EngineConfig,
    from: u64,
    stage_ns: (u32, u32),
}

impl Plan {
    /// The plan of a number. Engines differ from `base` only in what must not matter.
    pub fn new(seed: u64, base: &EngineConfig) -> Plan {
        Plan { seed, draws: Draws::new(seed), base: base.clone(), engine: base.clone(), from: 0, stage_ns: STAGE_NS }
    }

    /// Shorter stages, for guests that do not live long: 2^`bits.0` to 2^`bits.1` estimated nanoseconds each.
    pub fn with_stage_ns(self, bits: (u32, u32)) -> Plan {
        Plan { stage_ns: bits, ..self }
    }

    /// The number that it follows from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The stage after the last.
    pub fn next_stage(&mut self) -> Stage {
        let entry = match self.draws.below(100) {
            // At power-on there is nothing yet to be moved.
            _ if self.from == 0 => Entry::NewEngine,
            0..35 => Entry::NewEngine,
            35..55 => Entry::Restore,
            55..70 => Entry::Branch,
            70..85 => Entry::Rewind { ahead: self.draws.size((0, 24)) },
            _ => Entry::Continue,
        };
        if matches!(entry, Entry::NewEngine | Entry::Restore) {
            self.engine = self.engine();
        }
        let slicing = self.slicing();
        let stage = Stage { from: self.from, entry, engine: self.engine.clone(), slicing };
        let cost_ns = instruction_ns(&stage.engine) + STOP_NS / (slicing.icount_max / 2).max(1);
        self.from += (self.draws.size(self.stage_ns) / cost_ns).max(1);
        stage
    }

    fn engine(&mut self) -> EngineConfig {
        let draws = &mut self.draws;
        let mut engine = self.base.clone();
        if draws.chance(50) {
            engine.tlb_bits = 1 + draws.below(12) as u32;
        }
        engine.chaining = draws.chance(80);
        engine.grouping = draws.chance(75);
        if draws.chance(50) {
            engine.resident_uses = 1 + draws.below(8) as u8;
        }
        if draws.chance(50) {
            engine.max_block_instructions = draws.size((0, 6)) as u32;
        }
        if draws.chance(40) {
            engine.code_cache_bytes = 1 << (21 + draws.below(7));
        }
        if draws.chance(20) {
            engine.chaos_seed = Some(draws.bits());
        }
        if draws.chance(50) {
            engine.patience = draws.size((0, 6)) as u32;
        }
        if engine.engine != EngineKind::Soft {
            engine.engine = [EngineKind::Soft, EngineKind::Random, engine.engine][draws.below(3) as usize];
        }
        engine
    }

    fn slicing(&mut self) -> Slicing {
        let draws = &mut self.draws;
        Slicing {
            icount_max: if draws.chance(60) { draws.size((12, 30)) } else { draws.size((0, 12)) },
            time_max_ns: draws.chance(30).then(|| draws.size((0, 30))),
            at_output: draws.chance(30),
            stops_per_hash: draws.chance(50).then(|| draws.size((0, 8))),
        }
    }
}

/// Roughly what an instruction costs.
fn instruction_ns(engine: &EngineConfig) -> u64 {
    let mut cost = PLAIN_NS;
    if !engine.chaining {
        cost += 20;
    }
    if engine.tlb_bits < 6 {
        cost += 15;
    }
    if engine.max_block_instructions < 8 {
        cost += 40 / u64::from(engine.max_block_instructions);
    }
    if engine.code_cache_bytes < 8 << 20 {
        cost += 10;
    }
    if engine.chaos_seed.is_some() {
        cost += 100;
    }
    cost
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn stages(seed: u64, count: usize) -> Vec<Stage> {
        let mut plan = Plan::new(seed, &EngineConfig::default());
        (0..count).map(|_| plan.next_stage()).collect()
    }

    #[test]
    fn a_plan_follows_from_its_seed() {
        let text = |seed| format!("{:?}", stages(seed, 50));
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }

    #[test]
    fn stages_follow_each_other_and_stay_in_bounds() {
        for seed in 0..50 {
            let stages = stages(seed, 40);
            assert_eq!((stages[0].from, stages[0].entry), (0, Entry::NewEngine));
            assert!(stages.windows(2).all(|pair| pair[0].from < pair[1].from));
            for stage in &stages {
                assert!((1..=EngineConfig::default().tlb_bits).contains(&stage.engine.tlb_bits), "{stage}");
                assert!((1..=64).contains(&stage.engine.max_block_instructions), "{stage}");
                assert!(stage.engine.code_cache_bytes >= 2 << 20, "{stage}");
                assert!(stage.slicing.icount_max >= 1, "{stage}");
            }
        }
    }

    #[test]
    fn a_virtual_machine_is_used_now_and_then() {
        let base = EngineConfig { engine: EngineKind::Kvm, ..Default::default() };
        let mut plan = Plan::new(1, &base);
        let kinds: Vec<EngineKind> = (0..60).map(|_| plan.next_stage().engine.engine).collect();
        for kind in [EngineKind::Soft, EngineKind::Kvm, EngineKind::Random] {
            assert!(kinds.contains(&kind), "{kind:?}");
        }
        assert!(stages(1, 60).iter().all(|stage| stage.engine.engine == EngineKind::Soft));
    }

    #[test]
    fn everything_is_perturbed_sooner_or_later() {
        let mut seen = BTreeSet::new();
        for stage in (0..20).flat_map(|seed| stages(seed, 40)) {
            seen.insert(match stage.entry {
                Entry::NewEngine => "engine",
                Entry::Restore => "restore",
                Entry::Branch => "branch",
                Entry::Rewind { .. } => "rewind",
                Entry::Continue => "continue",
            });
            let base = EngineConfig::default();
            for (is, what) in [
                (stage.engine.chaos_seed.is_some(), "chaos"),
                (!stage.engine.chaining, "no chaining"),
                (!stage.engine.grouping, "no grouping"),
                (stage.engine.max_block_instructions == 1, "single"),
                (stage.engine.tlb_bits == 1, "smallest TLB"),
                (stage.engine.code_cache_bytes < base.code_cache_bytes, "code memory"),
                (stage.slicing.icount_max == 1, "steps"),
                (stage.slicing.time_max_ns.is_some(), "time"),
                (stage.slicing.at_output, "output"),
                (stage.slicing.stops_per_hash.is_some(), "hash"),
            ] {
                if is {
                    seen.insert(what);
                }
            }
        }
        assert_eq!(seen.len(), 15, "{seen:?}");
    }
}
