//! What a guest boots from, and how it is made.
//!
//! An *image* is one file with a kernel, an initramfs, disks and a command line, named by its content hash.
//! [`Image`] reads and writes it ([`mod@format`] and [`content`] are its bytes; `docs/image-format.md` specifies them),
//! [`build`] makes one from a kernel package and a directory or tar archive. What runs inside the guest before the
//! workload is `init/`, a program of its own that is compiled into this crate.
//!
//! This room knows files and the tools of e2fsprogs. It knows no vCPU, no device and no run.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod builder;
pub mod content;
pub mod cpio;
pub mod deb;
pub mod error;
pub mod ext4;
pub mod format;
pub mod image;
pub mod init_config;
pub mod kernel;
pub mod modules;
pub mod tree;

pub use builder::{BuildOptions, Progress, build};
pub use content::Content;
pub use error::{BuildError, ImageError};
pub use image::{Description, Image, ImageParts, Metadata};
pub use kernel::KernelKind;
