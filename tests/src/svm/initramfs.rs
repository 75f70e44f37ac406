//! What the machine boots: Debian's kernel, and an initramfs with init, KVM's modules, the program and the libraries
//! it is linked to. There is no disk.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use orrery_guest_image::builder::INIT;
use orrery_guest_image::cpio::CpioWriter;
use orrery_guest_image::deb::Package;
use orrery_guest_image::init_config::{self, InitConfig};
use orrery_guest_image::modules::ModuleLibrary;

use crate::workshop;

/// The modules that make `/dev/kvm` on AMD processors; what they depend on comes along.
const MODULES: [&str; 1] = ["kvm_amd"];
/// Directories that init and programs expect.
const DIRECTORIES: [&str; 9] = ["dev", "etc", "etc/orrery", "lib", "lib/modules", "proc", "run", "sys", "tmp"];

/// A program of the host, with how to call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The file. Shared libraries are found as the host finds them.
    pub file: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its environment, but for PATH and the like.
    pub environment: Vec<(String, String)>,
}

/// What to boot.
pub struct Guest {
    /// A bzImage.
    pub kernel: Vec<u8>,
    /// A cpio archive.
    pub initramfs: Vec<u8>,
}

/// Takes kernel and modules out of the package and packs the program.
pub fn build(package: &Path, program: &Program) -> Result<Guest> {
    let opened = Package::open(package)?;
    let kernels: Vec<&str> = opened.files().filter(|file| file.starts_with("boot/vmlinuz-")).collect();
    ensure!(kernels.len() == 1, "{} has {} kernels instead of one", package.display(), kernels.len());
    let kernel = opened.read(kernels[0])?.with_context(|| format!("{} disappeared", kernels[0]))?;
    let modules = ModuleLibrary::from_package(&opened, package)?.select_named(&MODULES)?;

    let mut archive = Archive::new();
    DIRECTORIES.iter().for_each(|directory| archive.directory(Path::new(directory)));
    archive.writer.character_device("dev/console", 5, 1);
    archive.writer.file("init", 0o755, INIT);
    let mut config = InitConfig {
        host_name: "svm".to_owned(),
        working_directory: "/".to_owned(),
        environment: [("PATH", "/bin"), ("HOME", "/tmp"), ("TERM", "vt100")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        ..InitConfig::default()
    };
    for module in modules {
        let path = format!("lib/modules/{}.ko", module.name);
        archive.writer.file(&path, 0o644, &module.content);
        config.modules.push((module.condition, format!("/{path}")));
    }
    let file =
        fs::canonicalize(&program.file).with_context(|| format!("there is no program {}", program.file.display()))?;
    for library in workshop::shared_libraries(std::slice::from_ref(&file), Path::new("/nonexistent"))? {
        archive.host_file(&library)?;
    }
    archive.host_file(&file)?;
    config.environment.extend(program.environment.iter().cloned());
    config.entry = std::iter::once(path_text(&file)?).chain(program.arguments.iter().cloned()).collect();
    archive.writer.file(init_config::PATH, 0o644, &config.encode());
    Ok(Guest { kernel, initramfs: archive.writer.finish() })
}

/// The archive, with the directories that it already has.
struct Archive {
    writer: CpioWriter,
    directories: BTreeSet<PathBuf>,
}

impl Archive {
    fn new() -> Archive {
        Archive { writer: CpioWriter::new(), directories: BTreeSet::from([PathBuf::new()]) }
    }

    /// Adds a directory, after those above it.
    fn directory(&mut self, path: &Path) {
        if !self.directories.insert(path.to_path_buf()) {
            return;
        }
        if let Some(parent) = path.parent() {
            self.directory(parent);
        }
        self.writer.directory(&path.to_string_lossy());
    }

    /// Adds a file of the host under the path by which the host's loader names it.
    fn host_file(&mut self, file: &Path) -> Result<()> {
        let content = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let place = file.strip_prefix("/").unwrap_or(file);
        if let Some(parent) = place.parent() {
            self.directory(parent);
        }
        self.writer.file(&path_text(place)?, 0o755, &content);
        Ok(())
    }
}

fn path_text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_first_and_once() {
        let mut archive = Archive::new();
        archive.directory(Path::new("a/b/c"));
        archive.directory(Path::new("a/b/d"));
        let bytes = archive.writer.finish();
        let text = String::from_utf8_lossy(&bytes);
        let at = |name: &str| text.find(&format!("{name}\0")).unwrap_or_else(|| panic!("{name} is missing"));
        assert!(at("a") < at("a/b") && at("a/b") < at("a/b/c") && at("a/b/c") < at("a/b/d"));
        assert_eq!(text.matches("a/b\0").count(), 1);
    }
}
