//! The models against exact values, the manual's tables, and themselves.

use super::extended::{Extended, Rounded, flag};
use super::transcendental::{Answer, arc_tangent, exponential, logarithm, trigonometric};
use iced_x86::Mnemonic;

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
