//! The models against exact values, the manual's tables, and themselves.

mod host;
mod reciprocal;
mod special;

use super::extended::{Extended, Rounded, flag};
use super::transcendental::{Answer, arc_tangent, exponential, logarithm, trigonometric};
use crate::Icount;
use crate::bus::Bus;
use crate::exception::Exception;
use crate::model::ModelFeatures;
use crate::state::{CpuState, control};
use crate::system::{Executed, Flush, Privilege, System, execute};
use iced_x86::{Code, Instruction, Mnemonic};

/// Round to nearest and truncate; everything masked.
const NEAREST: u16 = 0x37F;
const DOWN: u16 = 0x77F;
const UP: u16 = 0xB7F;
const TRUNCATE: u16 = 0xF7F;

fn compute(name: &str, y: Extended, x: Extended, control: u16) -> Rounded {
    let angle = |mnemonic| match trigonometric(mnemonic, x, control) {
        Answer::Value { result, .. } => result,
        Answer::Incomplete => panic!("{x:x?} is in range"),
    };
    match name {
        "fsin" => angle(Mnemonic::Fsin),
        "fcos" => angle(Mnemonic::Fcos),
        "fptan" => angle(Mnemonic::Fptan),
        "f2xm1" => exponential(x, control),
        "fpatan" => arc_tangent(y, x, control),
        "fyl2x" => logarithm(y, x, false, control),
        "fyl2xp1" => logarithm(y, x, true, control),
        other => panic!("{other}"),
    }
}

/// 64 bytes of memory at [`MEMORY`].
struct Small([u8; 64]);

const MEMORY: u64 = 0x1000;

impl System for Small {
    fn read(&mut self, _: &mut CpuState, at: u64, data: &mut [u8], _: Privilege) -> Result<(), Exception> {
        data.copy_from_slice(&self.0[(at - MEMORY) as usize..][..data.len()]);
        Ok(())
    }
    fn write(&mut self, _: &mut CpuState, _: u64, _: &[u8], _: Privilege) -> Result<(), Exception> {
        unreachable!("these instructions write registers")
    }
    fn page_pointer(
        &mut self,
        _: &mut CpuState,
        _: u64,
        _: usize,
        _: bool,
        _: Privilege,
    ) -> Result<Option<*mut u8>, Exception> {
        Ok(None)
    }
    fn flush(&mut self, _: Flush) {}
    fn bus(&mut self) -> &mut dyn Bus {
        unreachable!("these instructions know no devices")
    }
    fn now(&self) -> Icount {
        Icount(0)
    }
    fn features(&self) -> &ModelFeatures {
        unreachable!("these instructions are in every model")
    }
}

/// A vCPU with SSE and AVX switched on, control word 0x37F and an empty stack.
fn vcpu() -> CpuState {
    let mut state = CpuState::long_mode_boot(0, 0, 0, 0, 0, 0xFF);
    state.cr4 |= control::CR4_OSFXSR | control::CR4_OSXSAVE;
    state.xcr0 = control::XCR0_X87 | control::XCR0_SSE | control::XCR0_AVX;
    state.fpu.0[..24].fill(0);
    set_word(&mut state, 0, NEAREST);
    state
}

fn word(state: &CpuState, at: usize) -> u16 {
    u16::from_le_bytes([state.fpu.0[at], state.fpu.0[at + 1]])
}

fn set_word(state: &mut CpuState, at: usize, value: u16) {
    state.fpu.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn register(state: &CpuState, index: usize) -> Extended {
    let at = 32 + 16 * index;
    let mut significand = [0; 8];
    significand.copy_from_slice(&state.fpu.0[at..at + 8]);
    Extended { head: word(state, at + 8), significand: u64::from_le_bytes(significand) }
}

/// ST(0), ST(1), ... in TOP = 6.
fn load(state: &mut CpuState, registers: &[Extended]) {
    set_word(state, 2, 6 << 11);
    for (i, value) in registers.iter().enumerate() {
        let at = 32 + 16 * i;
        state.fpu.0[at..at + 8].copy_from_slice(&value.significand.to_le_bytes());
        set_word(state, at + 8, value.head);
        state.fpu.0[4] |= 1 << ((6 + i) % 8);
    }
}

fn run(state: &mut CpuState, code: Code) -> Executed {
    execute(state, &Instruction::with(code), &mut Small([0; 64]))
}

const fn x(head: u16, significand: u64) -> Extended {
    Extended { head, significand }
}

/// Arguments with the exact result rounded to nearest and truncated, computed with 420 bits by another library.
#[test]
fn every_rounding_is_that_of_the_exact_result() {
    let mut count = 0;
    for line in include_str!("exact.txt").lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let value = |at: usize| Extended {
            head: u16::from_str_radix(words[at], 16).expect("hexadecimal"),
            significand: u64::from_str_radix(words[at + 1], 16).expect("hexadecimal"),
        };
        let (y, x, nearest, truncated) = (value(1), value(3), value(5), value(7));
        let results = [NEAREST, DOWN, UP, TRUNCATE].map(|control| compute(words[0], y, x, control));
        assert_eq!((results[0].value, results[3].value), (nearest, truncated), "{line}");
        let inexact = results[0].flags & flag::PRECISION != 0;
        let towards_zero = if nearest.negative() { results[2] } else { results[1] };
        let away = if nearest.negative() { results[1] } else { results[2] };
        assert_eq!(towards_zero.value, truncated, "{line}");
        assert_eq!(away.up, inexact, "{line}");
        assert_eq!(away.value != truncated, inexact, "{line}");
        assert_eq!(results[0].up, nearest != truncated, "{line}");
        count += 1;
    }
    assert!(count >= 300);
}

fn raised(result: Executed) -> Exception {
    match result {
        Err(crate::system::ExecError::Exception(exception)) => exception,
        other => panic!("{other:?} is not an exception"),
    }
}
