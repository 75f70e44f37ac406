//! The manual's tables for the x87: operands that are no ordinary numbers, exceptions, the stack, rounding.

use super::{Code, Exception, Extended, NEAREST, flag, load, raised, register, run, set_word, vcpu, word, x};

const ZERO: Extended = x(0, 0);
const MINUS_ZERO: Extended = x(0x8000, 0);
const ONE: Extended = x(0x3FFF, 1 << 63);
const MINUS_ONE: Extended = x(0xBFFF, 1 << 63);
const HALF: Extended = x(0x3FFE, 1 << 63);
const TWO: Extended = x(0x4000, 1 << 63);
const INFINITY: Extended = x(0x7FFF, 1 << 63);
const MINUS_INFINITY: Extended = x(0xFFFF, 1 << 63);
const INDEFINITE: Extended = x(0xFFFF, 3 << 62);
const PI: Extended = x(0x4000, 0xC90F_DAA2_2168_C235);
const QUARTER_PI: Extended = x(0x3FFE, 0xC90F_DAA2_2168_C235);

fn negated(value: Extended) -> Extended {
    x(value.head ^ 0x8000, value.significand)
}

/// Result of ST(0) = `top`, ST(1) = `second`, and the status word without TOP.
fn of(code: Code, top: Extended, second: Extended) -> (Extended, u16) {
    let mut state = vcpu();
    load(&mut state, &[top, second]);
    run(&mut state, code).expect("no exception");
    (register(&state, 0), word(&state, 2) & !0x3800)
}

#[test]
fn fpatan_table() {
    const UP_INEXACT: u16 = flag::PRECISION | 0x200;
    let cases = [
        (ZERO, ONE, ZERO, 0),
        (ZERO, ZERO, ZERO, 0),
        (ZERO, MINUS_ZERO, PI, UP_INEXACT),
        (ZERO, MINUS_ONE, PI, UP_INEXACT),
        (ONE, INFINITY, ZERO, 0),
        (ONE, MINUS_INFINITY, PI, UP_INEXACT),
        (ONE, ZERO, x(0x3FFF, PI.significand), UP_INEXACT),
        (INFINITY, ONE, x(0x3FFF, PI.significand), UP_INEXACT),
        (INFINITY, INFINITY, QUARTER_PI, UP_INEXACT),
        (INFINITY, MINUS_INFINITY, x(0x4000, 0x96CB_E3F9_990E_91A8), UP_INEXACT),
        (ONE, ONE, QUARTER_PI, UP_INEXACT),
    ];
    for (y, right, result, status) in cases {
        assert_eq!(of(Code::Fpatan, right, y), (result, status), "{y:x?} {right:x?}");
        assert_eq!(of(Code::Fpatan, right, negated(y)), (negated(result), status), "-{y:x?} {right:x?}");
    }
}

#[test]
fn fyl2x_table() {
    let invalid = (INDEFINITE, flag::INVALID);
    let pole = |value| (value, flag::ZERO_DIVIDE);
    let cases = [
        // x, y, y log2(x)
        (MINUS_INFINITY, ONE, invalid),
        (MINUS_ONE, ONE, invalid),
        (MINUS_ONE, ZERO, invalid),
        (ZERO, ZERO, invalid),
        (ZERO, ONE, pole(MINUS_INFINITY)),
        (MINUS_ZERO, MINUS_ONE, pole(INFINITY)),
        (ZERO, INFINITY, (MINUS_INFINITY, 0)),
        (HALF, INFINITY, (MINUS_INFINITY, 0)),
        (HALF, ZERO, (MINUS_ZERO, 0)),
        (HALF, ONE, (MINUS_ONE, 0)),
        (ONE, INFINITY, invalid),
        (ONE, MINUS_ONE, (MINUS_ZERO, 0)),
        (ONE, ONE, (ZERO, 0)),
        (TWO, MINUS_ONE, (MINUS_ONE, 0)),
        (TWO, INFINITY, (INFINITY, 0)),
        (INFINITY, ZERO, invalid),
        (INFINITY, MINUS_ONE, (MINUS_INFINITY, 0)),
        (INFINITY, INFINITY, (INFINITY, 0)),
    ];
    for (top, second, expected) in cases {
        assert_eq!(of(Code::Fyl2x, top, second), expected, "{top:x?} {second:x?}");
    }
    for (top, second, expected) in [
        (MINUS_ZERO, ONE, (MINUS_ZERO, 0)),
        (ZERO, MINUS_ONE, (MINUS_ZERO, 0)),
        (ZERO, INFINITY, invalid),
        (x(0xBFF0, 1 << 63), INFINITY, (MINUS_INFINITY, 0)),
        (INFINITY, ONE, (INFINITY, 0)),
    ] {
        assert_eq!(of(Code::Fyl2xp1, top, second), expected, "plus one: {top:x?} {second:x?}");
    }
}

#[test]
fn unary_tables() {
    for code in [Code::Fsin, Code::Fcos, Code::F2xm1] {
        for (nan, flags) in [(x(0x7FFF, 3 << 62 | 5), 0), (x(0x7FFF, 1 << 63 | 5), flag::INVALID)] {
            assert_eq!(of(code, nan, ONE), (x(0x7FFF, 3 << 62 | 5), flags));
        }
        assert_eq!(of(code, x(0x3FFF, 1), ONE), (INDEFINITE, flag::INVALID));
    }
    assert_eq!(of(Code::Fsin, INFINITY, ONE), (INDEFINITE, flag::INVALID));
    assert_eq!(of(Code::Fsin, MINUS_ZERO, ONE), (MINUS_ZERO, 0));
    assert_eq!(of(Code::Fcos, MINUS_ZERO, ONE), (ONE, 0));
    assert_eq!(of(Code::F2xm1, ONE, ONE), (ONE, 0));
    assert_eq!(of(Code::F2xm1, MINUS_ONE, ONE), (negated(HALF), 0));
    assert_eq!(of(Code::F2xm1, MINUS_ZERO, ONE), (MINUS_ZERO, 0));
    assert_eq!(of(Code::F2xm1, MINUS_INFINITY, ONE), (MINUS_ONE, 0));
    // Beyond what is defined: 2^2 - 1.
    assert_eq!(of(Code::F2xm1, TWO, ONE), (x(0x4000, 3 << 62), 0));
    // π of 66 bits: π of 64 bits is 2^-64 above it.
    assert_eq!(of(Code::Fsin, PI, ONE).0, x(0xBFBF, 1 << 63));
    assert_eq!(of(Code::Fsin, PI, ONE).1 & flag::PRECISION, flag::PRECISION);
}

#[test]
fn large_angles_are_left_alone() {
    for code in [Code::Fsin, Code::Fcos, Code::Fptan, Code::Fsincos] {
        let mut state = vcpu();
        load(&mut state, &[x(0xC03E, 1 << 63), ONE]);
        let before = state.clone();
        run(&mut state, code).expect("no exception");
        assert_eq!(word(&state, 2), 0x3400, "{code:?}");
        assert_eq!(state.fpu.0[4..160], before.fpu.0[4..160]);
    }
    assert_eq!(of(Code::Fsin, x(0x403D, u64::MAX), ONE).1 & 0x400, 0);
}

#[test]
fn two_results() {
    let mut state = vcpu();
    load(&mut state, &[MINUS_ZERO]);
    run(&mut state, Code::Fsincos).expect("no exception");
    assert_eq!((register(&state, 0), register(&state, 1)), (ONE, MINUS_ZERO));
    assert_eq!((word(&state, 2), state.fpu.0[4]), (5 << 11, 0x60));
    let mut state = vcpu();
    load(&mut state, &[QUARTER_PI]);
    run(&mut state, Code::Fptan).expect("no exception");
    assert_eq!((register(&state, 0), register(&state, 1)), (ONE, ONE));
}

#[test]
fn stack_faults() {
    // Too empty.
    let mut state = vcpu();
    load(&mut state, &[ONE]);
    run(&mut state, Code::Fpatan).expect("no exception");
    assert_eq!((register(&state, 0), word(&state, 2), state.fpu.0[4]), (INDEFINITE, 0x3841, 0x80));
    // Too full.
    let mut state = vcpu();
    load(&mut state, &[ONE; 8]);
    run(&mut state, Code::Fsincos).expect("no exception");
    assert_eq!((register(&state, 0), register(&state, 1)), (INDEFINITE, INDEFINITE));
    assert_eq!(word(&state, 2), 0x2A41);
}

#[test]
fn unmasked_errors_wait_for_the_next_instruction() {
    for (control, top, second, flags) in [
        (0x37E, MINUS_ONE, ONE, flag::INVALID),
        (0x37B, ZERO, ONE, flag::ZERO_DIVIDE),
        (0x37D, TWO, x(0, 1), flag::DENORMAL),
    ] {
        let mut state = vcpu();
        load(&mut state, &[top, second]);
        set_word(&mut state, 0, control);
        run(&mut state, Code::Fyl2x).expect("the error waits");
        assert_eq!((register(&state, 0), register(&state, 1)), (top, second));
        assert_eq!(word(&state, 2), 0x3000 | 0x8080 | flags);
        assert_eq!(raised(run(&mut state, Code::Fsin)), Exception::FloatingPoint);
    }
    // Overflow and underflow: the result is stored with another exponent. 2^16383 · 8 and 2^-16382 · log2(1 + 2^-63).
    for (control, top, second, head, flags) in [
        (0x377, x(0x4007, 1 << 63), x(0x7FFE, 1 << 63), 0x7FFE + 3 - 24576, flag::OVERFLOW),
        (0x36F, x(0x3FFF, 1 << 63 | 1), x(1, 1 << 63), 24576 + 1 - 63, flag::UNDERFLOW | flag::PRECISION),
    ] {
        let mut state = vcpu();
        load(&mut state, &[top, second]);
        set_word(&mut state, 0, control);
        run(&mut state, Code::Fyl2x).expect("the error waits");
        assert_eq!((register(&state, 0).head, word(&state, 2) & 0x80FF), (head, 0x8080 | flags));
        assert_eq!(raised(run(&mut state, Code::Fsin)), Exception::FloatingPoint);
    }
    // Masked, it overflows to infinity.
    assert_eq!(of(Code::Fyl2x, x(0x4007, 1 << 63), x(0x7FFE, 1 << 63)).0, INFINITY);
}

#[test]
fn denormal_results() {
    // sin of the smallest denormal is a little less: it depends on the direction.
    let mut state = vcpu();
    for (control, result) in [(NEAREST, x(0, 1)), (0xF7F, ZERO), (0x77F, ZERO), (0xB7F, x(0, 1))] {
        load(&mut state, &[x(0, 1)]);
        set_word(&mut state, 0, control);
        run(&mut state, Code::Fsin).expect("no exception");
        assert_eq!(register(&state, 0), result);
        let flags = flag::DENORMAL | flag::UNDERFLOW | flag::PRECISION;
        assert_eq!(word(&state, 2) & 0x7F, flags);
    }
}
