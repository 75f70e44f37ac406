//! A block that runs often is translated again, longer: along jumps and around loops. The guest cannot see that.

mod common;

use common::Empty;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use orrery_cpu::Icount;
use orrery_cpu::engine::{Engine, EngineConfig, Stop};
use orrery_cpu::memory::GuestMemory;
use orrery_cpu::model::ModelFeatures;
use orrery_cpu::state::{CpuState, gpr, seg};
use vm_memory::{Bytes, GuestAddress};

const CODE: u64 = 0x40_1000;
const DATA: u64 = 0x60_0003;
/// Behind the end of all programs here.
const END: Icount = Icount(10_000_000);

/// A loop over unaligned numbers in three pages, with a branch and jumps in it, each time with another constant in its
/// code, and `rounds` times.
fn program(rounds: u32) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("an assembler");
    let (mut outer, mut inner, mut even, mut join) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    let mut constant = a.create_label();
    a.mov(ebp, rounds).unwrap();
    a.set_label(&mut outer).unwrap();
    a.mov(rsi, DATA).unwrap();
    a.xor(ecx, ecx).unwrap();
    a.jmp(inner).unwrap();
    a.set_label(&mut even).unwrap();
    a.sub(rdx, 3).unwrap();
    a.jmp(join).unwrap();
    a.set_label(&mut inner).unwrap();
    a.mov(rax, qword_ptr(rsi + rcx * 8)).unwrap();
    a.set_label(&mut constant).unwrap();
    // Four bytes from the third on: another constant in each round.
    a.add(rbx, 0x1234_5678).unwrap();
    a.xor(rax, rbx).unwrap();
    a.test(al, 1).unwrap();
    a.je(even).unwrap();
    a.add(rdx, rax).unwrap();
    a.jmp(join).unwrap();
    a.db(&[0x0F, 0x0B, 0x0F, 0x0B]).unwrap();
    a.set_label(&mut join).unwrap();
    a.add(qword_ptr(rsi + rcx * 8), rdx).unwrap();
    a.inc(rcx).unwrap();
    a.cmp(rcx, 1030).unwrap();
    a.jne(inner).unwrap();
    a.lea(rdi, ptr(constant)).unwrap();
    a.inc(dword_ptr(rdi + 3)).unwrap();
    a.dec(ebp).unwrap();
    a.jne(outer).unwrap();
    a.hlt().unwrap();
    a.assemble(CODE).expect("it can be assembled")
}

fn guest(config: EngineConfig, code: &[u8]) -> (Engine, GuestMemory) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("16 MiB of memory");
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("inside RAM");
    write(0x1000, 0x2003);
    write(0x2000, 0x3003);
    (0..8).for_each(|i| write(0x3000 + 8 * i, i << 21 | 0x83));
    memory.write_slice(code, GuestAddress(CODE)).expect("inside RAM");
    let mut engine = Engine::new(memory.clone(), ModelFeatures::default(), config).expect("an engine");
    *engine.state_mut() = CpuState::long_mode_boot(CODE, 0x50_0000, 0x58_0000, 0x1000, 0x7000, 23);
    engine.state_replaced();
    (engine, memory)
}

/// What can be seen of the guest.
fn seen((engine, memory): &(Engine, GuestMemory)) -> ([u64; 16], u64, u64, Vec<u8>) {
    let mut data = vec![0; 0x3000];
    memory.read_slice(&mut data, GuestAddress(DATA & !0xFFF)).expect("inside RAM");
    let state = engine.state();
    (state.gpr, state.rip, state.rflags, data)
}

/// Stops all over the long blocks of the second guest, about so far from each other, and at last in each of their places.
fn compare_at_stops(expected: &mut (Engine, GuestMemory), hot: &mut (Engine, GuestMemory), distance: u64) {
    let mut at = 0;
    for step in (0..40).map(|i| distance + i).chain((0..150).map(|_| 1)) {
        at += step;
        assert_eq!(expected.0.run(Icount(at), &mut Empty), Stop::Limit);
        assert_eq!(hot.0.run(Icount(at), &mut Empty), Stop::Limit);
        assert_eq!(seen(hot), seen(expected), "at {at}");
    }
    assert!(hot.0.statistics().hot > 0, "{}", hot.0.statistics());
}

/// Both come to the same end, at the same icount.
fn compare_at_end(expected: &mut (Engine, GuestMemory), hot: &mut (Engine, GuestMemory), stop: Stop) {
    assert_eq!(expected.0.run(END, &mut Empty), stop);
    assert_eq!(hot.0.run(END, &mut Empty), stop);
    assert_eq!(seen(hot), seen(expected));
    assert_eq!(hot.0.icount(), expected.0.icount());
}

#[test]
fn loops_are_unrolled_and_jumps_followed_unseen() {
    let plain = EngineConfig { max_block_instructions: 1, grouping: false, ..EngineConfig::default() };
    let code = program(40);
    let (mut expected, mut hot) = (guest(plain, &code), guest(EngineConfig::default(), &code));
    compare_at_stops(&mut expected, &mut hot, 9_973);
    compare_at_end(&mut expected, &mut hot, Stop::Halted);
    assert_eq!(hot.0.state().gpr[gpr::RCX], 1030);
    assert!(hot.0.statistics().crossing > 0, "{}", hot.0.statistics());
}

/// A loop whose branches go the same way for long: which one is chosen by `rounds`, on the way from 0 to three times as
/// many turns. In each turn exactly one of three ways is taken, past what must not be executed.
fn phases(rounds: u32) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("an assembler");
    let (mut again, mut second, mut third, mut join) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.xor(ecx, ecx).unwrap();
    a.set_label(&mut again).unwrap();
    a.cmp(ecx, rounds).unwrap();
    a.jae(second).unwrap();
    a.lea(rax, ptr(rax + rcx * 2)).unwrap();
    a.jmp(join).unwrap();
    a.db(&[0x0F, 0x0B]).unwrap();
    a.set_label(&mut third).unwrap();
    a.sbb(rbx, rax).unwrap();
    a.rol(rbx, 3).unwrap();
    a.jmp(join).unwrap();
    a.db(&[0x0F, 0x0B]).unwrap();
    a.set_label(&mut second).unwrap();
    a.cmp(ecx, 2 * rounds).unwrap();
    a.jae(third).unwrap();
    a.adc(rdx, rax).unwrap();
    a.set_label(&mut join).unwrap();
    a.inc(ecx).unwrap();
    a.adc(rbp, rdx).unwrap();
    a.cmp(ecx, 3 * rounds).unwrap();
    a.jne(again).unwrap();
    a.hlt().unwrap();
    a.assemble(CODE).expect("it can be assembled")
}

#[test]
fn what_is_usual_changes_unseen() {
    let plain = EngineConfig { max_block_instructions: 1, grouping: false, ..EngineConfig::default() };
    // Branches not taken become usual ones while the block counts, when it is hot, and long before.
    for rounds in [2_000, 3_000, 5_000, 12_000] {
        let code = phases(rounds);
        let (mut expected, mut hot) = (guest(plain.clone(), &code), guest(EngineConfig::default(), &code));
        compare_at_stops(&mut expected, &mut hot, u64::from(rounds) / 2);
        compare_at_end(&mut expected, &mut hot, Stop::Halted);
    }
}

/// A loop that begins with numbers on both sides of a page's end and rewrites an instruction further down. What reads
/// the numbers one by one may be a longer block than the one that could not read them together.
fn crossing(rounds: u32, distance: usize) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("an assembler");
    let (mut again, mut constant) = (a.create_label(), a.create_label());
    a.mov(ebp, rounds).unwrap();
    a.mov(rsi, (DATA | 0xFFF) - 7).unwrap();
    a.set_label(&mut again).unwrap();
    a.mov(rax, qword_ptr(rsi)).unwrap();
    a.add(rbx, qword_ptr(rsi + 8)).unwrap();
    a.add(qword_ptr(rsi + 16), rax).unwrap();
    a.inc(qword_ptr(rsi)).unwrap();
    (0..distance).for_each(|_| a.nop().unwrap());
    a.set_label(&mut constant).unwrap();
    a.add(rdx, 0x1234_5678).unwrap();
    a.lea(rdi, ptr(constant)).unwrap();
    a.inc(dword_ptr(rdi + 3)).unwrap();
    a.dec(ebp).unwrap();
    a.jne(again).unwrap();
    a.hlt().unwrap();
    a.assemble(CODE).expect("it can be assembled")
}

/// A recursive function, called `rounds` times. In each fifth round every call of it returns four bytes further than it
/// came from, past an addition, and at last one returns to what is no address.
fn calls(rounds: u32) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("an assembler");
    let (mut outer, mut function, mut leaf) = (a.create_label(), a.create_label(), a.create_label());
    let (mut further, mut elsewhere, mut back) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(ebp, rounds).unwrap();
    a.mov(esi, 5).unwrap();
    a.set_label(&mut outer).unwrap();
    a.mov(edi, 3).unwrap();
    a.call(function).unwrap();
    a.add(rdx, 0x10).unwrap();
    a.add(rdx, 0x100).unwrap();
    a.dec(esi).unwrap();
    a.cmovs(esi, dword_ptr(DATA)).unwrap();
    a.dec(ebp).unwrap();
    a.jne(outer).unwrap();
    a.mov(r8, 1u64 << 63).unwrap();
    a.mov(edi, 1).unwrap();
    a.call(function).unwrap();
    a.hlt().unwrap();
    a.set_label(&mut function).unwrap();
    a.push(rbx).unwrap();
    a.lea(rbx, ptr(rdi + rbp)).unwrap();
    a.dec(edi).unwrap();
    a.jne(further).unwrap();
    a.set_label(&mut leaf).unwrap();
    a.pop(rbx).unwrap();
    a.test(esi, esi).unwrap();
    a.je(elsewhere).unwrap();
    a.set_label(&mut back).unwrap();
    a.add(qword_ptr(rsp), r8).unwrap();
    a.cmp(rdx, rbx).unwrap();
    a.ret().unwrap();
    a.set_label(&mut further).unwrap();
    a.call(function).unwrap();
    a.adc(rdx, 0x11).unwrap();
    a.xor(rdx, rbx).unwrap();
    a.jmp(leaf).unwrap();
    a.set_label(&mut elsewhere).unwrap();
    a.add(qword_ptr(rsp), 4).unwrap();
    a.jmp(back).unwrap();
    a.assemble(CODE).expect("it can be assembled")
}

/// A loop over pages, each of them touched for the first time behind an addition or subtraction, whose flags are looked
/// at only then; also of RSP, with pops in between.
fn first_touches(pages: u32) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("an assembler");
    let mut again = a.create_label();
    a.mov(ebp, pages).unwrap();
    a.mov(rsi, 0x70_0000u64).unwrap();
    a.mov(rbx, 0x9E37_79B9_7F4A_7C15u64).unwrap();
    a.set_label(&mut again).unwrap();
    a.add(r8, rbx).unwrap();
    a.mov(rax, qword_ptr(rsi)).unwrap();
    a.adc(rdx, rax).unwrap();
    a.seto(r9b).unwrap();
    a.add(r9, r9).unwrap();
    a.sub(edi, 0x3456_789A).unwrap();
    a.mov(rax, qword_ptr(rsi + 0x1008)).unwrap();
    a.lahf().unwrap();
    a.xor(rdx, rax).unwrap();
    a.push(rdx).unwrap();
    a.push(r8).unwrap();
    a.mov(r10, rsp).unwrap();
    a.xor(rsp, rdi).unwrap();
    a.add(rsp, rdi).unwrap();
    a.mov(rsp, r10).unwrap();
    a.add(rsp, -64).unwrap();
    a.sub(rsp, -64).unwrap();
    a.pop(r11).unwrap();
    a.pop(r12).unwrap();
    a.mov(rax, qword_ptr(rsi + 0x2010)).unwrap();
    a.lahf().unwrap();
    a.lea(rdx, ptr(rdx + rax)).unwrap();
    a.add(r13, rdx).unwrap();
    a.sub(r13, r8).unwrap();
    a.mov(qword_ptr(rsi + 0x3018), r13).unwrap();
    a.lahf().unwrap();
    a.rcl(rax, 1).unwrap();
    a.add(rdx, rax).unwrap();
    a.add(rsi, 0x4000).unwrap();
    a.dec(ebp).unwrap();
    a.jne(again).unwrap();
    a.hlt().unwrap();
    a.assemble(CODE).expect("it can be assembled")
}

#[test]
fn flags_are_what_they_were_behind_a_miss() {
    let plain = EngineConfig { max_block_instructions: 1, grouping: false, ..EngineConfig::default() };
    let code = first_touches(500);
    let (mut expected, mut long) = (guest(plain, &code), guest(EngineConfig::default(), &code));
    for at in (0..20_000).step_by(61).map(Icount) {
        assert_eq!(long.0.run(at, &mut Empty), expected.0.run(at, &mut Empty));
        assert_eq!(seen(&long), seen(&expected), "at {at:?}");
    }
    assert_eq!(expected.0.icount(), long.0.icount());
    for chaos in 1..60 {
        let mut random = guest(EngineConfig { chaos_seed: Some(chaos), ..EngineConfig::default() }, &code);
        assert_eq!(random.0.run(END, &mut Empty), Stop::Halted, "chaos {chaos}");
        assert_eq!(seen(&random), seen(&expected), "chaos {chaos}");
    }
}

/// What gives the flags in [`fading`], from RDX, RDI, R8 and two numbers in memory: at R10, and one byte behind that.
type Giver = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Instructions of all kinds whose flags can be had again from their operands.
const GIVERS: [Giver; 24] = [
    |a| a.cmp(rdx, qword_ptr(r10)),
    |a| a.cmp(edx, dword_ptr(r10)),
    |a| a.cmp(qword_ptr(r10), rdx),
    |a| a.cmp(dword_ptr(r10), 0x1234_5678),
    |a| a.cmp(byte_ptr(r10 + 1), 0x25),
    |a| a.cmp(byte_ptr(r10 + 1), dil),
    |a| a.cmp(dl, byte_ptr(r10 + 1)),
    |a| a.cmp(rdx, rdi),
    |a| a.cmp(edx, -3),
    |a| a.test(qword_ptr(r10), rdx),
    |a| a.test(dl, 1),
    |a| a.test(edx, edi),
    |a| a.test(rdx, rdx),
    |a| a.add(rdx, rdi),
    |a| a.add(edx, dword_ptr(r10)),
    |a| a.sub(rdx, qword_ptr(r10)),
    |a| a.sub(edx, 0x0F0F_0F0F),
    |a| a.and(rdx, rdi),
    |a| a.xor(edx, dword_ptr(r10)),
    |a| a.or(rdx, -16),
    |a| a.shl(rdx, 3),
    |a| a.shr(edx, 9),
    |a| a.sar(rdx, 1),
    |a| a.shr(r8, 31),
];

/// A loop in which `giver` gives flags that nobody looks at, but that an access behind it faults at last, when what gave
/// them is gone, as far as `gone` says: 1 for RDX, 2 for RDI, 4 for the numbers in memory.
fn fading(giver: Giver, gone: u32, rounds: u32) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("an assembler");
    let mut again = a.create_label();
    a.mov(ebp, rounds).unwrap();
    a.mov(rsi, DATA).unwrap();
    a.lea(r10, ptr(rsi + 0x100)).unwrap();
    a.mov(rbx, 0x9E37_79B9_7F4A_7C15u64 + u64::from(rounds) * 0x1234_5678_9ABC).unwrap();
    a.mov(r9, 1u64 << 45).unwrap();
    a.set_label(&mut again).unwrap();
    a.imul_2(rdx, rbx).unwrap();
    a.lea(rdx, ptr(rdx + rbp + 7)).unwrap();
    a.rorx(rdi, rdx, 17).unwrap();
    a.lea(r8, ptr(rdi + rdx)).unwrap();
    a.mov(qword_ptr(r10), r8).unwrap();
    giver(&mut a).unwrap();
    if gone & 1 != 0 {
        a.mov(rdx, rbp).unwrap();
    }
    if gone & 2 != 0 {
        a.mov(edi, 3).unwrap();
    }
    if gone & 4 != 0 {
        a.mov(qword_ptr(r10), rbp).unwrap();
    }
    a.mov(rax, qword_ptr(rsi)).unwrap();
    a.cmp(ebp, 2).unwrap();
    a.cmove(rsi, r9).unwrap();
    a.dec(ebp).unwrap();
    a.jne(again).unwrap();
    a.hlt().unwrap();
    a.assemble(CODE).expect("it can be assembled")
}

#[test]
fn flags_that_fade_are_there_when_somebody_looks() {
    let plain = EngineConfig { max_block_instructions: 1, grouping: false, ..EngineConfig::default() };
    for (number, giver) in GIVERS.into_iter().enumerate() {
        for gone in 0..8 {
            let code = fading(giver, gone, 20_000 + number as u32);
            let (mut expected, mut hot) = (guest(plain.clone(), &code), guest(EngineConfig::default(), &code));
            compare_at_end(&mut expected, &mut hot, Stop::TripleFault);
            assert!(hot.0.statistics().hot > 0, "{}", hot.0.statistics());
        }
    }
}

/// Where a function is that [`elsewhere`] calls, and where another one is that takes its place.
const FUNCTIONS: [u64; 2] = [0xA0_0000, 0xC0_0000];

/// A loop that calls a function in another page. Now and then it writes into the function, or gives its page to another
/// one.
fn elsewhere(rounds: u32) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("an assembler");
    let (mut again, mut same, mut whole) = (a.create_label(), a.create_label(), a.create_label());
    let entry = 0x3000 + FUNCTIONS[0] / (2 << 20) * 8;
    a.mov(ebp, rounds).unwrap();
    a.set_label(&mut again).unwrap();
    a.cmp(rax, rdx).unwrap();
    a.call(FUNCTIONS[0]).unwrap();
    a.adc(rdx, rax).unwrap();
    a.test(ebp, 0x7FF).unwrap();
    a.jne(same).unwrap();
    a.xor(qword_ptr(entry), (FUNCTIONS[0] ^ FUNCTIONS[1]) as i32).unwrap();
    a.invlpg(ptr(FUNCTIONS[0])).unwrap();
    a.set_label(&mut same).unwrap();
    a.test(ebp, 0x3FF).unwrap();
    a.jne(whole).unwrap();
    a.inc(dword_ptr(FUNCTIONS[0] + 3)).unwrap();
    a.set_label(&mut whole).unwrap();
    a.dec(ebp).unwrap();
    a.jne(again).unwrap();
    a.hlt().unwrap();
    a.assemble(CODE).expect("it can be assembled")
}

/// `elsewhere` with its functions.
fn guest_elsewhere(config: EngineConfig, code: &[u8]) -> (Engine, GuestMemory) {
    let guest = guest(config, code);
    for (at, turn) in FUNCTIONS.into_iter().zip([3, 5]) {
        let mut a = CodeAssembler::new(64).expect("an assembler");
        a.sbb(rbx, 0x1234_5678).unwrap();
        a.rol(rbx, turn).unwrap();
        a.xor(rax, rbx).unwrap();
        a.ret().unwrap();
        guest.1.write_slice(&a.assemble(at).expect("it can be assembled"), GuestAddress(at)).expect("inside RAM");
    }
    guest
}

#[test]
fn other_pages_are_followed_while_they_are_what_they_were() {
    let plain = EngineConfig { max_block_instructions: 1, grouping: false, ..EngineConfig::default() };
    let code = elsewhere(40_000);
    let guests = || [plain.clone(), EngineConfig::default()].map(|config| guest_elsewhere(config, &code));
    let [mut expected, mut hot] = guests();
    compare_at_stops(&mut expected, &mut hot, 9_973);
    compare_at_end(&mut expected, &mut hot, Stop::Halted);
    for chaos in 1..60 {
        let mut random = guest_elsewhere(EngineConfig { chaos_seed: Some(chaos), ..EngineConfig::default() }, &code);
        assert_eq!(random.0.run(END, &mut Empty), Stop::Halted, "chaos {chaos}");
        assert_eq!((seen(&random), random.0.icount()), (seen(&expected), expected.0.icount()), "chaos {chaos}");
    }
}

#[test]
fn calls_are_followed_unseen() {
    let plain = EngineConfig { max_block_instructions: 1, grouping: false, ..EngineConfig::default() };
    let code = calls(12_000);
    let guests = || {
        [guest(plain.clone(), &code), guest(EngineConfig::default(), &code)].map(|guest| {
            guest.1.write_obj(5u32, GuestAddress(DATA)).expect("inside RAM");
            guest
        })
    };
    let [mut expected, mut hot] = guests();
    compare_at_stops(&mut expected, &mut hot, 6_973);
    compare_at_end(&mut expected, &mut hot, Stop::TripleFault);
    for chaos in 1..60 {
        let mut random = guest(EngineConfig { chaos_seed: Some(chaos), ..EngineConfig::default() }, &code);
        random.1.write_obj(5u32, GuestAddress(DATA)).expect("inside RAM");
        assert_eq!(random.0.run(END, &mut Empty), Stop::TripleFault, "chaos {chaos}");
        assert_eq!((seen(&random), random.0.icount()), (seen(&expected), expected.0.icount()), "chaos {chaos}");
    }
}

#[test]
fn random_blocks_come_to_the_same_end() {
    for code in [program(12), phases(500), crossing(300, 0), crossing(300, 10), crossing(300, 40), crossing(300, 100)] {
        let mut expected = guest(EngineConfig { max_block_instructions: 1, ..EngineConfig::default() }, &code);
        assert_eq!(expected.0.run(END, &mut Empty), Stop::Halted);
        for chaos in 1..60 {
            let mut random = guest(EngineConfig { chaos_seed: Some(chaos), ..EngineConfig::default() }, &code);
            assert_eq!(random.0.run(END, &mut Empty), Stop::Halted, "chaos {chaos}");
            assert_eq!(seen(&random), seen(&expected), "chaos {chaos}");
        }
    }
}

/// Where R14 and R15 point in turn: pieces of their thread windows cross pages.
const THREADS: [u64; 8] = [0x60_0000, 0x60_0EC8, 0x60_0CE0, 0x60_1C10, 0x60_1DD0, 0x60_0FF1, 0x60_0D08, 0x60_1CF8];
const TABLE: u64 = 0x68_0000;

/// User code that looks at memory behind R14 and R15 in loops that do not write these registers, each time after they have
/// been written in another way.
fn threads(rounds: u32) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("an assembler");
    let (mut outer, mut end, mut look, mut turn) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.mov(ebp, rounds).unwrap();
    a.set_label(&mut outer).unwrap();
    type Write<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let writes: [Write; 12] = [
        &|a| a.mov(r15, qword_ptr(rsi + rdi * 8)),
        &|a| a.mov(r14, r15),
        &|a| a.xor(r15b, 0x48),
        &|a| a.add(r14w, 8),
        &|a| a.xchg(r14, r15),
        &|a| a.lea(r15d, ptr(r14 + 0x10)),
        &|a| {
            a.push(qword_ptr(rsi + rdi * 8))?;
            a.pop(r14)
        },
        &|a| a.cmovne(r15, qword_ptr(rsi + rdi * 8)),
        &|a| a.mov(r14w, word_ptr(rsi + rdi * 8)),
        &|a| a.xadd(r15b, r8b),
        &|a| a.cmpxchg(r14, r15),
        &|a| a.btc(r15, 4),
    ];
    for write in writes {
        a.lea(edi, ptr(rdi + 3)).unwrap();
        a.and(edi, THREADS.len() as i32 - 1).unwrap();
        a.test(rdx, rdx).unwrap();
        write(&mut a).unwrap();
        a.call(look).unwrap();
    }
    a.dec(ebp).unwrap();
    a.jne(outer).unwrap();
    a.set_label(&mut end).unwrap();
    a.jmp(end).unwrap();

    a.set_label(&mut look).unwrap();
    a.mov(ecx, 40).unwrap();
    a.set_label(&mut turn).unwrap();
    a.add(rbx, qword_ptr(r15 + 0x13)).unwrap();
    a.adc(qword_ptr(r15 + 0x108), rbx).unwrap();
    a.cmp(rbx, qword_ptr(r14 + 0x118)).unwrap();
    a.sbb(rdx, qword_ptr(r15 + 0x340)).unwrap();
    a.inc(dword_ptr(r14 + 0x30)).unwrap();
    a.rcl(rdx, 3).unwrap();
    a.xor(qword_ptr(r15 + 0xFC), rdx).unwrap();
    a.xor(rdx, qword_ptr(r14 + 0x3F8)).unwrap();
    a.sub(rbx, qword_ptr(r15 + 0x250)).unwrap();
    a.mov(dword_ptr(r15 + 0x114), edx).unwrap();
    a.lea(rcx, ptr(rcx - 1)).unwrap();
    a.add(rbx, qword_ptr(r14 + 0x2F8)).unwrap();
    a.inc(ecx).unwrap();
    a.dec(ecx).unwrap();
    a.jne(turn).unwrap();
    a.ret().unwrap();
    a.assemble(CODE).expect("it can be assembled")
}

/// As `guest`, in user mode.
fn user_guest(config: EngineConfig, code: &[u8]) -> (Engine, GuestMemory) {
    let (mut engine, memory) = guest(config, code);
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("inside RAM");
    // What the windows are about lies in small pages, in another order, and in yet another from the second root.
    for (root, turned) in [(0x1000, 1), (0x8000, 2)] {
        let tables = [0x1000, 0x2000, 0x3000].map(|table| root + table);
        [root].iter().chain(&tables).zip(&tables).for_each(|(at, next)| write(*at, next | 7));
        (0..8).for_each(|i| write(tables[1] + 8 * i, if i == 3 { tables[2] | 7 } else { i << 21 | 0x87 }));
        let place = |page| if page < 3 { (page + turned) % 3 } else { page };
        (0..512).for_each(|page| write(tables[2] + 8 * page, 0x60_0007 + (place(page) << 12)));
    }
    THREADS.iter().zip(0..).for_each(|(thread, i)| write(TABLE + 8 * i, *thread));
    let state = engine.state_mut();
    state.cpl = 3;
    state.seg[seg::CS].selector |= 3;
    state.seg[seg::CS].attributes |= 3 << 5;
    state.seg[seg::SS].selector |= 3;
    state.seg[seg::SS].attributes |= 3 << 5;
    state.gpr[gpr::RSI] = TABLE;
    engine.state_replaced();
    (engine, memory)
}

#[test]
fn thread_windows_show_what_the_registers_point_at() {
    let plain = EngineConfig { max_block_instructions: 1, grouping: false, ..EngineConfig::default() };
    let code = threads(9_000);
    let [mut expected, mut hot] = [plain, EngineConfig::default()].map(|config| user_guest(config, &code));
    let end = Icount(6_000_000);
    assert_eq!(expected.0.run(Icount(3_000_000), &mut Empty), Stop::Limit);
    assert_eq!(hot.0.run(Icount(3_000_000), &mut Empty), Stop::Limit);
    let mut at = 3_000_000;
    for step in (0..4_000).map(|i| 97 + i % 83).chain((0..400).map(|_| 1)) {
        at += step;
        let dirty = [&mut expected, &mut hot].map(|(engine, _)| {
            assert_eq!(engine.run(Icount(at), &mut Empty), Stop::Limit);
            if step % 8 == 0 {
                engine.state_mut().cr3 ^= 0x9000;
                engine.state_replaced();
            }
            let mut dirty = engine.take_dirty();
            dirty.sort_unstable();
            dirty
        });
        assert_eq!(seen(&hot), seen(&expected), "at {at}");
        assert_eq!(dirty[1], dirty[0], "pages written before {at}");
    }
    assert!(hot.0.statistics().hot > 0, "{}", hot.0.statistics());
    assert_eq!(expected.0.run(end, &mut Empty), Stop::Limit);
    assert_eq!(hot.0.run(end, &mut Empty), Stop::Limit);
    assert_eq!(seen(&hot), seen(&expected));
    let mut expected = user_guest(EngineConfig { max_block_instructions: 1, ..EngineConfig::default() }, &code);
    assert_eq!(expected.0.run(Icount(1_000_000), &mut Empty), Stop::Limit);
    for chaos in 1..40 {
        let config = EngineConfig { chaos_seed: Some(chaos), ..EngineConfig::default() };
        let mut random = user_guest(config, &code);
        assert_eq!(random.0.run(Icount(1_000_000), &mut Empty), Stop::Limit, "chaos {chaos}");
        assert_eq!(seen(&random), seen(&expected), "chaos {chaos}");
    }
}
