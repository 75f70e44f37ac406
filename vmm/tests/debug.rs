//! Going to and fro in a run gives the states of the straight run; what is found backwards is what stepping finds.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use common::user::{has_kvm, user};
use common::*;
use iced_x86::code_asm::*;
use orrery_cpu::Icount;
use orrery_cpu::engine::{EngineConfig, EngineKind};
use orrery_vmm::chain::Hash;
use orrery_vmm::debug::stub::{self, Disconnected};
use orrery_vmm::debug::watch::What;
use orrery_vmm::debug::{DebugError, Direction, Session, StopReason, Subject, Wanted, WatchKind, Watched, search};
use orrery_vmm::moment::{MomentError, MomentOptions, RunReference};
use orrery_vmm::{Limits, Machine};

/// A variable of the guest below.
const COUNTER: u64 = DATA;
/// Where two functions of the guest write it: filled in by `racing`.
struct Racing {
    image: orrery_guest_image::Image,
    /// Addresses of the two instructions that write the counter.
    writers: [u64; 2],
}

/// A guest in which two functions take turns by random numbers, each adding to one counter.
fn racing(rounds: u32) -> Racing {
    let mut a = CodeAssembler::new(64).unwrap();
    let (mut again, mut other, mut join) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(ecx, rounds).unwrap();
    a.mov(rdi, COUNTER).unwrap();
    a.set_label(&mut again).unwrap();
    a.rdrand(rax).unwrap();
    a.mov(qword_ptr(rdi + 64), rax).unwrap();
    a.test(eax, 3).unwrap();
    a.jne(other).unwrap();
    a.add(dword_ptr(rdi), 1).unwrap(); // the first writer
    a.jmp(join).unwrap();
    a.set_label(&mut other).unwrap();
    a.mov(edx, dword_ptr(rdi)).unwrap();
    a.add(edx, 2).unwrap();
    a.mov(dword_ptr(rdi), edx).unwrap(); // the second
    a.set_label(&mut join).unwrap();
    a.push(rcx).unwrap();
    a.pop(rcx).unwrap();
    a.dec(ecx).unwrap();
    a.jne(again).unwrap();
    print(&mut a, "done\n");
    exit(&mut a, 0);
    let code = a.assemble(LOAD).unwrap();
    let find = |bytes: &[u8]| LOAD + code.windows(bytes.len()).position(|window| window == bytes).unwrap() as u64;
    // add dword ptr [rdi], 1; mov [rdi], edx
    let writers = [find(&[0x83, 0x07, 0x01]), find(&[0x89, 0x17])];
    Racing { image: image_of(&code), writers }
}

/// Makes a run of an image with the command, and gives its directory.
fn record(directory: &Path, image: &orrery_guest_image::Image) -> RunReference {
    let file = image_file(directory, "guest.img", image);
    let runs = directory.join("runs");
    let output = Command::new(env!("CARGO_BIN_EXE_orrery"))
        .args(["run", "--seed", "1", "--memory", "32", "--quiet", "--no-input", "--runs"])
        .args([&runs, &file])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    RunReference::find(&runs, "guest").unwrap()
}

fn session(run: &RunReference, icount: u64) -> Session {
    session_in(EngineKind::Soft, run, icount)
}

fn session_in(engine: EngineKind, run: &RunReference, icount: u64) -> Session {
    let options = MomentOptions { engine: EngineConfig { engine, ..Default::default() }, ..Default::default() };
    Session::open(Subject::open(run.clone(), options).unwrap(), icount, &mut |_| false).unwrap()
}

fn end_of(run: &RunReference) -> u64 {
    run.manifest.outcome.as_ref().unwrap().icount
}

/// Hashes of the straight run at ascending icounts.
fn straight(run: &RunReference, image: &orrery_guest_image::Image, icounts: &[u64]) -> Vec<Hash> {
    let mut machine = Machine::new(image, &run.manifest.machine, SEED, Default::default()).unwrap();
    icounts
        .iter()
        .map(|icount| {
            machine.run(Limits::until(Icount(*icount))).unwrap();
            machine.state_hash()
        })
        .collect()
}

fn never(_: u64) -> bool {
    false
}

#[test]
fn random_moments_are_those_of_the_straight_run() {
    let directory = tempfile::tempdir().unwrap();
    let racing = racing(60_000);
    let run = record(directory.path(), &racing.image);
    let end = end_of(&run);
    let mut choice = 0x9E37_79B9_7F4A_7C15u64;
    let mut targets: Vec<u64> = (0..200)
        .map(|_| {
            choice = choice.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (choice >> 33) % end
        })
        .chain([0, 1, end])
        .collect();
    let order = targets.clone();
    targets.sort_unstable();
    let hashes = straight(&run, &racing.image, &targets);
    let mut session = session(&run, end / 2);
    for target in order {
        session.go_to(target, &mut never).unwrap();
        let expected = hashes[targets.binary_search(&target).unwrap()];
        assert_eq!((session.position().icount, session.state_hash()), (target, expected));
    }
    assert_eq!(session.state_hash(), run.manifest.outcome.as_ref().unwrap().state_hash);
}

#[test]
fn a_thousand_steps_back_and_forth() {
    let directory = tempfile::tempdir().unwrap();
    let run = record(directory.path(), &racing(20_000).image);
    let mut session = session(&run, 150_000);
    let hash = session.state_hash();
    let mut rips = vec![session.machine().cpu().rip];
    for _ in 0..1000 {
        assert_eq!(session.step_back(&mut never).unwrap(), StopReason::Step);
        rips.push(session.machine().cpu().rip);
    }
    assert_eq!(session.position().icount, 149_000);
    for rip in rips.iter().rev().skip(1) {
        assert_eq!(session.step(&Wanted::default()).unwrap(), StopReason::Step);
        assert_eq!(session.machine().cpu().rip, *rip);
    }
    assert_eq!((session.position().icount, session.state_hash()), (150_000, hash));
    session.go_to(1, &mut never).unwrap();
    assert_eq!(session.step_back(&mut never).unwrap(), StopReason::Step);
    assert_eq!(session.step_back(&mut never).unwrap(), StopReason::Beginning);
}

/// What continuing finds in one direction, until it finds nothing more: (icount, address of the instruction).
fn all(session: &mut Session, direction: Direction, wanted: &Wanted) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    loop {
        match session.resume(direction, wanted, &mut never).unwrap() {
            StopReason::Event(event) => {
                let position = session.position();
                match event.what {
                    What::Breakpoint { rip } => {
                        assert_eq!(session.machine().cpu().rip, rip);
                        assert_eq!(position.icount, event.icount);
                        found.push((event.icount, rip));
                    }
                    What::Access { rip, .. } => {
                        let after = u64::from(direction == Direction::Forward);
                        assert_eq!(position.icount, event.icount + after);
                        found.push((event.icount, rip));
                    }
                }
            }
            StopReason::Beginning => {
                assert_eq!((direction, session.position().icount), (Direction::Backward, 0));
                return found;
            }
            StopReason::End(_) => {
                assert_eq!(direction, Direction::Forward);
                return found;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn backwards_finds_what_forwards_finds() {
    let directory = tempfile::tempdir().unwrap();
    let racing = racing(40);
    let run = record(directory.path(), &racing.image);
    let mut session = session(&run, 0);
    let place = Watched::Physical { address: COUNTER, size: 4, kind: WatchKind::Write };
    let watch = Wanted { watched: vec![place], ..Wanted::default() };
    let breakpoints = Wanted { breakpoints: racing.writers.to_vec(), ..Wanted::default() };
    let written = all(&mut session, Direction::Forward, &watch);
    assert_eq!(written.len(), 40);
    assert!(racing.writers.iter().all(|writer| written.iter().any(|(_, rip)| rip == writer)), "the seed has both");
    let mut back = all(&mut session, Direction::Backward, &watch);
    back.reverse();
    assert_eq!(back, written);
    let reached = all(&mut session, Direction::Forward, &breakpoints);
    assert_eq!(reached, written, "a writer is reached where it writes");
    let mut back = all(&mut session, Direction::Backward, &breakpoints);
    back.reverse();
    assert_eq!(back, written);
    // And by linear address, reads too: the second writer reads by itself, the first reads and writes.
    session.go_to(100, &mut never).unwrap();
    let read = Watched::linear(session.machine(), COUNTER, 4, WatchKind::Read);
    session.go_to(0, &mut never).unwrap();
    let reads = all(&mut session, Direction::Forward, &Wanted { watched: vec![read], ..Wanted::default() });
    assert_eq!(reads.len(), 40);
    // The last writer, from the end.
    session.go_to(end_of(&run), &mut never).unwrap();
    let last = search::last_write(&mut session, COUNTER, 4, &mut never).unwrap().unwrap();
    assert_eq!((last.icount, last.rip, last.by), (written[39].0, written[39].1, "processor"));
    let value = |text: &str| u32::from_str_radix(text, 16).unwrap().swap_bytes();
    let added = if last.rip == racing.writers[0] { 1 } else { 2 };
    assert_eq!(value(&last.after), value(&last.before) + added);
    // Nobody has written what nobody writes.
    assert!(search::last_write(&mut session, COUNTER + 0x800, 8, &mut never).unwrap().is_none());
    let hole = search::last_write(&mut session, 0x7FFF_0000_0000, 8, &mut never);
    assert!(matches!(hole, Err(DebugError::NotMapped { .. })));
}

#[test]
fn executions_and_traces_tell_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let racing = racing(40);
    let run = record(directory.path(), &racing.image);
    let end = end_of(&run);
    let mut session = session(&run, 0);
    let mut executed = Vec::new();
    search::executions(&mut session, &racing.writers, end, &mut never, |execution| {
        executed.push((execution.icount, execution.rip));
        true
    })
    .unwrap();
    assert_eq!(executed.len(), 40);
    session.go_to(0, &mut never).unwrap();
    let mut traced = Vec::new();
    search::trace(&mut session, end, &mut never, |step| {
        traced.push((step.icount, step.rip));
        true
    })
    .unwrap();
    assert_eq!(traced.len() as u64, end);
    assert!(traced.iter().enumerate().all(|(index, (icount, _))| *icount == index as u64));
    traced.retain(|(_, rip)| racing.writers.contains(rip));
    assert_eq!(traced, executed);
}

#[test]
fn a_search_backwards_crosses_many_kept_moments() {
    let directory = tempfile::tempdir().unwrap();
    let racing = racing(1_000_000);
    let run = record(directory.path(), &racing.image);
    let mut session = session(&run, end_of(&run));
    // The instruction right behind power-on.
    let first = Wanted { breakpoints: vec![LOAD], ..Wanted::default() };
    let StopReason::Event(event) = session.resume(Direction::Backward, &first, &mut never).unwrap() else {
        panic!("not found");
    };
    assert_eq!((event.icount, session.position().icount), (0, 0));
    // Interrupted, it stays where it was.
    session.go_to(end_of(&run), &mut never).unwrap();
    let here = (session.position(), session.state_hash());
    let stopped = session.resume(Direction::Backward, &first, &mut |_| true).unwrap();
    assert_eq!(stopped, StopReason::Interrupted);
    assert_eq!((session.position(), session.state_hash()), here);
}

#[test]
fn only_a_branch_can_be_changed() {
    let directory = tempfile::tempdir().unwrap();
    let racing = racing(1000);
    let run = record(directory.path(), &racing.image);
    let mut session = session(&run, 3000);
    let hash = session.state_hash();
    assert!(session.change(|machine| machine.poke_memory(COUNTER, &[9])).unwrap().is_none());
    assert_eq!(session.state_hash(), hash);
    session.branch(None).unwrap();
    assert_eq!(session.change(|machine| machine.poke_memory(COUNTER, &[0, 0, 1, 0])).unwrap(), Some(true));
    assert_eq!(session.change(|machine| machine.poke_memory(u64::MAX - 1, &[1])).unwrap(), Some(false));
    assert_ne!(session.state_hash(), hash);
    session.step(&Wanted::default()).unwrap();
    session.step_back(&mut never).unwrap();
    assert_eq!(session.step_back(&mut never).unwrap(), StopReason::Beginning);
    assert!(matches!(session.go_to(2999, &mut never), Err(DebugError::BeforeChange { floor: 3000, .. })));
    session.return_to_run(&mut never).unwrap();
    assert_eq!((session.position().icount, session.state_hash()), (3000, hash));
}

#[test]
fn what_cannot_be_reached_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let run = record(directory.path(), &racing(100).image);
    let end = end_of(&run);
    let open = || Subject::open(run.clone(), MomentOptions::default());
    let beyond = Session::open(open().unwrap(), end + 1, &mut never);
    assert!(matches!(beyond, Err(DebugError::BeyondEnd { end: at, .. }) if at == end));
    let mut there = session(&run, end);
    assert!(matches!(there.resume(Direction::Forward, &Wanted::default(), &mut never).unwrap(), StopReason::End(_)));
    assert!(matches!(there.step(&Wanted::default()).unwrap(), StopReason::End(_)));
    // Another image, and none.
    let image = directory.path().join("guest.img");
    std::fs::remove_file(&image).unwrap();
    assert!(matches!(open(), Err(DebugError::Moment(MomentError::Image(_)))));
    image_file(directory.path(), "guest.img", &busy(10));
    assert!(matches!(open(), Err(DebugError::Moment(MomentError::OtherImage { .. }))));
}

// gdb ------------------------------------------------------------------------------------------------------------

/// Serves one connection to a peer that does what `peer` says.
fn serve(session: &mut Session, peer: impl FnOnce(TcpStream) + Send) -> Disconnected {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || peer(TcpStream::connect(address).unwrap()));
        stub::serve(session, listener.accept().unwrap().0).unwrap()
    })
}

#[test]
fn a_broken_peer_ends_its_connection_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let run = record(directory.path(), &racing(100).image);
    let mut session = session(&run, 200);
    let hash = session.state_hash();
    type Peer = fn(TcpStream);
    let peers: [Peer; 6] = [
        drop,
        |mut stream| stream.write_all(b"$g#00").unwrap(),
        |mut stream| stream.write_all(b"$\xFF\xFE\x00nonsense#zz").unwrap(),
        |mut stream| stream.write_all(b"$m10000000000000000,ffffffffffffffff#12").unwrap(),
        |mut stream| stream.write_all(&[b'$'; 1 << 16]).unwrap_or_default(),
        |mut stream| stream.write_all(b"+$Z0,zz,1#aa+$X0,ffff:#00+$P0=1#11").unwrap(),
    ];
    for peer in peers {
        let ended = serve(&mut session, |mut stream| {
            let reading = stream.try_clone().unwrap();
            peer(stream.try_clone().unwrap());
            stream.shutdown(std::net::Shutdown::Write).ok();
            let mut reading = reading;
            reading.read_to_end(&mut Vec::new()).ok();
            drop(stream.flush());
        });
        assert!(matches!(ended, Disconnected::Broken(_)), "{ended:?}");
        assert_eq!((session.position().icount, session.state_hash()), (200, hash));
    }
}

/// Debian's gdb, or a word that the test is skipped.
fn gdb(session: &mut Session, commands: &[String]) -> Option<String> {
    if Command::new("gdb").arg("--version").output().is_err() {
        eprintln!("SKIPPED: gdb is not installed (apt-get install gdb)");
        return None;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut command = Command::new("gdb");
    command.args(["-q", "-nx", "-batch", "-ex", "set pagination off", "-ex", "set architecture i386:x86-64"]);
    command.args(["-ex", &format!("target remote {address}")]);
    for line in commands {
        command.args(["-ex", line]);
    }
    let child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    // It must not wait for its words to be read.
    let output = std::thread::spawn(|| child.wait_with_output().unwrap());
    let ended = stub::serve(session, listener.accept().unwrap().0).unwrap();
    let output = output.join().unwrap();
    let words = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(!matches!(ended, Disconnected::Broken(_)), "{ended:?}:\n{words}");
    Some(words.into_owned())
}

#[test]
fn gdb_goes_forwards_and_backwards() {
    let directory = tempfile::tempdir().unwrap();
    let racing = racing(400);
    let run = record(directory.path(), &racing.image);
    let mut there = session(&run, 2000);
    let [first, second] = racing.writers;
    let lines = [
        "printf \"at %lu %d\\n\", $icount, $cs".to_owned(),
        format!("break *{first:#x}"),
        format!("break *{second:#x}"),
        "continue".to_owned(),
        "printf \"broke %lu\\n\", $icount".to_owned(),
        "delete".to_owned(),
        format!("watch *(int*){COUNTER:#x}"),
        "continue".to_owned(),
        "printf \"wrote %lu %d\\n\", $icount, $rip".to_owned(),
        "reverse-continue".to_owned(),
        "reverse-continue".to_owned(),
        "printf \"before %lu %d\\n\", $icount, $rip".to_owned(),
        "delete".to_owned(),
        "stepi".to_owned(),
        "stepi".to_owned(),
        "reverse-stepi".to_owned(),
        "printf \"stepped %lu\\n\", $icount".to_owned(),
        format!("set var *(int*){COUNTER:#x} = 5"),
        "monitor branch".to_owned(),
        format!("set var *(int*){COUNTER:#x} = 123456"),
        format!("printf \"changed %d\\n\", *(int*){COUNTER:#x}"),
        "monitor return".to_owned(),
        "maintenance flush register-cache".to_owned(),
        "monitor goto 1000".to_owned(),
        "maintenance flush register-cache".to_owned(),
        "printf \"gone %lu\\n\", $icount".to_owned(),
        "x/i 0x7fff00000000".to_owned(),
        "monitor nonsense".to_owned(),
        "monitor timeline".to_owned(),
        "info registers rip eflags fs_base ymm0 mxcsr st0 cr3 efer".to_owned(),
        "detach".to_owned(),
    ];
    let Some(words) = gdb(&mut there, &lines) else { return };
    let number = |name: &str| -> u64 {
        let line = words.lines().find_map(|line| line.strip_prefix(name));
        let line = line.unwrap_or_else(|| panic!("no {name}:\n{words}"));
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    assert_eq!(number("at "), 2000, "{words}");
    let mut reference = session(&run, 2000);
    let breakpoints = Wanted { breakpoints: racing.writers.to_vec(), ..Wanted::default() };
    let StopReason::Event(hit) = reference.resume(Direction::Forward, &breakpoints, &mut never).unwrap() else {
        panic!("no writer");
    };
    assert_eq!(number("broke "), hit.icount, "{words}");
    assert_eq!(number("wrote "), hit.icount + 1, "{words}");
    // The first time back leads before this write, the second before the one before it.
    reference.go_to(hit.icount, &mut never).unwrap();
    let StopReason::Event(earlier) = reference.resume(Direction::Backward, &breakpoints, &mut never).unwrap() else {
        panic!("no earlier writer");
    };
    assert_eq!(number("before "), earlier.icount, "{words}");
    assert_eq!(number("stepped "), earlier.icount + 1, "{words}");
    assert!(words.contains("Cannot access memory at address 0x300000"), "{words}");
    assert_eq!(number("changed "), 123456);
    assert_eq!(number("gone "), 1000);
    assert!(words.contains("Cannot access memory at address 0x7fff00000000"), "{words}");
    assert!(words.contains("there is no such command"), "{words}");
    assert!(words.contains("run guest-1-001 seed 1"), "{words}");
    assert!(words.contains("efer") && words.contains("v8_float"), "{words}");
}

/// What gdb sees of a program in user mode: stops and all registers, forwards and backwards. In between the program runs.
fn seen_by_gdb(run: &RunReference, engine: EngineKind) -> Option<String> {
    let mut there = session_in(engine, run, 1_000_000);
    let mut lines = Vec::new();
    let mut enter = |line: &str| lines.push(line.to_owned());
    for moment in [2_345_678, 1_234_567, 3_456_789] {
        enter(&format!("monitor goto {moment}"));
        enter("maintenance flush register-cache");
        enter("info all-registers");
        enter("stepi");
        enter("break *$rip");
        for _ in 0..2 {
            enter("continue");
            enter("info all-registers");
        }
        enter("reverse-continue");
        enter("delete");
        enter(&format!("watch *(long*){:#x}", DATA + 0x1238));
        enter("continue");
        enter("info all-registers");
        enter("reverse-continue");
        enter("delete");
        enter("reverse-stepi");
        enter("info all-registers");
    }
    enter("monitor goto 3999999");
    enter("maintenance flush register-cache");
    enter("info all-registers");
    enter("detach");
    let words = gdb(&mut there, &lines)?;
    assert_eq!(there.position().icount, 3_999_999, "{words}");
    let visits = there.machine().engine_statistics().kvm_visits;
    assert_eq!(visits > 0, engine == EngineKind::Kvm, "{engine:?} was {visits} times in a virtual machine");
    Some(words)
}

#[test]
fn gdb_sees_the_same_in_the_kvm_engine() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let run = record(directory.path(), &user(12));
    assert!(end_of(&run) > 4_000_000);
    let Some(soft) = seen_by_gdb(&run, EngineKind::Soft) else { return };
    assert_eq!(soft.matches("Breakpoint").count(), 12, "{soft}");
    assert_eq!(soft.matches("\ncs             0x23").count(), 16, "{soft}");
    let kvm = seen_by_gdb(&run, EngineKind::Kvm).unwrap();
    let without_port =
        |words: &str| words.lines().filter(|line| !line.contains("127.0.0.1")).collect::<Vec<_>>().join("\n");
    assert_eq!(without_port(&soft), without_port(&kvm));
}
