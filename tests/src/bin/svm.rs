//! Runs programs in a machine that has KVM on SVM, whatever the host has: see `docs/svm.md`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use orrery_tests::svm::initramfs::Program;
use orrery_tests::svm::list::{self, Entry};
use orrery_tests::svm::vm::Ending;
use orrery_tests::svm::{Options, run};
use orrery_tests::workshop;

/// Runs programs in a machine that has KVM on SVM: Debian's kernel in QEMU, which emulates the processor.
///
/// Variables of the environment that begin with KVM_ORACLE_, ORACLE_ or ORRERY_ reach the program. Exit code 0:
/// every program ended with 0. 1: one did not, or the machine failed, or time ran out.
#[derive(Parser, Debug)]
#[command(
    name = "svm",
    max_term_width = 100,
    after_help = "Examples:
  svm                                   the tests of tests/svm/list
  svm --only orrery-cpu-kvm             one of them
  KVM_ORACLE_SEED=7 svm --timeout 3600  with other guests, for longer
  svm --env RUST_BACKTRACE=1 -- target/release/deps/kvm-0123456789abcdef --argument"
)]
struct Arguments {
    /// A variable for the program's environment (repeatable)
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// Run only the tests of the list whose names (PACKAGE-TARGET) contain this
    #[arg(long, value_name = "WORDS", default_value = "", conflicts_with = "program")]
    only: String,
    /// The list of tests [default: tests/svm/list]
    #[arg(long, value_name = "FILE", conflicts_with = "program")]
    list: Option<PathBuf>,
    /// Longest time of one program, boot included, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// The QEMU command
    #[arg(long, value_name = "FILE", default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// Where transcripts go [default: target/svm]
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Show only how the programs ended
    #[arg(long, short)]
    quiet: bool,
    /// A program of the host with its arguments, instead of the list
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<String>,
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    if name.is_empty() { Err("the variable has no name".into()) } else { Ok((name.to_owned(), value.to_owned())) }
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let options = Options {
        qemu: arguments.qemu.clone(),
        timeout: Duration::from_secs(arguments.timeout),
        echo: !arguments.quiet,
        directory: arguments.directory.clone().unwrap_or_else(|| workshop::target().join("svm")),
    };
    // A test that found no KVM would pass by skipping.
    let mut environment = vec![("ORRERY_REQUIRE_KVM".to_owned(), "1".to_owned())];
    environment.extend(list::environment());
    environment.extend(arguments.env.iter().cloned());

    let mut failed = 0;
    for (name, program, expected) in programs(&arguments, &environment)? {
        let start = Instant::now();
        let (ending, words) = run(&options, &name, &program)?;
        let seconds = start.elapsed().as_secs_f64();
        let verdict = match (&ending, &expected) {
            (Ending::Exited(0), Some(expected)) if !words.contains(expected) => {
                format!("exit code 0, but its output does not contain {expected:?}")
            }
            _ => ending.to_string(),
        };
        println!(
            "svm: {name}: {verdict}, {seconds:.1} s ({})",
            options.directory.join(format!("{name}.log")).display()
        );
        failed += u32::from(verdict != Ending::Exited(0).to_string());
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Names, programs, and the words that their output must contain.
type Listed = (String, Program, Option<String>);

fn programs(arguments: &Arguments, environment: &[(String, String)]) -> Result<Vec<Listed>> {
    let program = |file: PathBuf, arguments: &[String]| Program {
        file,
        arguments: arguments.to_vec(),
        environment: environment.to_vec(),
    };
    if let Some((file, rest)) = arguments.program.split_first() {
        let file = PathBuf::from(file);
        let name = file.file_name().context("the program has no name")?.to_string_lossy().into_owned();
        return Ok(vec![(name, program(file, rest), None)]);
    }
    let path = arguments.list.clone().unwrap_or_else(|| workshop::workspace().join("tests/svm/list"));
    let entries: Vec<Entry> =
        list::read(&path)?.into_iter().filter(|entry| entry.name().contains(&arguments.only)).collect();
    if entries.is_empty() {
        bail!("no test in {} has {:?} in its name", path.display(), arguments.only);
    }
    entries
        .into_iter()
        .map(|entry| Ok((entry.name(), program(entry.build()?, &entry.arguments), entry.expected)))
        .collect()
}
