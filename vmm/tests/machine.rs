//! The machine as a library: how runs end, that stopping does not matter, that nothing but the four arguments does.
#![allow(missing_docs)]

mod common;

use common::*;
use iced_x86::code_asm::*;
use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_devices::VirtualNs;
use orrery_guest_image::Image;
use orrery_vmm::chain::Hash;
use orrery_vmm::inputs::{Input, InputChannel};
use orrery_vmm::run::Ended;
use orrery_vmm::verify::locate;
use orrery_vmm::{Limits, Machine, MachineConfig, Pause, Seed};

fn machine(image: &Image) -> Machine {
    Machine::new(image, &small(), SEED, EngineConfig::default()).expect("the machine is built")
}

fn text(machine: &mut Machine) -> String {
    machine.take_output().iter().map(|output| String::from_utf8_lossy(&output.bytes).into_owned()).collect()
}

fn run_to_end(machine: &mut Machine) -> Ended {
    match machine.run(Limits::until(Icount(1 << 32))).expect("no inputs") {
        Pause::Ended(ended) => ended,
        pause => panic!("{pause:?} at {:?}", machine.icount()),
    }
}

#[test]
fn a_guest_prints_and_powers_off() {
    let mut machine = machine(&guest(|a| {
        print(a, "hello\n");
        exit(a, 42);
    }));
    assert_eq!(run_to_end(&mut machine), Ended::PowerOff { code: 42 });
    assert_eq!(text(&mut machine), "hello\n");
    // mov dx; 6 * (mov, out); mov al; mov dx; out.
    assert_eq!(machine.icount(), Icount(1 + 12 + 3));
}

/// Sends itself an NMI, and another from its handler; exits with 16 * (how many came) + how many had come when the
/// handler was about to return for the first time. `repeated`: sent by the first element of a string instruction.
fn nmi_guest(repeated: bool) -> Image {
    guest(|a| {
        const COMMAND: u32 = 0xFEE0_0300;
        let (mut start, mut handler, mut done) = (a.create_label(), a.create_label(), a.create_label());
        let send = |a: &mut CodeAssembler| {
            if repeated {
                a.mov(edi, COMMAND).unwrap();
                a.mov(ecx, 4).unwrap();
                a.mov(eax, 0x400).unwrap();
                return a.rep().stosd().unwrap();
            }
            a.mov(ebx, COMMAND).unwrap();
            a.mov(dword_ptr(rbx), 0x400u32).unwrap();
        };
        a.jmp(start).unwrap();
        a.set_label(&mut handler).unwrap();
        a.inc(r15d).unwrap();
        a.cmp(r15d, 1).unwrap();
        a.jne(done).unwrap();
        send(a);
        a.nop().unwrap();
        a.mov(r14d, r15d).unwrap();
        a.set_label(&mut done).unwrap();
        a.iretq().unwrap();
        a.set_label(&mut start).unwrap();
        a.mov(rdi, DATA).unwrap();
        a.lea(rax, ptr(handler)).unwrap();
        // The gate of vector 2: all of the guest lies below 2^32, its code segment is 0x10.
        a.mov(word_ptr(rdi + 32), ax).unwrap();
        a.mov(word_ptr(rdi + 36), 0x8E00u32).unwrap();
        a.mov(word_ptr(rdi + 34), 0x10u32).unwrap();
        a.shr(eax, 16).unwrap();
        a.mov(word_ptr(rdi + 38), ax).unwrap();
        a.mov(qword_ptr(rdi + 40), 0).unwrap();
        a.mov(word_ptr(rdi + 0x100), 0xFFFu32).unwrap();
        a.mov(qword_ptr(rdi + 0x102), rdi).unwrap();
        a.lidt(ptr(rdi + 0x100)).unwrap();
        a.xor(r15d, r15d).unwrap();
        a.xor(r14d, r14d).unwrap();
        send(a);
        a.nop().unwrap();
        a.mov(eax, r15d).unwrap();
        a.shl(eax, 4).unwrap();
        a.or(eax, r14d).unwrap();
        exit_al(a);
    })
}

#[test]
fn an_nmi_to_itself_is_taken_at_once_and_one_at_a_time() {
    let mut machine = machine(&nmi_guest(false));
    assert_eq!(run_to_end(&mut machine), Ended::PowerOff { code: 0x21 });
}

#[test]
fn stopping_does_not_matter_to_nmis() {
    let mut whole = machine(&nmi_guest(false));
    run_to_end(&mut whole);
    let mut stepped = machine(&nmi_guest(false));
    while stepped.ended().is_none() {
        let limit = Icount(stepped.icount().0 + 1);
        stepped.run(Limits::until(limit)).expect("no inputs");
    }
    assert_eq!(stepped.icount(), whole.icount());
    assert_eq!(stepped.state_hash(), whole.state_hash());
}

#[test]
fn nothing_comes_in_the_middle_of_a_string_instruction() {
    let image = nmi_guest(true);
    let mut whole = machine(&image);
    assert_eq!(run_to_end(&mut whole), Ended::PowerOff { code: 0x21 });
    let engine = EngineConfig { patience: 1, ..EngineConfig::default() };
    let mut parts = Machine::new(&image, &small(), SEED, engine).expect("the machine is built");
    let limits = Limits { pause_when_long: true, ..Limits::NONE };
    let mut pauses = 0;
    while parts.run(limits).expect("no inputs") == Pause::Unfinished {
        assert!(parts.is_unfinished() && !parts.at_moment());
        pauses += 1;
    }
    assert_eq!(pauses, 6, "three between the four elements of each of two");
    assert_eq!(parts.icount(), whole.icount());
    assert_eq!(parts.state_hash(), whole.state_hash());
}

#[test]
fn halting_with_interrupts_off_ends_the_run() {
    let mut machine = machine(&guest(|a| {
        a.cli().unwrap();
        a.hlt().unwrap();
    }));
    assert_eq!(run_to_end(&mut machine), Ended::HaltedForever { rip: LOAD + 2 });
    assert_eq!(machine.icount(), Icount(2));
}

#[test]
fn idling_with_nothing_to_come_ends_the_run() {
    let mut machine = machine(&guest(|a| {
        a.sti().unwrap();
        a.hlt().unwrap();
    }));
    assert_eq!(run_to_end(&mut machine), Ended::IdleForever { rip: LOAD + 2 });
}

#[test]
fn an_undeliverable_exception_is_a_triple_fault() {
    let mut machine = machine(&guest(|a| {
        a.nop().unwrap();
        a.ud2().unwrap();
    }));
    let Ended::TripleFault { registers } = run_to_end(&mut machine) else { panic!("{:?}", machine.ended()) };
    assert!(registers.contains(&format!("rip {:016x}", LOAD + 1)), "{registers}");
    assert_eq!(machine.icount(), Icount(1));
}

#[test]
fn garbage_ends_in_some_way() {
    let mut bytes = [0u8; 4096];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = blake3::hash(&index.to_le_bytes()).as_bytes()[0];
    }
    let mut machine = machine(&image_of(&bytes));
    let pause = machine.run(Limits::until(Icount(1_000_000))).unwrap();
    assert!(matches!(pause, Pause::Ended(_) | Pause::Limit), "{pause:?}");
}

#[test]
fn equal_arguments_give_equal_states_and_seeds_matter() {
    let image = busy(2000);
    let final_hash = |seed, engine| -> Hash {
        let mut machine = Machine::new(&image, &small(), seed, engine).unwrap();
        assert_eq!(run_to_end(&mut machine), Ended::PowerOff { code: 0 });
        machine.state_hash()
    };
    let first = final_hash(Seed(1), EngineConfig::default());
    assert_eq!(first, final_hash(Seed(1), EngineConfig::default()));
    assert_ne!(first, final_hash(Seed(2), EngineConfig::default()));
    let odd = EngineConfig {
        tlb_bits: 2,
        chaining: false,
        max_block_instructions: 1,
        chaos_seed: Some(9),
        ..Default::default()
    };
    assert_eq!(first, final_hash(Seed(1), odd));
}

#[test]
fn stopping_does_not_matter() {
    let image = busy(500);
    let mut whole = machine(&image);
    run_to_end(&mut whole);
    let expected = whole.state_hash();
    for step in [1, 7, 1000] {
        let mut stopped = machine(&image);
        let mut at = 0;
        loop {
            at += step;
            match stopped.run(Limits::until(Icount(at))).unwrap() {
                Pause::Limit => assert_eq!(stopped.icount(), Icount(at)),
                Pause::Ended(_) => break,
                pause => panic!("{pause:?}"),
            }
            if at % (step * 97) == 0 {
                stopped.state_hash();
            }
        }
        assert_eq!(stopped.state_hash(), expected, "in steps of {step}");
    }
}

#[test]
fn the_hash_of_a_moment_does_not_depend_on_the_way_there() {
    let image = busy(500);
    let at = Limits::until(Icount(3001));
    let mut direct = machine(&image);
    direct.run(at).unwrap();
    let mut hashed = machine(&image);
    for icount in (0..3001).step_by(100) {
        hashed.run(Limits::until(Icount(icount))).unwrap();
        hashed.state_hash();
    }
    hashed.run(at).unwrap();
    assert_eq!(direct.state_hash(), hashed.state_hash());
}

#[test]
fn an_endless_loop_of_one_instruction_goes_on() {
    let mut machine = machine(&guest(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.jmp(again).unwrap();
    }));
    for icount in [1, 2, 3, 1000, 1001, 50_000_000] {
        assert_eq!(machine.run(Limits::until(Icount(icount))).unwrap(), Pause::Limit);
        assert_eq!(machine.icount(), Icount(icount));
    }
}

/// A guest with an IDT whose timer handler (vector 0x40) counts in R15 and whose main loop halts until it has
/// counted to `ticks`.
fn ticking(ticks: u32, period_ns: u32) -> Image {
    guest(|a| {
        let (idt, idtr) = (DATA, DATA + 0x1000);
        let mut handler = a.create_label();
        let mut main = a.create_label();
        a.lea(rax, ptr(handler)).unwrap();
        // A 64-bit interrupt gate (Intel SDM volume 3, 6.14.1).
        a.mov(rdi, idt + 0x40 * 16).unwrap();
        a.mov(word_ptr(rdi), ax).unwrap();
        a.mov(dword_ptr(rdi + 2), 0x8E00_0010u32 as i32).unwrap();
        a.mov(word_ptr(rdi + 2), 0x10).unwrap();
        a.mov(word_ptr(rdi + 4), 0x8E00u32).unwrap();
        a.shr(rax, 16).unwrap();
        a.mov(word_ptr(rdi + 6), ax).unwrap();
        a.shr(rax, 16).unwrap();
        a.mov(qword_ptr(rdi + 8), rax).unwrap();
        a.mov(rdi, idtr).unwrap();
        a.mov(word_ptr(rdi), 0xFFF).unwrap();
        a.mov(rax, idt).unwrap();
        a.mov(qword_ptr(rdi + 2), rax).unwrap();
        a.lidt(ptr(rdi)).unwrap();
        // x2APIC: enable in IA32_APIC_BASE, then SVR, divide by 1, periodic timer on vector 0x40.
        a.mov(ecx, 0x1B).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, 0xC00).unwrap();
        a.wrmsr().unwrap();
        for (msr, value) in [(0x80F, 0x1FF), (0x83E, 0xB), (0x832, 0x2_0040), (0x838, period_ns)] {
            a.mov(ecx, msr as u32).unwrap();
            a.mov(eax, value).unwrap();
            a.xor(edx, edx).unwrap();
            a.wrmsr().unwrap();
        }
        a.xor(r15d, r15d).unwrap();
        a.set_label(&mut main).unwrap();
        a.sti().unwrap();
        a.hlt().unwrap();
        a.cmp(r15d, ticks as i32).unwrap();
        a.jb(main).unwrap();
        exit(a, 7);
        a.set_label(&mut handler).unwrap();
        a.inc(r15d).unwrap();
        a.mov(ecx, 0x80B).unwrap(); // EOI
        a.xor(eax, eax).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.iretq().unwrap();
    })
}

#[test]
fn idle_time_is_skipped_and_timers_fire() {
    let mut machine = machine(&ticking(100, 1_000_000));
    assert_eq!(run_to_end(&mut machine), Ended::PowerOff { code: 7 });
    assert!(machine.icount().0 < 5000, "{:?}", machine.icount());
    let time = machine.time().0;
    assert!((99_000_000..110_000_000).contains(&time), "{time}");
}

#[test]
fn stopping_in_idle_time_does_not_matter() {
    let image = ticking(20, 100_000);
    let mut whole = machine(&image);
    run_to_end(&mut whole);
    let expected = whole.state_hash();
    let mut stopped = machine(&image);
    let mut at = 0;
    loop {
        at += 33_333;
        match stopped.run(Limits { time: VirtualNs(at), ..Limits::NONE }).unwrap() {
            Pause::Limit => assert!(stopped.time() >= VirtualNs(at)),
            Pause::Ended(_) => break,
            pause => panic!("{pause:?}"),
        }
    }
    assert_eq!(stopped.state_hash(), expected);
    let mut stepped = machine(&image);
    for icount in 0.. {
        if let Pause::Ended(_) = stepped.run(Limits::until(Icount(icount))).unwrap() {
            break;
        }
    }
    assert_eq!(stepped.state_hash(), expected);
}

/// Echoes what comes in on the serial port, by polling, until it reads 'q'.
fn echo() -> Image {
    guest(|a| {
        let mut again = a.create_label();
        let mut done = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(dx, SERIAL + 5).unwrap();
        a.in_(al, dx).unwrap();
        a.test(al, 1).unwrap();
        a.je(again).unwrap();
        a.mov(dx, SERIAL).unwrap();
        a.in_(al, dx).unwrap();
        a.cmp(al, i32::from(b'q')).unwrap();
        a.je(done).unwrap();
        a.out(dx, al).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut done).unwrap();
        exit(a, 0);
    })
}

#[test]
fn inputs_replay() {
    let image = echo();
    let mut live = machine(&image);
    live.run(Limits::until(Icount(1000))).unwrap();
    live.input(InputChannel::Console, b"abc\n".to_vec());
    live.run(Limits::until(Icount(2345))).unwrap();
    live.input(InputChannel::Console, vec![b'x'; 300]);
    live.input(InputChannel::Console, b"q".to_vec());
    assert_eq!(run_to_end(&mut live), Ended::PowerOff { code: 0 });
    let inputs = live.take_inputs();
    assert_eq!(inputs.len(), 3);
    let output = text(&mut live);
    assert_eq!(output, format!("abc\n{}", "x".repeat(300)));

    let mut again = machine(&image);
    again.replay(inputs.clone());
    run_to_end(&mut again);
    assert_eq!(again.state_hash(), live.state_hash());
    assert_eq!(again.take_inputs(), inputs);

    let slow = MachineConfig { ns_per_instruction: 3, ..small() };
    let mut foreign = Machine::new(&image, &slow, SEED, EngineConfig::default()).unwrap();
    foreign.replay(inputs);
    assert!(foreign.run(Limits::until(Icount(1 << 24))).is_err());
}

#[test]
fn the_first_difference_is_located() {
    let image = echo();
    let moment = 12_345;
    let mut build = |which: usize| {
        let mut machine = Machine::new(&image, &small(), SEED, EngineConfig::default())?;
        if which == 1 {
            let data = b"z".to_vec();
            machine.replay(vec![Input { icount: moment, virtual_ns: moment, channel: InputChannel::Console, data }]);
        }
        Ok(machine)
    };
    let found = locate(&mut build, 0, 1 << 21).unwrap().expect("the runs differ");
    // The input enters after the state at its moment, before the next instruction.
    assert_eq!((found.equal_at, found.differs_at), (moment, moment + 1));
    assert!(found.differences.iter().any(|text| text.starts_with("serial port")), "{:?}", found.differences);
    let mut same = |_| Machine::new(&image, &small(), SEED, EngineConfig::default());
    assert!(locate(&mut same, 0, 1 << 21).unwrap().is_none());
}
