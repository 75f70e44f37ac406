//! QEMU with a processor that has SVM: started, listened to, judged by how it ended.

use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Memory of the machine, in MiB.
const MEMORY_MIB: u32 = 2048;
/// The processor: SVM with nested paging, and what of x86-64-v3 the engine needs.
const PROCESSOR: &str = "EPYC,+svm,+npt";
/// Where init writes its exit code; QEMU then exits with twice the code and one.
const POWER_PORT: &str = "isa-debug-exit,iobase=0x604,iosize=1";
/// Any fault of the kernel is a panic, and a panic ends QEMU without an exit code. This machine has nothing to
/// calibrate the TSC against, so its frequency is given; no test depends on the time of day.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 oops=panic nokaslr mitigations=off tsc=reliable \
                            no_timer_check tsc_early_khz=2000000 random.trust_cpu=on \
                            cryptomgr.notests";
/// What the console shows where the machine's kernel has failed.
const FAILURES: [&str; 4] = ["Kernel panic", "Oops:", "BUG: ", "Call Trace:"];

/// The files of one boot.
#[derive(Clone, Debug)]
pub struct Files {
    /// A bzImage.
    pub kernel: PathBuf,
    /// A cpio archive.
    pub initramfs: PathBuf,
    /// Where the console goes.
    pub transcript: PathBuf,
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With this exit code (modulo 128: that is all QEMU tells).
    Exited(u8),
    /// The machine's kernel failed; its first word about that.
    KernelFailed(String),
    /// The machine reset or switched off without an exit code.
    NoCode,
    /// QEMU could not run it, or was killed.
    Qemu(String),
    /// It was stopped after this many seconds.
    TimedOut(u64),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ending::Exited(code) => write!(f, "exit code {code}"),
            Ending::KernelFailed(words) => write!(f, "the machine's kernel failed: {words}"),
            Ending::NoCode => write!(f, "the machine went off without an exit code (a reset?)"),
            Ending::Qemu(status) => write!(f, "QEMU ended with {status}"),
            Ending::TimedOut(seconds) => write!(f, "still running after {seconds} s (--timeout allows more)"),
        }
    }
}

/// Boots and listens to the end, or for `timeout`.
pub fn run(qemu: &Path, files: &Files, timeout: Duration, echo: bool) -> Result<Ending> {
    let transcript = &files.transcript;
    let log = File::create(transcript).with_context(|| format!("cannot write {}", transcript.display()))?;
    let mut command = Command::new(qemu);
    command.args(["-accel", "tcg,thread=single", "-M", "microvm,acpi=on,pcie=off,rtc=on", "-cpu", PROCESSOR]);
    command.args(["-smp", "1", "-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config", "-nographic"]);
    command.args(["-no-reboot", "-serial", "stdio", "-device", POWER_PORT, "-append", COMMAND_LINE]);
    command.arg("-kernel").arg(&files.kernel).arg("-initrd").arg(&files.initramfs);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log.try_clone()?);
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("{} is missing: apt-get install qemu-system-x86", qemu.display())
        }
        Err(error) => return Err(error).with_context(|| format!("cannot start {}", qemu.display())),
    };
    Machine { child, log, echo, console: String::new() }.listen(timeout)
}

/// A running QEMU, which does not outlive this.
struct Machine {
    child: Child,
    log: File,
    echo: bool,
    console: String,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has usually exited; then both do nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Machine {
    fn listen(mut self, timeout: Duration) -> Result<Ending> {
        let deadline = Instant::now() + timeout;
        let mut stdout = self.child.stdout.take().expect("standard output is piped");
        let (sender, receiver) = channel();
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        loop {
            match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.heard(&bytes)?,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => return Ok(Ending::TimedOut(timeout.as_secs())),
            }
        }
        let status = self.child.wait().context("cannot wait for QEMU")?;
        Ok(judge(status.code(), &status.to_string(), &self.console))
    }

    fn heard(&mut self, bytes: &[u8]) -> Result<()> {
        self.log.write_all(bytes).context("cannot write the transcript")?;
        let text = String::from_utf8_lossy(bytes).replace('\r', "");
        if self.echo {
            // A closed standard output is no reason to stop: the transcript has everything.
            let _ = std::io::stdout().write_all(text.as_bytes());
            let _ = std::io::stdout().flush();
        }
        self.console += &text;
        Ok(())
    }
}

/// How the machine ended, by QEMU's exit code and the console.
fn judge(code: Option<i32>, status: &str, console: &str) -> Ending {
    let failed = console.lines().find(|line| FAILURES.iter().any(|words| line.contains(words)));
    match (code, failed) {
        (_, Some(line)) => Ending::KernelFailed(line.trim().to_owned()),
        (Some(0), None) => Ending::NoCode,
        // QEMU's own failures end with 1 as well, before the guest's kernel or program can have said anything.
        (Some(1), None) if console.is_empty() => Ending::Qemu(status.to_owned()),
        (Some(code), None) if code & 1 == 1 => Ending::Exited((code >> 1) as u8),
        _ => Ending::Qemu(status.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_are_told_apart() {
        assert_eq!(judge(Some(1), "", "all well\n"), Ending::Exited(0));
        assert_eq!(judge(Some(3), "", "not well\n"), Ending::Exited(1));
        assert_eq!(judge(Some(203), "", "panicked\n"), Ending::Exited(101));
        assert_eq!(judge(Some(1), "exit status: 1", ""), Ending::Qemu("exit status: 1".into()));
        assert_eq!(judge(None, "signal: 9", "all well\n"), Ending::Qemu("signal: 9".into()));
        assert_eq!(judge(Some(0), "", "all well\n"), Ending::NoCode);
        let panic = "x\n[    1.0] Kernel panic - not syncing\n";
        assert_eq!(judge(Some(0), "", panic), Ending::KernelFailed("[    1.0] Kernel panic - not syncing".into()));
        assert!(matches!(judge(Some(1), "", "[    1.0] BUG: unable to handle\n"), Ending::KernelFailed(_)));
    }
}
