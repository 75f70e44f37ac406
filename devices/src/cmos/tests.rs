use proptest::prelude::*;

use super::*;
use crate::testing::{Bench, assert_round_trip, fuzz, steps};

fn get(bench: &mut Bench, cmos: &mut Cmos, index: u8) -> u8 {
    bench.write(cmos, 0, 1, u64::from(index));
    bench.read(cmos, 1, 1) as u8
}

fn set(bench: &mut Bench, cmos: &mut Cmos, index: u8, value: u8) {
    bench.write(cmos, 0, 1, u64::from(index));
    bench.write(cmos, 1, 1, u64::from(value));
}

#[test]
fn shows_the_start_date_and_virtual_time() {
    let (mut bench, mut cmos) = (Bench::new(), Cmos::new(1_767_225_600));
    bench.now = 3_725 * SECOND_NS;
    let face: Vec<u8> = [0, 2, 4, 6, 7, 8, 9, 0x32].map(|index| get(&mut bench, &mut cmos, index)).into();
    assert_eq!(face, [0x05, 0x02, 0x01, 0x05, 0x01, 0x01, 0x26, 0x20]);
    assert_eq!(get(&mut bench, &mut cmos, register::D), 0x80);
}

#[test]
fn update_in_progress_comes_before_each_second() {
    let (mut bench, mut cmos) = (Bench::new(), Cmos::new(0));
    assert_eq!(get(&mut bench, &mut cmos, register::A), 0x26);
    bench.now = SECOND_NS - UPDATE_NS;
    assert_eq!(get(&mut bench, &mut cmos, register::A), 0xA6);
    bench.now = SECOND_NS;
    assert_eq!(get(&mut bench, &mut cmos, register::A), 0x26);
}

#[test]
fn the_guest_sets_the_time() {
    let (mut bench, mut cmos) = (Bench::new(), Cmos::new(0));
    bench.now = 10 * SECOND_NS;
    set(&mut bench, &mut cmos, register::B, 0x82);
    for (index, value) in [(0, 0x59), (2, 0x59), (4, 0x23), (7, 0x28), (8, 0x02), (9, 0x24), (0x32, 0x20)] {
        set(&mut bench, &mut cmos, index, value);
    }
    bench.now = 20 * SECOND_NS;
    set(&mut bench, &mut cmos, register::B, 0x02);
    assert_eq!(get(&mut bench, &mut cmos, register::SECONDS), 0x59);
    bench.now = 21 * SECOND_NS;
    assert_eq!(get(&mut bench, &mut cmos, register::DAY_OF_MONTH), 0x29);
    assert_eq!(get(&mut bench, &mut cmos, register::SECONDS), 0x00);
}

#[test]
fn the_alarm_interrupts_when_the_time_matches() {
    let (mut bench, mut cmos) = (Bench::new(), Cmos::new(0));
    set(&mut bench, &mut cmos, register::SECONDS_ALARM, 0x30);
    set(&mut bench, &mut cmos, register::MINUTES_ALARM, 0x01);
    set(&mut bench, &mut cmos, register::HOURS_ALARM, 0xFF);
    set(&mut bench, &mut cmos, register::B, 0x22);
    let due = bench.wake(INTERRUPT_TOKEN).unwrap();
    assert_eq!(due, 90 * SECOND_NS);
    bench.take();
    bench.now = due;
    bench.event(&mut cmos, INTERRUPT_TOKEN);
    assert!(bench.take().contains(&Effect::Line { gsi: 8, level: true }));
    // The periodic flag is set by time alone, enabled or not.
    assert_eq!(get(&mut bench, &mut cmos, register::C), 0xF0);
    assert!(bench.effects.contains(&Effect::Line { gsi: 8, level: false }));
    assert_eq!(bench.wake(INTERRUPT_TOKEN), Some((3600 + 90) * SECOND_NS));
}

#[test]
fn the_periodic_interrupt_does_not_drift() {
    let (mut bench, mut cmos) = (Bench::new(), Cmos::new(0));
    set(&mut bench, &mut cmos, register::B, 0x42);
    for tick in 1..=1024u64 {
        bench.now = bench.wake(INTERRUPT_TOKEN).unwrap();
        assert_eq!(bench.now, (tick * SECOND_NS).div_ceil(1024));
        bench.event(&mut cmos, INTERRUPT_TOKEN);
        assert_eq!(get(&mut bench, &mut cmos, register::C) & 0xC0, 0xC0);
    }
    assert_eq!(bench.now, SECOND_NS);
}

proptest! {
    #[test]
    fn nothing_panics(steps in steps(2), date in any::<u64>()) {
        let mut cmos = Cmos::new(date);
        let mut twin = assert_round_trip(&cmos);
        prop_assert_eq!(fuzz(&mut cmos, &steps), fuzz(&mut twin, &steps));
        assert_round_trip(&cmos);
    }
}
