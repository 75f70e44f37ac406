//! The first program inside the guest: it makes a machine with a disk into a running workload, and the workload's
//! end into a power-off with an exit code.
//!
//! It lives in the initramfs as `/init` and is told what to do by `/etc/orrery/init.conf` beside it (see
//! [`config`]). It depends on nothing but Linux: no shell, no library, no tool of the root file system. It prints
//! nothing as long as all goes well; a step that fails says which, and powers off with a code of its own
//! ([`Failure::code`]), so that a broken image cannot be mistaken for a failing workload.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod agent;
mod config;
mod failure;
mod modules;
mod mounts;
mod power;
mod sys;
mod workload;

use config::Config;
use failure::Failure;

/// Where the builder puts the configuration in the initramfs.
const CONFIG_PATH: &str = "/etc/orrery/init.conf";

fn main() {
    if sys::process_id() != 1 {
        eprintln!("orrery-init: this is the first process of an Orrery guest; it does nothing elsewhere");
        std::process::exit(2);
    }
    let code = match boot() {
        Ok(code) => code,
        Err(failure) => {
            // The console may not exist yet; then there is nobody to tell and the exit code has to do.
            eprintln!("orrery-init: {failure}");
            failure.code()
        }
    };
    workload::stop_everything();
    mounts::quiesce();
    power::off(code)
}

/// From an empty initramfs to the workload's exit code.
fn boot() -> Result<u8, Failure> {
    mounts::kernel_file_systems()?;
    sys::open_console();
    let config = Config::load(CONFIG_PATH)?;
    modules::load(&config.modules)?;
    if let Some(root) = &config.root {
        mounts::switch_to_root(root)?;
    }
    mounts::runtime_file_systems();
    sys::set_host_name(&config.host_name)?;
    sys::bring_up_loopback()?;
    let busy = agent::start(&config);
    let code = workload::run(&config)?;
    busy.wait();
    Ok(code)
}
