//! The state of a machine apart from the contents of RAM: taken out of a machine, put into another, encoded for the
//! disk. Snapshots, restores and branches all go through here, so that there is one list of what a machine is.

use std::collections::VecDeque;

use orrery_cpu::engine::{Engine, EngineConfig};
use orrery_cpu::memory::PAGE_SIZE;
use orrery_cpu::state::InvalidState;
use orrery_cpu::{CpuState, Icount};
use orrery_devices::GuestMemory;
use orrery_devices::VirtualNs;
use orrery_devices::disk::{AttachError, Base, CowDisk, Overlay};
use serde::{Deserialize, Serialize};

use super::devices::{self, Devices};
use super::dirty::DirtyPages;
use super::{Board, Machine, MachineError, Scheduled};
use crate::config::{ConfigError, MachineConfig, Seed};
use crate::digest::MemoryDigest;
use crate::queue::EventQueue;
use crate::ram;
use crate::run::Ended;
use crate::time::Clock;

/// Version of the encoded form. To be raised whenever a field of the vCPU or of any device comes, goes or changes.
pub const STATE_VERSION: u32 = 1;

/// Everything that decides a machine's future but RAM. What is missing here does not matter to it: the engine's
/// translations, digests, output that waits to be taken, whether the engine was asked for an interrupt window.
#[derive(Clone, Serialize, Deserialize)]
pub struct MachineState {
    /// What the machine is made of.
    pub(super) config: MachineConfig,
    /// Instructions retired.
    pub(super) icount: Icount,
    /// The vCPU, with its interrupt shadow and whether it is halted.
    pub(super) cpu: CpuState,
    /// What the random streams were keyed with last.
    pub(super) seed: Seed,
    /// Devices, time, events.
    pub(super) board: BoardState,
    /// Virtual time up to which inputs and events have been delivered.
    pub(super) settled: Option<VirtualNs>,
    /// Nothing has happened since the last instruction retired.
    pub(super) first_moment: bool,
    /// Number of inputs that have entered since power-on.
    pub(super) inputs_entered: u64,
    /// Inputs that have not entered yet. They are the host's: copies of a machine have them, the disk does not.
    #[serde(skip)]
    pub(super) inputs: VecDeque<Scheduled>,
    /// How the run ended, if it did.
    #[serde(with = "as_text")]
    pub(super) ended: Option<Ended>,
}

/// The board's part of a [`MachineState`].
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct BoardState {
    /// Virtual time and the idle time skipped.
    pub clock: Clock,
    /// Wake-ups that devices have asked for.
    pub queue: EventQueue,
    /// All devices, with their random streams and their disks.
    pub devices: Devices,
    /// Console input that the serial port has had no room for yet.
    pub backlog: VecDeque<u8>,
    /// Input for the agent that its device has had no room for yet.
    pub agent_backlog: VecDeque<u8>,
    /// How the guest has ended the run, if the machine has not looked yet.
    #[serde(with = "as_text")]
    pub ended: Option<Ended>,
}

/// An end as the text that manifests have: its encoding names its own kind, which postcard cannot read back.
mod as_text {
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::run::Ended;

    pub fn serialize<S: Serializer>(ended: &Option<Ended>, serializer: S) -> Result<S::Ok, S::Error> {
        let text = ended.as_ref().map(serde_json::to_string).transpose().map_err(S::Error::custom)?;
        text.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Ended>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| serde_json::from_str(&text)).transpose().map_err(D::Error::custom)
    }
}

/// A saved state that cannot be put into a machine.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another version of Orrery made it.
    #[error("the state has version {found}; this Orrery reads version {STATE_VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Not the encoding of a state.
    #[error("the state cannot be decoded: {reason}")]
    Encoding {
        /// The decoder's words.
        reason: String,
    },
    /// The description of the machine is out of bounds.
    #[error("the state's machine: {0}")]
    Config(#[from] ConfigError),
    /// The vCPU.
    #[error(transparent)]
    Cpu(#[from] InvalidState),
    /// The devices are not those of a machine with this description.
    #[error("the state contradicts itself: {what}")]
    Inconsistent {
        /// What does not fit.
        what: &'static str,
    },
    /// The image has another number of disks.
    #[error("the state has {expected} disks and {actual} were given")]
    Disks {
        /// Disks in the state.
        expected: usize,
        /// Disks given.
        actual: usize,
    },
    /// A disk's content is not the one that was saved.
    #[error("disk {index}: {source}")]
    Disk {
        /// Which disk.
        index: usize,
        /// What is wrong with it.
        source: AttachError,
    },
}

impl MachineState {
    /// Description of the machine.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Instructions retired.
    pub fn icount(&self) -> Icount {
        self.icount
    }

    /// Virtual time.
    pub fn time(&self) -> VirtualNs {
        self.board.clock.now(self.icount)
    }

    /// Number of inputs that have entered since power-on: the position in the log of inputs.
    pub fn inputs_entered(&self) -> u64 {
        self.inputs_entered
    }

    /// How the run ended, if it did.
    pub fn ended(&self) -> Option<&Ended> {
        self.ended.as_ref()
    }

    /// The disks, in their order.
    pub fn disks(&self) -> impl Iterator<Item = &CowDisk> {
        self.board.devices.disks()
    }

    /// The form for the disk. Contents of disks are not in it: their overlays are stored beside it.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(&(STATE_VERSION, self)).expect("a machine's state is plain data")
    }

    /// Reads the form for the disk, which may come from anywhere. The disks are detached until
    /// [`MachineState::attach_disks`].
    pub fn decode(bytes: &[u8]) -> Result<MachineState, StateError> {
        let encoding = |error: postcard::Error| StateError::Encoding { reason: error.to_string() };
        let (found, rest) = postcard::take_from_bytes::<u32>(bytes).map_err(encoding)?;
        if found != STATE_VERSION {
            return Err(StateError::Version { found });
        }
        let (state, rest) = postcard::take_from_bytes::<MachineState>(rest).map_err(encoding)?;
        if !rest.is_empty() {
            return Err(StateError::Encoding { reason: format!("{} bytes too many", rest.len()) });
        }
        state.validate()?;
        Ok(state)
    }

    fn validate(&self) -> Result<(), StateError> {
        self.config.validate()?;
        self.cpu.validate()?;
        if self.board.clock.ns_per_instruction() != self.config.ns_per_instruction {
            return Err(StateError::Inconsistent { what: "the rate of virtual time" });
        }
        if !self.board.devices.in_order() {
            return Err(StateError::Inconsistent { what: "the virtio devices" });
        }
        Ok(())
    }

    /// Gives the disks of a decoded state their contents back.
    pub fn attach_disks(&mut self, contents: Vec<(Base, Overlay)>) -> Result<(), StateError> {
        let expected = self.board.devices.disks().count();
        if contents.len() != expected {
            return Err(StateError::Disks { expected, actual: contents.len() });
        }
        for (index, (disk, (base, overlay))) in self.board.devices.disks_mut().zip(contents).enumerate() {
            disk.attach(base, overlay).map_err(|source| StateError::Disk { index, source })?;
        }
        Ok(())
    }
}

impl MachineState {
    /// Keys every random stream with another seed. With the seed that they have, nothing changes: the streams go on.
    pub fn rekey(&mut self, seed: Seed) {
        if seed != self.seed {
            self.seed = seed;
            self.board.devices.rekey(seed);
            forget_promises(&mut self.inputs);
        }
    }
}

impl Machine {
    /// A copy of everything between two instructions but the contents of RAM.
    pub fn state(&self) -> MachineState {
        MachineState {
            config: self.config.clone(),
            cpu: self.engine.state().clone(),
            icount: self.engine.icount(),
            seed: self.seed,
            board: self.board.state(),
            settled: self.settled,
            first_moment: self.first_moment,
            inputs_entered: self.inputs_entered,
            inputs: self.inputs.clone(),
            ended: self.ended.clone(),
        }
    }

    /// Replaces the state by another one. RAM must be that of the same moment, and the engine must know which of its
    /// pages have changed. Output that waits is dropped: it belongs to the past of what is replaced.
    pub(crate) fn load(&mut self, state: MachineState) {
        let MachineState { config, cpu, icount, seed, board, settled, first_moment, inputs_entered, inputs, ended } =
            state;
        debug_assert_eq!(config, self.config, "RAM is that of the same machine");
        *self.engine.state_mut() = cpu;
        self.engine.set_icount(icount);
        self.engine.state_replaced();
        self.board = Board::at(self.board.memory.clone(), board);
        self.seed = seed;
        self.settled = settled;
        self.first_moment = first_moment;
        self.inputs_entered = inputs_entered;
        self.inputs = inputs;
        self.entered.clear();
        self.ended = ended;
    }

    /// Puts a machine together over RAM that holds what it held when `state` was taken, with the digest of that RAM.
    pub fn assemble(
        memory: GuestMemory,
        digest: MemoryDigest,
        state: MachineState,
        engine: EngineConfig,
    ) -> Result<Machine, MachineError> {
        let features = devices::model_features(&state.config);
        let mut engine = Engine::new(memory.clone(), features, engine)?;
        *engine.state_mut() = state.cpu;
        engine.set_icount(state.icount);
        engine.state_replaced();
        // Whoever filled RAM may have done so as a device would; the digest knows those pages.
        crate::digest::take_device_dirty(&memory);
        Ok(Machine {
            config: state.config,
            dirty: DirtyPages::new(ram::end(&memory) / PAGE_SIZE),
            digest,
            digest_source: None,
            hashing: None,
            hashed: None,
            engine: std::mem::ManuallyDrop::new(engine),
            board: Board::at(memory, state.board),
            inputs: state.inputs,
            entered: Vec::new(),
            inputs_entered: state.inputs_entered,
            settled: state.settled,
            first_moment: state.first_moment,
            seed: state.seed,
            ended: state.ended,
            origin: None,
            stock: None,
            saved: None,
        })
    }

    /// Keys every random stream with another seed, as a branch does at its first moment. With the seed that they
    /// have, nothing changes: the streams go on.
    pub fn rekey(&mut self, seed: Seed) {
        if seed != self.seed {
            self.seed = seed;
            self.board.devices.rekey(seed);
            forget_promises(&mut self.inputs);
        }
    }
}

/// Time will pass differently: inputs that wait come at their time, at whatever icount that is.
fn forget_promises(inputs: &mut VecDeque<Scheduled>) {
    inputs.iter_mut().for_each(|input| input.expected = None);
}
