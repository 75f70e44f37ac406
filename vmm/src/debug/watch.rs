//! What stops a movement: breakpoints and watchpoints as a debugger's user means them, and what the engine is told.

use orrery_cpu::engine::{Hit, Observation, Place, WATCH_BYTES_MAX, Watchpoint};

use super::memory;
use crate::machine::Machine;

/// Which accesses are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WatchKind {
    /// Writes.
    Write,
    /// Reads.
    Read,
    /// Both.
    Access,
}

/// Bytes that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Watched {
    /// At a linear address of an address space. What is there is followed: through other mappings of the same memory
    /// too, and when the address is mapped to other memory later.
    Linear {
        /// First byte.
        address: u64,
        /// How many.
        size: u64,
        /// CR3 of the address space; None for the kernel's half, which is in all of them.
        root: Option<u64>,
        /// Which accesses.
        kind: WatchKind,
    },
    /// At a guest-physical address.
    Physical {
        /// First byte.
        address: u64,
        /// How many.
        size: u64,
        /// Which accesses.
        kind: WatchKind,
    },
}

impl Watched {
    /// Bytes at a linear address as they are meant now.
    pub fn linear(machine: &Machine, address: u64, size: u64, kind: WatchKind) -> Watched {
        let user = address >> 63 == 0;
        Watched::Linear { address, size, root: user.then_some(machine.cpu().cr3), kind }
    }

    fn kind(&self) -> WatchKind {
        match *self {
            Watched::Linear { kind, .. } | Watched::Physical { kind, .. } => kind,
        }
    }
}

/// What is to stop a movement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Linear addresses of instructions.
    pub breakpoints: Vec<u64>,
    /// Watched bytes.
    pub watched: Vec<Watched>,
}

/// A [`Wanted`] as the engine is told, and the way back from what it finds.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    wanted: Wanted,
    observation: Observation,
    /// For each of the engine's watchpoints: index into `wanted.watched`.
    origins: Vec<usize>,
}

impl Plan {
    /// Translates at this moment's page tables.
    pub fn new(wanted: &Wanted, machine: &Machine) -> Plan {
        let mut plan = Plan { wanted: wanted.clone(), ..Plan::default() };
        plan.observation.breakpoints = wanted.breakpoints.clone();
        for (origin, watched) in wanted.watched.iter().enumerate() {
            match *watched {
                Watched::Physical { address, size, .. } => plan.add(origin, Place::Physical { address }, size),
                Watched::Linear { address, size, root, .. } => {
                    let size = size.clamp(1, WATCH_BYTES_MAX);
                    plan.add(origin, Place::Linear { address, root }, size);
                    for (at, piece) in memory::pages(address, size) {
                        if let Some(gpa) = translate(machine, root, at) {
                            plan.add(origin, Place::Physical { address: gpa }, piece);
                        }
                    }
                }
            }
        }
        plan
    }

    fn add(&mut self, origin: usize, place: Place, size: u64) {
        let kind = self.wanted.watched[origin].kind();
        self.observation.watchpoints.push(Watchpoint {
            place,
            size,
            read: kind != WatchKind::Write,
            write: kind != WatchKind::Read,
        });
        self.origins.push(origin);
    }

    /// What the engine is told.
    pub fn observation(&self) -> &Observation {
        &self.observation
    }

    /// What a hit stands for, if it is one that is wanted. `machine` is where it was found.
    pub fn accept(&self, hit: &Hit, machine: &Machine) -> Option<Event> {
        match *hit {
            Hit::Breakpoint { icount, rip } => {
                let wanted = self.wanted.breakpoints.contains(&rip);
                wanted.then_some(Event { icount: icount.0, what: What::Breakpoint { rip } })
            }
            Hit::Execution { .. } => None,
            Hit::Access { icount, rip, watchpoint, linear, gpa, size, write, accessor } => {
                let index = *self.origins.get(watchpoint)?;
                let watched = *self.wanted.watched.get(index)?;
                let place = self.observation.watchpoints.get(watchpoint)?.place;
                if let (Watched::Linear { address, size, root, .. }, Place::Physical { .. }) = (watched, place) {
                    // The memory counts while the address is mapped to it.
                    let last = address.wrapping_add(size.max(1) - 1);
                    let frame = gpa & !0xFFF;
                    let mapped = [address, last]
                        .into_iter()
                        .any(|at| translate(machine, root, at).is_some_and(|now| now & !0xFFF == frame));
                    if !mapped {
                        return None;
                    }
                }
                let what = What::Access { watched, rip, linear, gpa, size, write, accessor };
                Some(Event { icount: icount.0, what })
            }
        }
    }
}

fn translate(machine: &Machine, root: Option<u64>, linear: u64) -> Option<u64> {
    let ram = &machine.board().memory;
    match root {
        Some(root) => memory::translate_in(ram, root, linear),
        None => memory::translate(ram, machine.cpu(), linear),
    }
}

/// Something that stops a movement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Instructions retired before it.
    pub icount: u64,
    /// What it is.
    pub what: What,
}

/// The kinds of [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The instruction at `rip` is about to be executed.
    Breakpoint {
        /// Its address.
        rip: u64,
    },
    /// The instruction after `icount` others accesses watched bytes.
    Access {
        /// Which.
        watched: Watched,
        /// Address of the instruction.
        rip: u64,
        /// Linear address of the access, if it has one.
        linear: Option<u64>,
        /// Its guest-physical address.
        gpa: u64,
        /// Its length in bytes.
        size: u64,
        /// It writes.
        write: bool,
        /// Who accesses.
        accessor: orrery_cpu::engine::Accessor,
    },
}
