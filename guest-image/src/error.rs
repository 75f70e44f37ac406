//! What can go wrong with an image: reading one ([`ImageError`]) and making one ([`BuildError`]).

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// An image file that cannot be used. Every variant names the file and, where it applies, the section.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file cannot be opened, read or written.
    #[error("{path}: {error}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        error: io::Error,
    },
    /// The file is something else.
    #[error("{path} is not an Orrery image; make one with `orrery image build`", path = path.display())]
    NotAnImage {
        /// The file.
        path: PathBuf,
    },
    /// The file's format is of another version.
    #[error("{path} has image format {found}, this program reads {supported}; rebuild the image", path = path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version it declares.
        found: u32,
        /// The version this program reads.
        supported: u32,
    },
    /// The file ends before what it declares.
    #[error("{path} is truncated: {section} needs {needed} bytes, {present} are there; copy or build it again",
        path = path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The section, or "header".
        section: String,
        /// How far the section reaches in the file.
        needed: u64,
        /// Length of the file.
        present: u64,
    },
    /// Something in the file contradicts something else in it, or its hash.
    #[error("{path} is corrupt: {section}: {reason}; copy or build it again", path = path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The section, or "header".
        section: String,
        /// What does not fit.
        reason: String,
    },
    /// A declared size exceeds what this program accepts.
    #[error("{path}: {section} declares {bytes} bytes, the limit is {limit}", path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The section.
        section: String,
        /// What it declares.
        bytes: u64,
        /// What is accepted.
        limit: u64,
    },
    /// The host does not have the memory for the image's contents.
    #[error("{path}: no memory for {section} of {bytes} bytes: {error}", path = path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// The section.
        section: String,
        /// Its size.
        bytes: u64,
        /// What the operating system said.
        #[source]
        error: io::Error,
    },
    /// The kernel inside the image is not usable.
    #[error("{path}: {error}", path = path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with the kernel.
        #[source]
        error: KernelError,
    },
}

/// A kernel that cannot be booted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KernelError {
    /// The file is empty.
    #[error("the kernel is empty")]
    Empty,
    /// It is for another processor.
    #[error("the kernel is for {architecture}; Orrery boots x86-64 kernels")]
    Architecture {
        /// What it is for.
        architecture: String,
    },
    /// It ends early.
    #[error("the kernel is truncated: {bytes} bytes of at least {needed}")]
    Truncated {
        /// Its length.
        bytes: u64,
        /// What its header asks for.
        needed: u64,
    },
    /// It is in no known format.
    #[error("the kernel is neither a bzImage nor an ELF vmlinux ({detail})")]
    Unknown {
        /// What it looks like.
        detail: String,
    },
}

/// An image that could not be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// A file cannot be read or written.
    #[error("{path}: {error}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        error: io::Error,
    },
    /// The kernel cannot be booted.
    #[error("{path}: {error}", path = path.display())]
    Kernel {
        /// The kernel or package.
        path: PathBuf,
        /// What is wrong.
        #[source]
        error: KernelError,
    },
    /// The kernel package is damaged or is no kernel package.
    #[error("{path} is not a usable kernel package: {reason}", path = path.display())]
    Package {
        /// The package.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A kernel module that the machine's devices need is missing.
    #[error("the kernel has no module {module}, neither built in nor in {path}; use a kernel with virtio drivers",
        path = path.display())]
    ModuleMissing {
        /// The module.
        module: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A kernel module is damaged.
    #[error("kernel module {module} is damaged: {reason}")]
    Module {
        /// The module.
        module: String,
        /// What is wrong.
        reason: String,
    },
    /// The root directory or archive cannot be used.
    #[error("root {path}: {reason}", path = path.display())]
    Root {
        /// The directory, the archive, or the entry in it.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An option has an unusable value.
    #[error("{option}: {reason}")]
    Option {
        /// The command line's name of the option.
        option: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The contents do not fit the disk.
    #[error("the root needs about {needed_mib} MiB, the disk has {disk_mib}; give --disk-size {needed_mib} or more")]
    DiskTooSmall {
        /// What the contents need.
        needed_mib: u64,
        /// What was asked for.
        disk_mib: u64,
    },
    /// A tool of the host is missing.
    #[error("{tool} is not installed; install the package {package} (Debian: apt-get install {package})")]
    ToolMissing {
        /// The program.
        tool: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A tool of the host failed.
    #[error("{tool} failed: {message}")]
    Tool {
        /// The program.
        tool: &'static str,
        /// Its own words.
        message: String,
    },
    /// The finished image cannot be written.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl BuildError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> BuildError {
        let path = path.into();
        move |error| BuildError::Io { path, error }
    }
}
