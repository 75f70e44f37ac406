//! What a machine is at a moment, beside its RAM: the list that branches copy and that snapshots store.

use std::collections::VecDeque;

use orrery_cpu::{CpuState, Icount};
use orrery_devices::VirtualNs;

use super::devices::Devices;
use super::{Board, Machine, Scheduled};
use crate::config::Seed;
use crate::queue::EventQueue;
use crate::run::Ended;
use crate::time::Clock;

/// Everything that decides a machine's future but RAM. What is missing here does not matter to it: the engine's
/// translations, digests, output that waits to be taken, whether the engine was asked for an interrupt window.
#[derive(Clone)]
pub(crate) struct MachineState {
    /// The vCPU, with its interrupt shadow and whether it is halted.
    pub cpu: CpuState,
    /// Instructions retired.
    pub icount: Icount,
    /// What the random streams were keyed with last.
    pub seed: Seed,
    /// Devices, time, events.
    pub board: BoardState,
    /// Virtual time up to which inputs and events have been delivered.
    pub settled: Option<VirtualNs>,
    /// Inputs that have not entered yet.
    pub inputs: VecDeque<Scheduled>,
    /// How the run ended, if it did.
    pub ended: Option<Ended>,
}

/// The board's part of a [`MachineState`].
#[derive(Clone)]
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
    pub ended: Option<Ended>,
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
    /// Copies the state between two instructions.
    pub(crate) fn capture(&self) -> MachineState {
        MachineState {
            cpu: self.engine.state().clone(),
            icount: self.engine.icount(),
            seed: self.seed,
            board: self.board.state(),
            settled: self.settled,
            inputs: self.inputs.clone(),
            ended: self.ended.clone(),
        }
    }

    /// Replaces the state by another one. RAM must be that of the same moment, and the engine must know which of its
    /// pages have changed. Output that waits is dropped: it belongs to the past of what is replaced.
    pub(crate) fn load(&mut self, state: MachineState) {
        let MachineState { cpu, icount, seed, board, settled, inputs, ended } = state;
        *self.engine.state_mut() = cpu;
        self.engine.set_icount(icount);
        self.engine.state_replaced();
        self.board = Board::at(self.board.memory.clone(), board);
        self.seed = seed;
        self.settled = settled;
        self.inputs = inputs;
        self.entered.clear();
        self.ended = ended;
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
