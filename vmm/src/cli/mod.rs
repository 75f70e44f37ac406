//! The `orrery` command: one definition per flag, errors that say what to do.

/// Prints a formatted line to standard output, see [`say`].
macro_rules! say {
    ($($part:tt)*) => { $crate::cli::say(format_args!($($part)*)) };
}

pub mod args;
mod backtrace;
mod branch;
mod cat;
mod console;
mod debug;
mod diff;
mod disassemble;
mod doctor;
mod engine;
pub mod exit;
mod export;
mod image;
mod import;
mod last_write;
mod memory;
mod place;
mod profile;
mod ps;
mod registers;
mod replay;
mod run;
mod runs;
mod shell;
mod snapshot;
mod store;
mod trace;
mod tree;
mod verify;
mod when;

use clap::{CommandFactory, Parser};

use args::{Cli, Command};
use exit::Failure;

/// Runs the command and gives its exit code.
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are not failures; clap prints them to standard output.
            let _ = error.print();
            return if error.use_stderr() { exit::USAGE } else { 0 };
        }
    };
    match dispatch(cli) {
        Ok(code) => code,
        Err(Failure { code, message }) => {
            eprintln!("orrery: {message}");
            code
        }
    }
}

fn dispatch(cli: Cli) -> Result<u8, Failure> {
    match cli.command {
        Command::Run(arguments) => run::run(arguments),
        Command::Verify(arguments) => verify::verify(arguments),
        Command::Snapshot(arguments) => snapshot::snapshot(arguments),
        Command::Branch(arguments) => branch::branch(&arguments),
        Command::Runs(arguments) => runs::runs(&arguments),
        Command::Tree(arguments) => tree::tree(&arguments),
        Command::Diff(arguments) => diff::diff(&arguments),
        Command::Store(arguments) => store::store(&arguments),
        Command::Export(arguments) => export::export(&arguments),
        Command::Import(arguments) => import::import(&arguments),
        Command::Doctor(arguments) => doctor::doctor(arguments),
        Command::Image(arguments) => image::image(arguments),
        Command::Ps(arguments) => ps::ps(arguments),
        Command::Backtrace(arguments) => backtrace::backtrace(arguments),
        Command::Registers(arguments) => registers::registers(arguments),
        Command::Memory(arguments) => memory::memory(arguments),
        Command::Disassemble(arguments) => disassemble::disassemble(arguments),
        Command::Profile(arguments) => profile::profile(arguments),
        Command::Shell(arguments) => shell::shell(arguments),
        Command::Cat(arguments) => cat::cat(arguments),
        Command::Replay(arguments) => replay::replay(arguments),
        Command::Debug(arguments) => debug::debug(arguments),
        Command::LastWrite(arguments) => last_write::last_write(arguments),
        Command::When(arguments) => when::when(arguments),
        Command::Trace(arguments) => trace::trace(arguments),
        Command::Completions(arguments) => {
            // Into memory first: the generator panics where it cannot write.
            let mut script = Vec::new();
            clap_complete::generate(arguments.shell, &mut Cli::command(), "orrery", &mut script);
            let _ = std::io::Write::write_all(&mut std::io::stdout(), &script);
            Ok(0)
        }
    }
}

/// Prints a line to standard output. A closed pipe there is no defect: whoever closed it wants no more.
fn say(line: impl std::fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{line}");
}
