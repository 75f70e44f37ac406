//! Arguments of `orrery image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Arguments of `orrery image`.
#[derive(Args, Debug)]
pub struct ImageArgs {
    /// What to do with images.
    #[command(subcommand)]
    pub command: ImageCommand,
}

/// What `orrery image` can do.
#[derive(Subcommand, Debug)]
pub enum ImageCommand {
    /// Build an image from a kernel and a root file system
    Build(Box<ImageBuildArgs>),
    /// Show what is in an image
    Inspect(ImageInspectArgs),
    /// Write an image's kernel, initramfs and disks to files
    Extract(ImageExtractArgs),
}

/// Arguments of `orrery image build`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  orrery image build --kernel linux-image-6.1.0-18-cloud-amd64_6.1.76-1_amd64.deb \\
      --root rootfs/ -o shell.img -- /bin/sh -l
  orrery image build --kernel vmlinuz --root root.tar --env TZ=UTC -o server.img -- /usr/bin/server")]
pub struct ImageBuildArgs {
    /// Kernel: a Debian package, a bzImage or a vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Root file system: a directory or a tar archive
    #[arg(long, value_name = "DIR|TAR")]
    pub root: PathBuf,
    /// Modules of a bare kernel, such as /lib/modules/VERSION; a package brings its own
    #[arg(long, value_name = "DIR")]
    pub modules: Option<PathBuf>,
    /// Command that the guest runs, with its arguments (also after --)
    #[arg(long, value_name = "CMD")]
    pub entry: Option<String>,
    /// A variable of the command's environment
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub env: Vec<(String, String)>,
    /// Additional kernel command line
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Working directory of the command [default: /]
    #[arg(long, value_name = "DIR")]
    pub directory: Option<String>,
    /// Host name of the guest [default: orrery]
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Size of the root disk, in MiB; by default the contents and 256 MiB
    #[arg(long, value_name = "MIB")]
    pub disk_size: Option<u64>,
    /// Where to write the image
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// Print the image's description as JSON
    #[arg(long)]
    pub json: bool,
    /// The command's arguments, or the command itself if there is no --entry
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// Arguments of `orrery image inspect`.
#[derive(Args, Debug)]
pub struct ImageInspectArgs {
    /// The image
    pub image: PathBuf,
    /// Print the description as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `orrery image extract`.
#[derive(Args, Debug)]
pub struct ImageExtractArgs {
    /// The image
    pub image: PathBuf,
    /// Directory to write to; made if it is missing
    pub directory: PathBuf,
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    if name.is_empty() {
        return Err("the variable has no name".into());
    }
    Ok((name.to_owned(), value.to_owned()))
}
