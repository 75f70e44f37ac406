use proptest::prelude::*;

use super::*;
use crate::VirtualNs;
use crate::testing::{Bench, assert_round_trip, fuzz, steps};

fn enabled(bench: &mut Bench, config: LapicConfig) -> LocalApic {
    let mut lapic = LocalApic::new(config, 1);
    bench.write(&mut lapic, 0xF0, 4, 0x1FF);
    lapic
}

fn x2apic(bench: &mut Bench) -> LocalApic {
    let mut lapic = enabled(bench, LapicConfig::default());
    lapic.msr_write(&mut bench.context(), MSR_APIC_BASE, 0xFEE0_0D00).unwrap();
    lapic
}

#[test]
fn higher_classes_interrupt_lower_ones() {
    let mut bench = Bench::new();
    let mut lapic = enabled(&mut bench, LapicConfig::default());
    lapic.set_irq(0x31, false);
    lapic.set_irq(0x52, true);
    assert_eq!(lapic.interrupt(), Some(0x52));
    assert_eq!(lapic.acknowledge(), 0x52);
    assert_eq!(lapic.interrupt(), None);
    lapic.set_irq(0x5F, false);
    assert_eq!(lapic.interrupt(), None);
    lapic.set_irq(0x60, false);
    assert_eq!(lapic.acknowledge(), 0x60);
    bench.write(&mut lapic, 0xB0, 4, 0);
    assert_eq!(bench.take(), vec![]);
    bench.write(&mut lapic, 0xB0, 4, 0);
    assert_eq!(bench.take(), vec![Effect::EndOfInterrupt { vector: 0x52 }]);
    assert_eq!(lapic.acknowledge(), 0x5F);
    bench.write(&mut lapic, 0xB0, 4, 0);
    lapic.set_task_priority(3);
    assert_eq!(lapic.interrupt(), None);
    lapic.set_task_priority(2);
    assert_eq!(lapic.interrupt(), Some(0x31));
}

#[test]
fn software_disabled_takes_nothing() {
    let mut lapic = LocalApic::new(LapicConfig::default(), 1);
    lapic.set_irq(0x40, false);
    assert_eq!(lapic.interrupt(), None);
}

#[test]
fn an_nmi_to_itself_waits_until_it_is_taken() {
    let mut bench = Bench::new();
    let mut lapic = enabled(&mut bench, LapicConfig::default());
    // To another processor, and with a shorthand, which is not valid.
    bench.write(&mut lapic, 0x310, 4, 1 << 24);
    bench.write(&mut lapic, 0x300, 4, 0x400);
    bench.write(&mut lapic, 0x300, 4, 0x4_0400);
    assert!(!lapic.nmi_pending());
    bench.write(&mut lapic, 0x310, 4, 0);
    bench.write(&mut lapic, 0x300, 4, 0x400);
    bench.write(&mut lapic, 0x300, 4, 0x400);
    assert!(lapic.nmi_pending());
    assert_eq!(lapic.interrupt(), None);
    lapic.acknowledge_nmi();
    assert!(!lapic.nmi_pending());
}

#[test]
fn self_interrupts_arrive_in_both_modes() {
    let mut bench = Bench::new();
    let mut lapic = enabled(&mut bench, LapicConfig::default());
    bench.write(&mut lapic, 0x300, 4, 0x4_0041);
    assert_eq!(lapic.acknowledge(), 0x41);
    bench.write(&mut lapic, 0x310, 4, 0);
    bench.write(&mut lapic, 0x300, 4, 0x51);
    assert_eq!(lapic.acknowledge(), 0x51);
    bench.write(&mut lapic, 0x310, 4, 1 << 24);
    bench.write(&mut lapic, 0x300, 4, 0x61);
    assert_eq!(lapic.interrupt(), None);

    let mut lapic = x2apic(&mut bench);
    lapic.msr_write(&mut bench.context(), 0x83F, 0x42).unwrap();
    assert_eq!(lapic.acknowledge(), 0x42);
    lapic.msr_write(&mut bench.context(), 0x830, 0x52).unwrap();
    assert_eq!(lapic.acknowledge(), 0x52);
    lapic.msr_write(&mut bench.context(), 0x830, 1 << 32 | 0x800 | 0x62).unwrap();
    assert_eq!(lapic.acknowledge(), 0x62);
}

#[test]
fn illegal_vectors_are_reported() {
    let mut bench = Bench::new();
    let mut lapic = enabled(&mut bench, LapicConfig::default());
    bench.write(&mut lapic, 0x370, 4, 0xFE);
    lapic.set_irq(3, false);
    bench.write(&mut lapic, 0x280, 4, 0);
    assert_eq!(bench.read(&mut lapic, 0x280, 4), 0x40);
    assert_eq!(lapic.acknowledge(), 0xFE);
}

#[test]
fn modes_change_only_as_they_may() {
    let mut bench = Bench::new();
    let mut lapic = LocalApic::new(LapicConfig::default(), 1);
    let refused = |lapic: &mut LocalApic, bench: &mut Bench, value| {
        lapic.msr_write(&mut bench.context(), MSR_APIC_BASE, value).is_err()
    };
    assert_eq!(lapic.msr_read(VirtualNs(0), MSR_APIC_BASE), Ok(0xFEE0_0900));
    assert!(lapic.msr_read(VirtualNs(0), 0x802).is_err());
    assert!(refused(&mut lapic, &mut bench, 0xFEE0_0500));
    assert!(refused(&mut lapic, &mut bench, 0xFED0_0900));
    assert!(!refused(&mut lapic, &mut bench, 0xFEE0_0D00));
    assert_eq!(bench.read(&mut lapic, 0x30, 4), 0xFFFF_FFFF);
    assert_eq!(lapic.msr_read(VirtualNs(0), 0x803), Ok(0x0005_0014));
    assert_eq!(lapic.msr_read(VirtualNs(0), 0x80D), Ok(1));
    assert!(refused(&mut lapic, &mut bench, 0xFEE0_0900));
    assert!(!refused(&mut lapic, &mut bench, 0xFEE0_0100));
    assert!(refused(&mut lapic, &mut bench, 0xFEE0_0D00));
    assert!(!refused(&mut lapic, &mut bench, 0xFEE0_0900));
}

#[test]
fn x2apic_refuses_reserved_bits() {
    let mut bench = Bench::new();
    let mut lapic = x2apic(&mut bench);
    for (msr, value) in [(0x80B, 1), (0x828, 1), (0x802, 0), (0x80E, 0), (0x808, 0x100), (0x832, 1 << 20)] {
        assert!(lapic.msr_write(&mut bench.context(), msr, value).is_err(), "{msr:#x}");
    }
    assert!(lapic.msr_write(&mut bench.context(), 0x80B, 0).is_ok());
}

#[test]
fn one_shot_counts_down_and_interrupts_once() {
    let mut bench = Bench::new();
    let mut lapic = enabled(&mut bench, LapicConfig::default());
    bench.write(&mut lapic, 0x320, 4, 0x30);
    bench.write(&mut lapic, 0x3E0, 4, 0x3);
    bench.now = 1_000;
    bench.write(&mut lapic, 0x380, 4, 100);
    assert_eq!(bench.wake(TIMER_TOKEN), Some(1_000 + 1_600));
    bench.now = 1_000 + 160;
    assert_eq!(bench.read(&mut lapic, 0x390, 4), 90);
    bench.event(&mut lapic, TIMER_TOKEN);
    assert_eq!(lapic.interrupt(), None);
    bench.now = 2_600;
    bench.event(&mut lapic, TIMER_TOKEN);
    assert_eq!(lapic.acknowledge(), 0x30);
    assert_eq!(bench.read(&mut lapic, 0x390, 4), 0);
    assert_eq!(lapic.next_timer_ns(), None);
}

#[test]
fn periodic_does_not_drift_with_its_delays() {
    let mut bench = Bench::new();
    let config = LapicConfig { timer_latency: Latency { base_ns: 0, jitter_ns: 900 }, ..Default::default() };
    let mut lapic = enabled(&mut bench, config);
    bench.write(&mut lapic, 0x320, 4, 0x2_0030);
    bench.write(&mut lapic, 0x3E0, 4, 0xB);
    bench.write(&mut lapic, 0x380, 4, 10_000);
    let mut delays = Vec::new();
    for period in 1..=50u64 {
        bench.now = lapic.next_timer_ns().unwrap();
        assert!((period * 10_000..=period * 10_000 + 900).contains(&bench.now));
        delays.push(bench.now % 10_000);
        bench.event(&mut lapic, TIMER_TOKEN);
        assert_eq!(lapic.acknowledge(), 0x30);
        bench.write(&mut lapic, 0xB0, 4, 0);
    }
    delays.sort_unstable();
    delays.dedup();
    assert!(delays.len() > 25);
}

#[test]
fn the_deadline_is_in_ticks() {
    let mut bench = Bench::new();
    let mut lapic = enabled(&mut bench, LapicConfig { tsc_khz: 3_000_000, ..Default::default() });
    assert!(lapic.msr_write(&mut bench.context(), MSR_TSC_DEADLINE, 5).is_ok());
    assert_eq!(lapic.msr_read(VirtualNs(0), MSR_TSC_DEADLINE), Ok(0));
    bench.write(&mut lapic, 0x320, 4, 0x4_0030);
    lapic.msr_write(&mut bench.context(), MSR_TSC_DEADLINE, 3_001).unwrap();
    assert_eq!(bench.wake(TIMER_TOKEN), Some(1_001));
    assert_eq!(lapic.msr_read(VirtualNs(0), MSR_TSC_DEADLINE), Ok(3_001));
    bench.now = 1_001;
    bench.event(&mut lapic, TIMER_TOKEN);
    assert_eq!(lapic.acknowledge(), 0x30);
    assert_eq!(lapic.msr_read(VirtualNs(0), MSR_TSC_DEADLINE), Ok(0));
    // A deadline in the past is due at once; zero disarms.
    lapic.msr_write(&mut bench.context(), MSR_TSC_DEADLINE, 1).unwrap();
    assert_eq!(bench.wake(TIMER_TOKEN), Some(1_001));
    lapic.msr_write(&mut bench.context(), MSR_TSC_DEADLINE, 0).unwrap();
    assert_eq!(bench.wake(TIMER_TOKEN), None);
}

#[test]
fn a_tiny_period_does_not_flood_the_machine() {
    let mut bench = Bench::new();
    let mut lapic = enabled(&mut bench, LapicConfig::default());
    bench.write(&mut lapic, 0x320, 4, 0x2_0030);
    bench.write(&mut lapic, 0x3E0, 4, 0xB);
    bench.write(&mut lapic, 0x380, 4, 1);
    bench.now = lapic.next_timer_ns().unwrap();
    bench.event(&mut lapic, TIMER_TOKEN);
    assert!(lapic.next_timer_ns().unwrap() >= bench.now + 999);
}

proptest! {
    #[test]
    fn nothing_panics(steps in steps(0x1000), msrs in proptest::collection::vec((0x800..0x840u32, any::<u64>()), 0..40),
                      seed in any::<u64>()) {
        let mut bench = Bench::new();
        let config = LapicConfig { tsc_khz: 1_000_000, timer_latency: Latency { base_ns: 1, jitter_ns: 500 } };
        let mut lapic = LocalApic::new(config, seed);
        let mut twin = assert_round_trip(&lapic);
        prop_assert_eq!(fuzz(&mut lapic, &steps), fuzz(&mut twin, &steps));
        let _ = lapic.msr_write(&mut bench.context(), MSR_APIC_BASE, 0xFEE0_0D00);
        for (msr, value) in msrs {
            for value in [value, value & 0xFF, value & 0x7_00FF] {
                let _ = lapic.msr_write(&mut bench.context(), msr, value);
                let _ = lapic.msr_write(&mut bench.context(), MSR_TSC_DEADLINE, value);
            }
            let _ = lapic.msr_read(VirtualNs(bench.now), msr);
            lapic.set_irq(value as u8, value & 0x100 != 0);
            lapic.acknowledge();
            bench.now += value & 0xFFFF;
            bench.event(&mut lapic, TIMER_TOKEN);
        }
        assert_round_trip(&lapic);
    }
}
