//! F2XM1, FCOS, FPATAN, FPTAN, FSIN, FSINCOS, FYL2X, FYL2XP1 (Intel SDM volume 2; volume 1, section 8.3.8 and 8.5).

use super::super::{Executed, System, retire, x87};
use super::extended::{Extended, Kind, Rounded, flag, round};
use super::functions::{self, PI};
use super::wide::Wide;
use crate::state::CpuState;
use iced_x86::{Instruction, Mnemonic};

const ST_BEGIN: usize = 32;
const C1: u16 = 1 << 9;
const C2: u16 = 1 << 10;
/// Error summary, and its copy "busy".
const SUMMARY: u16 = 0x8080;
/// Exceptions that are found before anything is computed: unmasked, they leave the operands alone.
const EARLY: u16 = flag::INVALID | flag::DENORMAL | flag::ZERO_DIVIDE | flag::STACK;
/// Arguments of trigonometric functions are smaller than 2^63.
const ANGLE_LIMIT: u16 = 16383 + 63;

/// What an instruction makes of its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A result, and for FSINCOS and FPTAN the value that is pushed on top of it.
    Value { result: Rounded, pushed: Option<Rounded> },
    /// The angle is too large: C2.
    Incomplete,
}

fn exact(value: Extended, flags: u16) -> Rounded {
    Rounded { value, flags, up: false }
}

fn invalid() -> Rounded {
    exact(Extended::INDEFINITE, flag::INVALID)
}

/// What the operands alone decide: NaNs and encodings that are none.
fn refused(a: Extended, b: Extended) -> Option<Rounded> {
    let kinds = [a.kind(), b.kind()];
    if kinds.contains(&Kind::Unsupported) {
        return Some(invalid());
    }
    let flags = if kinds.contains(&Kind::Signalling) { flag::INVALID } else { 0 };
    (a.is_nan() || b.is_nan()).then(|| exact(Extended::nan_of(a, b), flags))
}

fn denormal(operands: &[Extended]) -> u16 {
    let any = operands.iter().any(|operand| operand.kind() == Kind::Denormal);
    if any { flag::DENORMAL } else { 0 }
}

fn with(flags: u16, rounded: Rounded) -> Rounded {
    Rounded { flags: rounded.flags | flags, ..rounded }
}

/// F2XM1. Outside of -1 to 1, where the manual defines nothing, it is 2^x - 1 as well.
pub(super) fn exponential(x: Extended, control: u16) -> Rounded {
    if let Some(answer) = refused(x, x) {
        return answer;
    }
    match x.kind() {
        Kind::Zero => exact(x, 0),
        Kind::Infinity if x.negative() => exact(Extended { head: Extended::ONE.head | 0x8000, ..Extended::ONE }, 0),
        Kind::Infinity => exact(x, 0),
        _ => {
            let (value, is_exact) = functions::exponential_minus_one(x.wide());
            with(denormal(&[x]), round(value, is_exact, control))
        }
    }
}

/// FSIN, FCOS, FSINCOS and FPTAN.
pub(super) fn trigonometric(mnemonic: Mnemonic, x: Extended, control: u16) -> Answer {
    let two = matches!(mnemonic, Mnemonic::Fsincos | Mnemonic::Fptan);
    let same = |result: Rounded| Answer::Value { result, pushed: two.then_some(result) };
    if let Some(answer) = refused(x, x) {
        return same(answer);
    }
    let one = exact(Extended::ONE, 0);
    match x.kind() {
        Kind::Infinity => return same(invalid()),
        Kind::Zero if mnemonic == Mnemonic::Fcos => return Answer::Value { result: one, pushed: None },
        Kind::Zero => return Answer::Value { result: exact(x, 0), pushed: two.then_some(one) },
        _ if x.head & 0x7FFF >= ANGLE_LIMIT => return Answer::Incomplete,
        _ => {}
    }
    let flags = denormal(&[x]);
    let rounded = |value: Wide| with(flags, round(value, false, control));
    if mnemonic == Mnemonic::Fptan {
        return Answer::Value { result: rounded(functions::tangent(x.wide())), pushed: Some(one) };
    }
    let (sine, cosine) = functions::sine_cosine(x.wide());
    match mnemonic {
        Mnemonic::Fsin => Answer::Value { result: rounded(sine), pushed: None },
        Mnemonic::Fcos => Answer::Value { result: rounded(cosine), pushed: None },
        _ => Answer::Value { result: rounded(sine), pushed: Some(rounded(cosine)) },
    }
}

/// FPATAN: the angle of (`x`, `y`).
pub(super) fn arc_tangent(y: Extended, x: Extended, control: u16) -> Rounded {
    if let Some(answer) = refused(y, x) {
        return answer;
    }
    let flags = denormal(&[y, x]);
    let quarters = match (y.kind(), x.kind()) {
        (Kind::Infinity, Kind::Infinity) if x.negative() => 3,
        (Kind::Infinity, Kind::Infinity) => 1,
        (Kind::Infinity, _) => 2,
        (Kind::Zero, _) | (_, Kind::Infinity) if x.negative() => 4,
        (Kind::Zero, _) | (_, Kind::Infinity) => return exact(Extended::zero(y.negative()), flags),
        (_, Kind::Zero) => 2,
        _ => return with(flags, round(functions::arc_tangent(y.wide(), x.wide()), false, control)),
    };
    let angle = PI.times(Wide::integer(quarters)).scaled(-2);
    with(flags, round(Wide { negative: y.negative(), ..angle }, false, control))
}

/// FYL2X: y · log2(x); FYL2XP1 with `plus_one`: y · log2(x + 1). The manual leaves the latter undefined outside of
/// √½ - 1 to √2 - 1: it is the same function there.
pub(super) fn logarithm(y: Extended, x: Extended, plus_one: bool, control: u16) -> Rounded {
    if let Some(answer) = refused(y, x) {
        return answer;
    }
    let (y_kind, x_kind) = (y.kind(), x.kind());
    let flags = denormal(&[y, x]);
    let minus_one = Extended { head: Extended::ONE.head | 0x8000, ..Extended::ONE };
    let is_pole = if plus_one { x == minus_one } else { x_kind == Kind::Zero };
    let is_root = if plus_one { x_kind == Kind::Zero } else { x == Extended::ONE };
    if is_pole {
        // The logarithm is -∞.
        return match y_kind {
            Kind::Zero => invalid(),
            Kind::Infinity => exact(Extended::infinity(!y.negative()), 0),
            // Also of a denormal: division by zero comes first.
            _ => exact(Extended::infinity(!y.negative()), flag::ZERO_DIVIDE),
        };
    }
    let below_pole = if plus_one {
        x.negative() && (x_kind == Kind::Infinity || x.head & 0x7FFF >= Extended::ONE.head)
    } else {
        x.negative()
    };
    if below_pole {
        return invalid();
    }
    if is_root {
        // log2(1 + x) has the sign of x, and log2(1) is positive.
        let negative = y.negative() != (plus_one && x.negative());
        return if y_kind == Kind::Infinity { invalid() } else { exact(Extended::zero(negative), flags) };
    }
    if x_kind == Kind::Infinity {
        return if y_kind == Kind::Zero { invalid() } else { exact(Extended::infinity(y.negative()), flags) };
    }
    let (value, is_exact) =
        if plus_one { functions::logarithm_plus_one(x.wide()) } else { functions::logarithm(x.wide()) };
    let negative = y.negative() != value.negative;
    match y_kind {
        Kind::Infinity => exact(Extended::infinity(negative), flags),
        Kind::Zero => exact(Extended::zero(negative), flags),
        _ => with(flags, round(y.wide().times(value), is_exact, control)),
    }
}

/// The x87 registers in their image, which has them in stack order.
struct Registers<'a> {
    state: &'a mut CpuState,
}

impl Registers<'_> {
    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.state.fpu.0[at], self.state.fpu.0[at + 1]])
    }

    fn control(&self) -> u16 {
        self.word(0)
    }

    fn physical(&self, index: usize) -> usize {
        (x87::top(self.state) + index) % 8
    }

    fn get(&self, index: usize) -> Option<Extended> {
        if self.state.fpu.0[4] >> self.physical(index) & 1 == 0 {
            return None;
        }
        let at = ST_BEGIN + index * 16;
        let mut significand = [0; 8];
        significand.copy_from_slice(&self.state.fpu.0[at..at + 8]);
        Some(Extended { head: self.word(at + 8), significand: u64::from_le_bytes(significand) })
    }

    fn set(&mut self, index: usize, value: Extended) {
        self.state.fpu.0[4] |= 1 << self.physical(index);
        let at = ST_BEGIN + index * 16;
        self.state.fpu.0[at..at + 8].copy_from_slice(&value.significand.to_le_bytes());
        self.state.fpu.0[at + 8..at + 10].copy_from_slice(&value.head.to_le_bytes());
    }

    fn set_status(&mut self, value: u16) {
        self.state.fpu.0[2..4].copy_from_slice(&value.to_le_bytes());
    }

    fn turn(&mut self, top: usize) {
        let steps = (top + 8 - x87::top(self.state)) % 8;
        self.state.fpu.0[ST_BEGIN..ST_BEGIN + 128].rotate_left(steps * 16);
        let status = self.word(2) & !0x3800 | (top as u16) << 11;
        self.set_status(status);
    }

    fn push(&mut self, value: Extended) {
        self.turn(self.physical(7));
        self.set(0, value);
    }

    fn pop(&mut self) {
        self.state.fpu.0[4] &= !(1 << self.physical(0));
        self.turn(self.physical(1));
    }

    /// Records what an instruction raised. True if one of the exceptions keeps it from storing anything.
    fn raise(&mut self, flags: u16, up: bool, clears_c2: bool) -> bool {
        let unmasked = flags & !self.control() & 0x3F;
        let early = unmasked & EARLY != 0;
        // Nothing has been computed then.
        let (flags, up) = if early { (flags & EARLY, up && flags & flag::STACK != 0) } else { (flags, up) };
        let mut status = self.word(2) & !C1;
        if clears_c2 {
            status &= !C2;
        }
        status |= flags | if up { C1 } else { 0 };
        if unmasked != 0 {
            status |= SUMMARY;
        }
        self.set_status(status);
        early
    }
}

/// Executes one of them.
pub(in super::super) fn execute(state: &mut CpuState, instr: &Instruction, _: &mut dyn System) -> Executed {
    x87::check_waiting(state)?;
    let mnemonic = instr.mnemonic();
    let mut registers = Registers { state };
    match mnemonic {
        Mnemonic::F2xm1 => {
            let control = registers.control();
            let result = match registers.get(0) {
                Some(x) => exponential(x, control),
                None => stack_fault(),
            };
            if !registers.raise(result.flags, result.up, false) {
                registers.set(0, result.value);
            }
        }
        Mnemonic::Fpatan | Mnemonic::Fyl2x | Mnemonic::Fyl2xp1 => {
            let control = registers.control();
            let result = match (registers.get(1), registers.get(0)) {
                (Some(y), Some(x)) if mnemonic == Mnemonic::Fpatan => arc_tangent(y, x, control),
                (Some(y), Some(x)) => logarithm(y, x, mnemonic == Mnemonic::Fyl2xp1, control),
                _ => stack_fault(),
            };
            if !registers.raise(result.flags, result.up, false) {
                registers.pop();
                registers.set(0, result.value);
            }
        }
        _ => angle(&mut registers, mnemonic),
    }
    retire(state, instr)
}

/// The masked response to a stack underflow.
fn stack_fault() -> Rounded {
    exact(Extended::INDEFINITE, flag::INVALID | flag::STACK)
}

fn angle(registers: &mut Registers, mnemonic: Mnemonic) {
    let two = matches!(mnemonic, Mnemonic::Fsincos | Mnemonic::Fptan);
    let answer = match registers.get(0) {
        Some(_) if two && registers.get(7).is_some() => {
            // An overflow of the stack is told by C1.
            let fault = Rounded { up: true, ..stack_fault() };
            Answer::Value { result: fault, pushed: Some(fault) }
        }
        Some(x) => trigonometric(mnemonic, x, registers.control()),
        None => Answer::Value { result: stack_fault(), pushed: two.then(stack_fault) },
    };
    match answer {
        Answer::Incomplete => {
            let status = registers.word(2) & !C1 | C2;
            registers.set_status(status);
        }
        Answer::Value { result, pushed } => {
            let flags = result.flags | pushed.map_or(0, |pushed| pushed.flags);
            // Of the two roundings of FSINCOS, C1 tells the sine's.
            if registers.raise(flags, result.up, true) {
                return;
            }
            registers.set(0, result.value);
            if let Some(pushed) = pushed {
                registers.push(pushed.value);
            }
        }
    }
}
