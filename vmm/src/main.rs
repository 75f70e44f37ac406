//! The `orrery` command. Everything is in the library.

use std::process::ExitCode;

use orrery_vmm::cli;

fn main() -> ExitCode {
    // A panic is a defect; its message has been printed by then.
    let code = std::panic::catch_unwind(cli::main).unwrap_or(cli::exit::INTERNAL);
    ExitCode::from(code)
}
