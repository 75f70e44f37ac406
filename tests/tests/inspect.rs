//! Whole Debian guests looked at from outside: what is seen is what the guest itself would say, and looking changes
//! nothing.

mod common;

use common::{Choices, available, demo, machine, run_until};
use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_guest_image::{Content, Image, ImageParts};
use orrery_vmm::guest_agent::{Agent, Message, Turn};
use orrery_vmm::inspect::profile::Profile;
use orrery_vmm::inspect::{How, InspectError, Inspector, Task};
use orrery_vmm::{Limits, Machine, Pause};
use vm_memory::{Bytes, GuestAddress};

/// Runs on until the console shows a text.
fn run_until_console(machine: &mut Machine, text: &str) {
    let mut console = Vec::new();
    while !String::from_utf8_lossy(&console).contains(text) {
        let pause = machine.run(Limits { pause_on_output: true, ..Limits::NONE }).expect("nothing is replayed");
        assert_eq!(pause, Pause::Output, "the guest must not end before it prints {text:?}");
        console.extend(machine.take_output().into_iter().flat_map(|output| output.bytes));
    }
}

fn names(inspector: &Inspector, task: &Task) -> Vec<String> {
    let frames = inspector.backtrace_of(task).expect("the stack can be read");
    assert!(!frames.is_empty());
    assert!(frames.iter().all(|frame| frame.user || frame.how != How::Guess), "{}: {frames:#?}", task.name);
    frames.into_iter().map(|frame| frame.symbol.map_or("?".into(), |symbol| symbol.name)).collect()
}

#[test]
fn a_go_guest_is_seen_from_outside() {
    let Some(image) = demo("go") else { return };
    let mut machine = machine(&image, 1, EngineConfig::default());
    assert_eq!(Inspector::new(&machine).tasks(), Err(InspectError::NoKernel), "at power-on there is no kernel yet");
    run_until_console(&mut machine, "worker log");
    // In the middle of the racing counters: four threads compute.
    let middle = machine.icount().0 + 30_000_000;
    run_until(&mut machine, middle);
    let before = machine.state_hash();

    let inspector = Inspector::new(&machine);
    assert!(inspector.kernel_banner().unwrap().starts_with("Linux version 6."));
    let entry = inspector.symbolize(machine.cpu().lstar).expect("the entry of system calls has a name");
    assert_eq!((entry.name.as_str(), entry.offset), ("entry_SYSCALL_64", 0));

    // Processes: init, the kernel's, and the demo with its threads, one of them on the vCPU.
    let tasks = inspector.tasks().unwrap();
    let find = |name: &str| tasks.iter().find(|task| task.name == name).unwrap_or_else(|| panic!("no task {name}"));
    assert_eq!((find("init").pid, find("init").parent), (1, 0));
    assert!(find("kthreadd").kernel_thread);
    let current = inspector.current_task().unwrap();
    assert_eq!(tasks.iter().filter(|task| task.current).collect::<Vec<_>>(), [&current]);
    let threads: Vec<&Task> = tasks.iter().filter(|task| task.name == "demo").collect();
    assert!(threads.len() >= 4, "GOMAXPROCS is 4");
    assert!(threads.iter().all(|thread| thread.pid == threads[0].pid && thread.parent == 1));
    assert_eq!(inspector.arguments(threads[0]), ["/bin/demo"]);
    let program = inspector.executable(threads[0]).expect("it has a program");
    assert_eq!((program.path.as_str(), program.file_system.as_str()), ("/bin/demo", "ext4"));
    if current.root.is_some() {
        assert_eq!(current.root.map(|root| root >> 12), Some(machine.cpu().cr3 >> 12 & 0xFF_FFFF_FFFF));
    }

    // Names and addresses, of a stripped program.
    let places = inspector.lookup("demo:main.lostUpdates");
    assert_eq!(places.len(), 1);
    let symbol = inspector.symbolize_in(threads[0], places[0].address + 1).unwrap();
    assert_eq!((symbol.name.as_str(), symbol.offset), ("main.lostUpdates", 1));
    let line = inspector.line_in(threads[0], places[0].address).expect("Go programs know their lines");
    assert!(line.file.ends_with("main.go") && line.line > 40, "{line}");
    assert!(!inspector.lookup("do_sys_openat2").is_empty() && inspector.lookup("no_such_thing").is_empty());

    // Stacks: all of the kernel's frames by its tables, and Go's down to where goroutines begin.
    for task in &tasks {
        let names = names(&inspector, task);
        if task.kernel_thread && task.tid != 0 {
            assert_eq!(names.last().map(String::as_str), Some("ret_from_fork"), "{}: {names:?}", task.name);
        }
    }
    let stacks: Vec<Vec<String>> = threads.iter().map(|thread| names(&inspector, thread)).collect();
    assert!(
        stacks.iter().any(|stack| stack.iter().any(|name| name.starts_with("main.lostUpdates"))),
        "somebody increments the counter: {stacks:#?}"
    );
    let outermost = |stack: &Vec<String>| stack.last().is_some_and(|name| name.starts_with("runtime."));
    assert!(stacks.iter().any(outermost), "{stacks:#?}");

    assert!(inspector.disk_file("/bin/demo").is_some_and(|bytes| bytes.starts_with(b"\x7fELF")));
    assert_eq!(inspector.disk_file("/bin/nothing"), None);
    drop(inspector);
    assert_eq!(machine.state_hash(), before, "looking changes nothing");

    profiles_are_exact(&mut machine);
    hostile_kernels_are_survived(&machine, &tasks);
}

/// Two branches sampled at the same moments give one profile, and the state that no sampling gives.
fn profiles_are_exact(machine: &mut Machine) {
    let template = machine.freeze().expect("the machine can be frozen");
    let run = |sampled: bool| {
        let mut branch = template.branch(template.seed(), None).expect("a branch can be made");
        let mut profile = Profile::new(false);
        for _ in 0..40 {
            branch.run(Limits::until(Icount(branch.icount().0 + 50_021))).expect("nothing is replayed");
            if sampled {
                profile.sample(&branch);
            }
        }
        (profile.folded(), profile.samples(), branch.state_hash())
    };
    let (first, second, plain) = (run(true), run(true), run(false));
    assert_eq!(first, second);
    assert_eq!((first.1, first.2), (40, plain.2));
    assert!(first.0.iter().any(|stack| stack.starts_with("demo;") && stack.contains("main.lostUpdates")), "{first:?}");
}

/// Task structures full of wrong pointers: everything ends, and nothing panics.
fn hostile_kernels_are_survived(machine: &Machine, tasks: &[Task]) {
    let memory = &machine.board().memory;
    let space = Inspector::new(machine).kernel_space();
    let mut choices = Choices(0xBAD);
    for round in 0..20 {
        for task in tasks {
            for _ in 0..8 * (round + 1) {
                let place = task.address + 8 * choices.below(400);
                let value = match choices.below(5) {
                    0 => 0,
                    1 => choices.below(u64::MAX),
                    2 => task.address + 8 * choices.below(400),
                    3 => u64::MAX - choices.below(16),
                    _ => tasks[choices.below(tasks.len() as u64) as usize].address + 8 * choices.below(400),
                };
                let physical = space.translate(place).expect("the task was there").physical;
                memory.write_obj(value, GuestAddress(physical)).expect("it is in RAM");
            }
        }
        let inspector = Inspector::new(machine);
        for task in inspector.tasks().unwrap_or_default().iter().take(200) {
            let _ = inspector.backtrace_of(task);
            let _ = (inspector.arguments(task), inspector.executable(task), inspector.user_registers(task));
        }
        let _ = (inspector.backtrace(), inspector.lookup("main.main"), inspector.current_task());
    }
}

#[test]
fn a_randomised_kernel_with_isolated_page_tables_is_found() {
    let Some(image) = demo("hello") else { return };
    let words = image.command_line().split(' ').filter(|word| !matches!(*word, "nokaslr" | "mitigations=off"));
    let parts = ImageParts {
        kernel: Content::from(image.kernel().to_vec()),
        initramfs: Content::from(image.initramfs().to_vec()),
        disks: image.disks().to_vec(),
        command_line: words.chain(["pti=on"]).collect::<Vec<_>>().join(" "),
        ..ImageParts::default()
    };
    let image = Image::from_parts(parts).expect("the kernel is the same");
    let mut machine = machine(&image, 3, EngineConfig::default());
    run_until_console(&mut machine, "hello from");
    // The link-time address of `_text` is 0xffffffff81000000; the kernel has moved by a multiple of 2 MiB.
    let text = Inspector::new(&machine).lookup("_text").first().map(|place| place.address).expect("it has a start");
    assert!(text != 0xFFFF_FFFF_8100_0000 && text.is_multiple_of(2 << 20), "{text:#x}");
    let (mut user, mut kernel) = (0, 0);
    while user == 0 || kernel == 0 {
        let next = Icount(machine.icount().0 + 1009);
        machine.run(Limits::until(next)).expect("nothing is replayed");
        let inspector = Inspector::new(&machine);
        let entry = inspector.symbolize(machine.cpu().lstar).expect("the entry of system calls has a name");
        assert_eq!((entry.name.as_str(), entry.offset), ("entry_SYSCALL_64", 0));
        let task = inspector.current_task().expect("somebody runs");
        if machine.cpu().cpl == 3 {
            user += 1;
            // Bit 12 of the root tells the user's half of the pair.
            assert_eq!(task.root.map(|root| root | 1 << 12), Some(machine.cpu().cr3 & 0xF_FFFF_FFFF_F000));
            assert!(!inspector.mappings(&task).is_empty());
        } else {
            kernel += 1;
            let frames = inspector.backtrace();
            assert!(frames.first().is_some_and(|frame| frame.symbol.is_some()), "{frames:#?}");
        }
        assert!(machine.ended().is_none() && user + kernel < 2000, "user {user} kernel {kernel}");
    }
}

/// Speaks to the agent until its command has ended: what it wrote, and its exit code.
fn command(agent: &mut Agent, words: &[&str], input: &[u8]) -> (String, u32) {
    let words: Vec<String> = words.iter().map(|word| (*word).to_string()).collect();
    agent.start(&words, None);
    agent.input(input);
    agent.end_input();
    let (mut output, mut status, mut until) = (Vec::new(), None, None);
    while status.is_none() {
        let turn = agent.turn(until, &mut |message| match message {
            Message::Output(bytes) | Message::Errors(bytes) => output.extend(bytes),
            Message::Exited(code) => status = Some(code),
            other => panic!("{other:?}"),
        });
        until = match turn.expect("the guest goes on") {
            Turn::Busy => None,
            Turn::Idle(until) => until,
        };
    }
    (String::from_utf8(output).expect("it is text"), status.expect("it has ended"))
}

#[test]
fn the_agent_answers_in_a_branch() {
    let Some(image) = demo("hello") else { return };
    let mut machine = machine(&image, 1, EngineConfig::default());
    assert!(
        Agent::new(Machine::new(&image, &Default::default(), orrery_vmm::Seed(1), Default::default()).unwrap())
            .is_err()
    );
    // The guest's first line comes right after the agent has started.
    run_until_console(&mut machine, "hello from");
    let template = machine.freeze().expect("the machine can be frozen");
    let try_agent = || Agent::new(template.branch(template.seed(), Some(Vec::new())).expect("a branch can be made"));
    // Images from before the agent are as good as none.
    let Some(mut first) = available("an agent in the image hello, which `make images` brings,", try_agent()) else {
        return;
    };
    let agent = || try_agent().expect("an agent runs");
    let script = b"echo out; echo err >&2; cat /proc/1/comm; exit 7";
    let (output, status) = command(&mut first, &["/bin/sh"], script);
    assert_eq!(status, 7);
    assert!(output.contains("out\n") && output.contains("err\n") && output.contains("init\n"), "{output:?}");
    // More input than a pipe holds, to a command that writes as much.
    let long = "0123456789abcde\n".repeat(20_000);
    assert_eq!(command(&mut first, &["cat"], long.as_bytes()), (long.clone(), 0));

    let read = |agent: &mut Agent, path: &str| {
        let mut bytes = Vec::new();
        let len = agent.read_file(path, &mut |part| bytes.extend(part))?;
        assert_eq!(len, bytes.len() as u64);
        Ok::<Vec<u8>, orrery_vmm::guest_agent::AgentError>(bytes)
    };
    let mut second = agent();
    let script = read(&mut second, "/bin/hello.sh").unwrap();
    assert!(script.starts_with(b"#!/bin/sh"));
    assert_eq!(Inspector::new(second.machine()).disk_file("/bin/hello.sh"), Some(script), "both ways to a file agree");
    assert!(read(&mut second, "/no/such/file").unwrap_err().to_string().contains("No such file"));
    // The same request at the same moment finds the same.
    let status = |mut agent: Agent| read(&mut agent, "/proc/1/status").unwrap();
    assert_eq!(status(agent()), status(agent()));
}
