//! The places where a program runs, and how it is started there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::prepare::Prepared;

/// Memory of the guests, in MiB.
pub const GUEST_MEMORY_MIB: u32 = 1024;

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Platform {
    /// On the host, on one CPU.
    Native,
    /// In QEMU's TCG with instruction counting, which makes its time deterministic too.
    Qemu,
    /// In Orrery, with the `soft` engine.
    Soft,
    /// In Orrery, with the engine that it chooses.
    Auto,
}

impl Platform {
    /// All of them, in the order in which a round runs them.
    pub const ALL: [Platform; 4] = [Platform::Native, Platform::Qemu, Platform::Soft, Platform::Auto];

    /// Name in options, file names and the result file.
    pub fn name(self) -> &'static str {
        match self {
            Platform::Native => "native",
            Platform::Qemu => "qemu",
            Platform::Soft => "soft",
            Platform::Auto => "auto",
        }
    }

    /// True for Orrery, with whatever engine.
    pub fn is_orrery(self) -> bool {
        matches!(self, Platform::Soft | Platform::Auto)
    }

    /// Native programs run on one CPU, because the guests have one. The virtual machines may use all: what they do
    /// beside the guest is their merit.
    pub fn is_pinned(self) -> bool {
        self == Platform::Native
    }
}

impl std::str::FromStr for Platform {
    type Err = String;
    fn from_str(text: &str) -> Result<Platform, String> {
        match text {
            "orrery" => Ok(Platform::Soft),
            _ => Platform::ALL
                .into_iter()
                .find(|platform| platform.name() == text)
                .ok_or_else(|| "expected native, qemu, soft or auto".into()),
        }
    }
}

/// The programs that run virtual machines.
#[derive(Clone, Debug)]
pub struct Hypervisors {
    /// QEMU.
    pub qemu: PathBuf,
    /// The `orrery` command.
    pub orrery: PathBuf,
    /// Where Orrery keeps the runs of the benchmark.
    pub runs: PathBuf,
    /// Where Orrery keeps the translations of the benchmark: XDG_CACHE_HOME.
    pub cache: PathBuf,
    /// Orrery has several engines to choose from: `--engine`.
    pub has_engines: bool,
}

impl Hypervisors {
    /// The given programs, with a place for what they write.
    pub fn new(qemu: PathBuf, orrery: PathBuf, directory: &Path) -> Hypervisors {
        let help = Command::new(&orrery).args(["run", "--help"]).output();
        let has_engines = help.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("--engine "));
        let (runs, cache) = (directory.join("runs"), directory.join("cache"));
        Hypervisors { qemu, orrery, runs, cache, has_engines }
    }

    /// Says what is missing for `platforms` before the first minute is spent.
    pub fn check(&self, platforms: &[Platform]) -> Result<()> {
        if platforms.contains(&Platform::Qemu) {
            self.qemu_version().context("apt-get install qemu-system-x86, or --skip qemu")?;
        }
        if platforms.iter().any(|platform| platform.is_orrery()) && !self.orrery.is_file() {
            bail!("{} does not exist: `make build` makes it, or --skip soft --skip auto", self.orrery.display());
        }
        Ok(())
    }

    /// First line of `qemu-system-x86_64 --version`.
    pub fn qemu_version(&self) -> Result<String> {
        let output = Command::new(&self.qemu).arg("--version").output();
        let output = output.with_context(|| format!("cannot start {}", self.qemu.display()))?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
    }

    /// The command that runs `prepared` on `platform`.
    pub fn command(&self, platform: Platform, prepared: &Prepared) -> Result<Command> {
        match platform {
            Platform::Native => Ok(native(prepared)),
            Platform::Qemu => self.qemu(&prepared.extracted),
            Platform::Soft | Platform::Auto => Ok(self.orrery(platform, prepared)),
        }
    }

    fn qemu(&self, extracted: &Path) -> Result<Command> {
        let at = |name: &str| extracted.join(name).to_string_lossy().into_owned();
        let command_line = fs::read_to_string(at("cmdline.txt"))?;
        let mut command = Command::new(&self.qemu);
        // One instruction is one virtual nanosecond, and idle time is skipped, as in Orrery.
        command.args(["-accel", "tcg", "-icount", "shift=0,sleep=off"]);
        // The machine nearest to Orrery's: virtio over MMIO, ACPI, no PCI. `max` has AVX2, BMI and FMA.
        command.args(["-M", "microvm,acpi=on,pcie=off,rtc=on", "-cpu", "max", "-smp", "1"]);
        command.args(["-m", &GUEST_MEMORY_MIB.to_string()]);
        command.args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio"]);
        command.args(["-kernel", &at("vmlinuz"), "-initrd", &at("initrd.img"), "-append", command_line.trim()]);
        command.args(["-drive", &format!("id=disk,if=none,format=raw,snapshot=on,file={}", at("disk0.img"))]);
        command.args(["-device", "virtio-blk-device,drive=disk"]);
        Ok(command)
    }

    fn orrery(&self, platform: Platform, prepared: &Prepared) -> Command {
        let mut command = Command::new(&self.orrery);
        command.arg("run").arg(&prepared.image).args(["--seed", "1", "--memory", &GUEST_MEMORY_MIB.to_string()]);
        command.args(["--no-input", "--json", "--runs"]).arg(&self.runs).env("XDG_CACHE_HOME", &self.cache);
        if self.has_engines {
            command.args(["--engine", platform.name()]);
        }
        if prepared.program.is_cold() {
            command.arg("--no-translation-cache");
        }
        command
    }
}

fn native(prepared: &Prepared) -> Command {
    let mut command = Command::new(&prepared.native[0]);
    command.args(&prepared.native[1..]).env_clear();
    command
}
