//! A second flavour of KVM, on any host: QEMU emulates an AMD processor with SVM and nested paging (AMD APM volume 2,
//! chapter 15), Debian's kernel runs on it with its modules `kvm` and `kvm_amd`, and a program of this workspace is
//! given that kernel's `/dev/kvm`.
//!
//! [`initramfs`] packs the program with what it needs, [`vm`] boots it and says how it ended, [`list`] reads which
//! programs are to be run. Nothing here depends on the host's own KVM, which is not used.

pub mod initramfs;
pub mod list;
pub mod vm;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::workshop;
use initramfs::Program;
use vm::Ending;

/// How programs are run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The QEMU command.
    pub qemu: PathBuf,
    /// Longest time of one program, boot included.
    pub timeout: Duration,
    /// Show the guest's console while it runs.
    pub echo: bool,
    /// Where kernel, initramfs and transcripts are put.
    pub directory: PathBuf,
}

/// Boots the machine, runs the program in it and says how that ended. What it printed is in `NAME.log` in the
/// directory, and in the second half of the result.
pub fn run(options: &Options, name: &str, program: &Program) -> Result<(Ending, String)> {
    let directory = &options.directory;
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let package = workshop::kernel_package()?;
    let files = vm::Files {
        kernel: directory.join("vmlinuz"),
        initramfs: directory.join(format!("{name}.initrd")),
        transcript: directory.join(format!("{name}.log")),
    };
    let guest = initramfs::build(&package, program)?;
    write(&files.kernel, &guest.kernel)?;
    write(&files.initramfs, &guest.initramfs)?;
    let ending = vm::run(&options.qemu, &files, options.timeout, options.echo)?;
    let words = fs::read(&files.transcript).with_context(|| format!("cannot read {}", files.transcript.display()))?;
    Ok((ending, String::from_utf8_lossy(&words).into_owned()))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}
