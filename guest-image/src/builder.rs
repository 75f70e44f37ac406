//! Makes an image: kernel, init and modules in an initramfs, a root disk, and the command line that ties them.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::content::Content;
use crate::cpio::CpioWriter;
use crate::deb::{self, Package};
use crate::error::{BuildError, KernelError};
use crate::ext4;
use crate::format::SectionKind;
use crate::image::{Image, ImageParts, Metadata};
use crate::init_config::{self, InitConfig};
use crate::kernel;
use crate::modules::{Module, ModuleLibrary};
use crate::tree::{Kind, Tree};

/// `/init` for the guest, compiled from `init/` when this crate was.
pub static INIT: &[u8] = include_bytes!(env!("ORRERY_INIT"));

/// The command line of every image; the options of [`BuildOptions::command_line`] follow and override.
///
/// - `console=ttyS0 quiet`: the console shows the workload, and the kernel only when something is wrong.
/// - `panic=-1`: a kernel panic resets the machine at once, which ends the run.
/// - `nokaslr`: kernel addresses are those of its symbol table.
/// - `mitigations=off`: what side channels could leak is a function of the run's arguments anyway, and the
///   workarounds cost a good deal.
/// - `tsc=reliable no_timer_check`: the TSC is virtual time; there is nothing to check it against.
/// - `random.trust_cpu=on`: RDRAND is the machine's seeded generator.
/// - `cryptomgr.notests 8250.nr_uarts=1`: shortens the boot.
pub const BASE_COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 nokaslr mitigations=off tsc=reliable \
                                     no_timer_check random.trust_cpu=on cryptomgr.notests 8250.nr_uarts=1";

/// The entry command's environment unless it is overridden.
const BASE_ENVIRONMENT: [(&str, &str); 3] =
    [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/root"), ("TERM", "vt100")];

/// What to build.
#[derive(Clone, Debug, Default)]
pub struct BuildOptions {
    /// A Debian kernel package, a bzImage, or an ELF vmlinux.
    pub kernel: PathBuf,
    /// Modules of a bare kernel (`/lib/modules/VERSION`). Without them its drivers must be built in. Not used with
    /// a package, which has its own.
    pub modules: Option<PathBuf>,
    /// The root file system: a directory or a tar archive (plain, gzip, xz, zstd).
    pub root: PathBuf,
    /// Entry command and arguments. Empty: `/bin/sh`.
    pub entry: Vec<String>,
    /// Environment of the entry command, added to PATH, HOME and TERM or overriding them.
    pub environment: Vec<(String, String)>,
    /// Working directory of the entry command. `None`: `/`.
    pub working_directory: Option<String>,
    /// The guest's host name. `None`: `orrery`.
    pub host_name: Option<String>,
    /// Kernel options after [`BASE_COMMAND_LINE`]; a later option overrides an earlier one.
    pub command_line: String,
    /// Size of the root disk in MiB. `None`: the contents and 256 MiB.
    pub disk_size_mib: Option<u64>,
}

/// Steps of the build, for a progress display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Reading the kernel or unpacking its package, and choosing modules.
    Kernel,
    /// Reading the root directory or archive.
    ReadRoot,
    /// Writing the initramfs.
    Initramfs,
    /// Making the file system.
    MakeDisk,
    /// Hashing.
    Hash,
}

impl Progress {
    /// All steps in order.
    pub const STEPS: [Progress; 5] =
        [Progress::Kernel, Progress::ReadRoot, Progress::Initramfs, Progress::MakeDisk, Progress::Hash];

    /// What to show.
    pub fn describe(self) -> &'static str {
        match self {
            Progress::Kernel => "reading the kernel",
            Progress::Initramfs => "making the initramfs",
            Progress::ReadRoot => "reading the root",
            Progress::MakeDisk => "making the disk",
            Progress::Hash => "hashing",
        }
    }
}

/// Builds an image in memory; [`Image::write`] makes a file of it. `progress` is called at the beginning of each
/// step.
pub fn build(options: &BuildOptions, mut progress: impl FnMut(Progress)) -> Result<Image, BuildError> {
    check_options(options)?;
    let tools = ext4::Tools::find()?;

    progress(Progress::Kernel);
    let kernel = read_kernel(options)?;

    progress(Progress::ReadRoot);
    let tree = Tree::read(&options.root)?;
    let environment = environment(&options.environment);
    let entry = match &options.entry[..] {
        [] => vec!["/bin/sh".to_string()],
        given => given.to_vec(),
    };
    check_entry(&tree, &entry[0], &environment)?;
    let disk_mib = ext4::disk_size_mib(&tree, options.disk_size_mib)?;

    progress(Progress::Initramfs);
    let config = InitConfig {
        modules: Vec::new(),
        root: Some("/dev/vda".to_string()),
        host_name: options.host_name.clone().unwrap_or_else(|| "orrery".to_string()),
        working_directory: options.working_directory.clone().unwrap_or_else(|| "/".to_string()),
        environment: environment.clone(),
        entry: entry.clone(),
    };
    let initramfs = initramfs(config, &kernel.modules);

    progress(Progress::MakeDisk);
    let disk = ext4::make(&tools, &tree, disk_mib)?;

    progress(Progress::Hash);
    let metadata = Metadata {
        kernel_release: kernel::release(&kernel.image),
        kernel_package: kernel.package,
        modules: kernel.modules.iter().map(|module| module.name.clone()).collect(),
    };
    let parts = ImageParts {
        kernel: Content::from(kernel.image),
        initramfs: Content::from(initramfs),
        disks: vec![disk],
        command_line: format!("{BASE_COMMAND_LINE} {}", options.command_line).trim_end().to_string(),
        entry,
        environment,
        metadata,
    };
    Image::from_parts(parts).map_err(|error| BuildError::Kernel { path: options.kernel.clone(), error })
}

/// A kernel with what belongs to it.
struct Kernel {
    image: Vec<u8>,
    modules: Vec<Module>,
    package: Option<String>,
}

fn read_kernel(options: &BuildOptions) -> Result<Kernel, BuildError> {
    let path = &options.kernel;
    let mut magic = Vec::new();
    let file = File::open(path).map_err(BuildError::io(path))?;
    file.take(deb::MAGIC.len() as u64).read_to_end(&mut magic).map_err(BuildError::io(path))?;
    if magic == deb::MAGIC {
        return read_kernel_package(path);
    }
    let len = fs::metadata(path).map_err(BuildError::io(path))?.len();
    check_kernel_len(path, len)?;
    let image = fs::read(path).map_err(BuildError::io(path))?;
    check_kernel(path, &image)?;
    let modules = match &options.modules {
        Some(directory) => ModuleLibrary::from_directory(directory)?.select()?,
        None => Vec::new(),
    };
    Ok(Kernel { image, modules, package: None })
}

fn read_kernel_package(path: &Path) -> Result<Kernel, BuildError> {
    let package = Package::open(path)?;
    let broken = |reason: String| BuildError::Package { path: path.to_path_buf(), reason };
    match package.field("Architecture") {
        Some("amd64") => {}
        Some(other) => {
            let error = KernelError::Architecture { architecture: other.to_string() };
            return Err(BuildError::Kernel { path: path.to_path_buf(), error });
        }
        None => return Err(broken("its control file names no architecture".to_string())),
    }
    let kernels: Vec<String> =
        package.files().filter(|file| file.starts_with("boot/vmlinuz-")).map(str::to_string).collect();
    let kernel = match &kernels[..] {
        [kernel] => kernel,
        [] => {
            let depends = package.field("Depends").unwrap_or("nothing");
            return Err(broken(format!("it has no boot/vmlinuz-*; a metapackage? It depends on {depends}")));
        }
        several => {
            return Err(broken(format!("it has several kernels: {}", several.join(", "))));
        }
    };
    let image = package.read(kernel)?.ok_or_else(|| broken(format!("{kernel} disappeared")))?;
    check_kernel_len(path, image.len() as u64)?;
    check_kernel(path, &image)?;
    let modules = ModuleLibrary::from_package(&package, path)?.select()?;
    let name = package.field("Package").unwrap_or("unnamed");
    let version = package.field("Version").unwrap_or("0");
    Ok(Kernel { image, modules, package: Some(format!("{name} {version}")) })
}

fn check_kernel(path: &Path, image: &[u8]) -> Result<(), BuildError> {
    kernel::recognise(image).map(drop).map_err(|error| BuildError::Kernel { path: path.to_path_buf(), error })
}

fn check_kernel_len(path: &Path, len: u64) -> Result<(), BuildError> {
    let limit = SectionKind::Kernel.limit_bytes();
    if len <= limit {
        return Ok(());
    }
    let detail = format!("{len} bytes, more than any kernel: the limit is {limit}");
    Err(BuildError::Kernel { path: path.to_path_buf(), error: KernelError::Unknown { detail } })
}

/// The archive that the kernel unpacks: init, its configuration, and the modules.
fn initramfs(mut config: InitConfig, modules: &[Module]) -> Vec<u8> {
    let mut archive = CpioWriter::new();
    for directory in ["dev", "etc", "etc/orrery", "lib", "lib/modules", "newroot", "proc", "sys"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, INIT);
    for (index, module) in modules.iter().enumerate() {
        // A module may be wanted under two conditions; the number keeps the paths apart.
        let path = format!("lib/modules/{index:02}-{}.ko", module.name);
        archive.file(&path, 0o644, &module.content);
        config.modules.push((module.condition, format!("/{path}")));
    }
    archive.file(init_config::PATH, 0o644, &config.encode());
    archive.finish()
}

/// The base environment with the user's variables over it, in a fixed order: base, then new ones as given.
fn environment(given: &[(String, String)]) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> =
        BASE_ENVIRONMENT.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    for (name, value) in given {
        match all.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => old.clone_from(value),
            None => all.push((name.clone(), value.clone())),
        }
    }
    all
}

/// Everything from the command line that would reach the guest must be representable there.
fn check_options(options: &BuildOptions) -> Result<(), BuildError> {
    let bad = |option, reason: String| Err(BuildError::Option { option, reason });
    for argument in &options.entry {
        if argument.contains('\0') {
            return bad("--entry", "a NUL byte cannot be in an argument".to_string());
        }
    }
    if options.entry.first().is_some_and(|program| program.is_empty()) {
        return bad("--entry", "the command is empty".to_string());
    }
    for (name, value) in &options.environment {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return bad("--env", format!("{name}={value} is not NAME=VALUE"));
        }
    }
    let total_len = |lens: &mut dyn Iterator<Item = usize>| lens.map(|len| len + 1).sum::<usize>() as u64;
    if total_len(&mut options.entry.iter().map(String::len)) > SectionKind::Entry.limit_bytes() {
        return bad("--entry", format!("longer than {} bytes", SectionKind::Entry.limit_bytes()));
    }
    let environment_len = total_len(&mut options.environment.iter().map(|(name, value)| name.len() + value.len() + 1));
    if environment_len + 256 > SectionKind::Environment.limit_bytes() {
        return bad("--env", format!("longer than {} bytes", SectionKind::Environment.limit_bytes()));
    }
    if options.command_line.contains(['\0', '\n']) {
        return bad("--cmdline", "line ends and NUL bytes cannot be in the kernel's command line".to_string());
    }
    let limit = SectionKind::CommandLine.limit_bytes() as usize - BASE_COMMAND_LINE.len() - 1;
    if options.command_line.len() > limit {
        return bad("--cmdline", format!("{} bytes, the limit is {limit}", options.command_line.len()));
    }
    if let Some(directory) = &options.working_directory
        && (!directory.starts_with('/') || directory.contains('\0'))
    {
        return bad("--workdir", format!("{directory} is not an absolute path"));
    }
    if let Some(name) = &options.host_name
        && (name.is_empty()
            || name.len() > 64
            || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.'))
    {
        return bad("--hostname", format!("{name} is not a host name"));
    }
    Ok(())
}

/// Looks the entry command up as the guest will: a mistake is better found now than after a boot.
fn check_entry(tree: &Tree, program: &str, environment: &[(String, String)]) -> Result<(), BuildError> {
    let path = environment.iter().find(|(name, _)| name == "PATH").map_or("", |(_, value)| value);
    let candidates: Vec<String> = if program.contains('/') {
        vec![program.to_string()]
    } else {
        path.split(':').map(|directory| format!("{directory}/{program}")).collect()
    };
    let mut obstacle = None;
    for candidate in &candidates {
        match tree.resolve(candidate.as_bytes()) {
            Some(node) if node.kind == Kind::Directory => obstacle = Some("is a directory"),
            Some(node) if node.permissions & 0o111 != 0 => return Ok(()),
            Some(_) => obstacle = Some("is not executable"),
            None => {}
        }
    }
    let reason = match obstacle {
        Some(obstacle) => format!("{program} {obstacle} in the root"),
        None => format!("{program} is not in the root (looked for {})", candidates.join(", ")),
    };
    Err(BuildError::Option { option: "--entry", reason })
}
