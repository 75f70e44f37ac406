//! Chooses the kernel modules that a guest needs before its root disk is there, and orders them by dependency.
//!
//! Dependencies come from the modules themselves (`depends=` in the ELF section `.modinfo`), because kernel
//! packages carry no `modules.dep`: that file is made at installation.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::deb::{Package, decompressor};
use crate::error::BuildError;
use crate::format::{u32_at, u64_at};
use crate::init_config::Condition;

/// Most bytes of one module, unpacked.
const MAX_MODULE_BYTES: u64 = 64 << 20;

/// A module that is wanted, when, and whether the guest cannot do without.
struct Wanted {
    name: &'static str,
    condition: Condition,
    required: bool,
}

const fn wanted(name: &'static str, condition: Condition, required: bool) -> Wanted {
    Wanted { name, condition, required }
}

/// Virtio device types: virtio 1.2, section 5.
const VIRTIO_NET: u32 = 1;
const VIRTIO_BLOCK: u32 = 2;
const VIRTIO_CONSOLE: u32 = 3;
const VIRTIO_ENTROPY: u32 = 4;
/// PCI vendor of virtio devices, for machines that offer them over PCI.
const VIRTIO_PCI_VENDOR: u32 = 0x1af4;

/// What a guest needs, in order: transports, entropy, disk and its file system, then the rest.
const WANTED: [Wanted; 8] = [
    wanted("virtio_mmio", Condition::Always, true),
    wanted("virtio_pci", Condition::PciVendor(VIRTIO_PCI_VENDOR), false),
    wanted("virtio_rng", Condition::VirtioDevice(VIRTIO_ENTROPY), false),
    wanted("virtio_blk", Condition::VirtioDevice(VIRTIO_BLOCK), true),
    wanted("crc32c_generic", Condition::Always, false),
    wanted("ext4", Condition::Always, true),
    wanted("virtio_console", Condition::VirtioDevice(VIRTIO_CONSOLE), false),
    wanted("virtio_net", Condition::VirtioDevice(VIRTIO_NET), false),
];

/// A module ready for the initramfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// When init loads it.
    pub condition: Condition,
    /// The ELF file, unpacked.
    pub content: Vec<u8>,
}

/// A kernel's modules, wherever they are.
pub struct ModuleLibrary<'a> {
    source: Source<'a>,
    /// Where they are, for messages.
    location: PathBuf,
    /// Module name to path in the source.
    files: BTreeMap<String, String>,
    /// Names of modules that are part of the kernel.
    built_in: BTreeSet<String>,
}

enum Source<'a> {
    Package(&'a Package),
    Directory,
}

impl<'a> ModuleLibrary<'a> {
    /// The modules of a kernel package.
    pub fn from_package(package: &'a Package, location: &Path) -> Result<ModuleLibrary<'a>, BuildError> {
        let paths = package.files().map(str::to_string).collect();
        ModuleLibrary::new(Source::Package(package), location, paths)
    }

    /// The modules in a directory such as `/lib/modules/6.1.0-56-cloud-amd64`.
    pub fn from_directory(directory: &Path) -> Result<ModuleLibrary<'static>, BuildError> {
        let mut paths = Vec::new();
        let mut pending = vec![directory.to_path_buf()];
        while let Some(next) = pending.pop() {
            for entry in fs::read_dir(&next).map_err(BuildError::io(&next))? {
                let entry = entry.map_err(BuildError::io(&next))?;
                let kind = entry.file_type().map_err(BuildError::io(entry.path()))?;
                if kind.is_dir() {
                    pending.push(entry.path());
                } else if kind.is_file() {
                    paths.push(entry.path().to_string_lossy().into_owned());
                }
            }
        }
        paths.sort();
        ModuleLibrary::new(Source::Directory, directory, paths)
    }

    fn new(source: Source<'a>, location: &Path, paths: Vec<String>) -> Result<ModuleLibrary<'a>, BuildError> {
        let mut library = ModuleLibrary {
            source,
            location: location.to_path_buf(),
            files: BTreeMap::new(),
            built_in: BTreeSet::new(),
        };
        for path in paths {
            if path.rsplit('/').next() == Some("modules.builtin") {
                let list = String::from_utf8_lossy(&library.read(&path)?).into_owned();
                library.built_in.extend(list.lines().filter_map(module_name));
            } else if let Some(name) = module_name(&path) {
                library.files.insert(name, path);
            }
        }
        Ok(library)
    }

    /// The modules a guest needs, each after those it depends on.
    pub fn select(&self) -> Result<Vec<Module>, BuildError> {
        let mut chosen = Vec::new();
        for wanted in &WANTED {
            let present = self.files.contains_key(wanted.name) || self.built_in.contains(wanted.name);
            if present {
                self.add(wanted.name, wanted.condition, &mut chosen, &mut Vec::new())?;
            } else if wanted.required {
                return Err(self.missing(wanted.name));
            }
        }
        Ok(chosen)
    }

    /// These modules, whatever the machine, each after those it depends on: for a guest that is more than its workload.
    /// What is part of the kernel is left out.
    pub fn select_named(&self, names: &[&str]) -> Result<Vec<Module>, BuildError> {
        let mut chosen = Vec::new();
        for name in names {
            self.add(name, Condition::Always, &mut chosen, &mut Vec::new())?;
        }
        Ok(chosen)
    }

    /// Adds a module after its dependencies. `path` is the chain of modules being added, against cycles.
    fn add(
        &self,
        name: &str,
        condition: Condition,
        chosen: &mut Vec<Module>,
        path: &mut Vec<String>,
    ) -> Result<(), BuildError> {
        let satisfied = |module: &Module| {
            module.name == name && (module.condition == condition || module.condition == Condition::Always)
        };
        if self.built_in.contains(name) || chosen.iter().any(satisfied) {
            return Ok(());
        }
        if path.iter().any(|ancestor| ancestor == name) {
            return Err(BuildError::Module { module: name.into(), reason: "it depends on itself".into() });
        }
        let content = self.load(name)?;
        let depends = dependencies(&content).map_err(|reason| BuildError::Module { module: name.into(), reason })?;
        path.push(name.to_string());
        for dependency in depends {
            self.add(&dependency, condition, chosen, path)?;
        }
        path.pop();
        chosen.push(Module { name: name.to_string(), condition, content });
        Ok(())
    }

    fn load(&self, name: &str) -> Result<Vec<u8>, BuildError> {
        let path = self.files.get(name).ok_or_else(|| self.missing(name))?;
        let packed = self.read(path)?;
        let extension = path.rsplit('.').next().unwrap_or_default();
        let damaged = |reason: String| BuildError::Module { module: name.into(), reason };
        let mut content = Vec::new();
        decompressor(&packed[..], extension)
            .and_then(|stream| stream.take(MAX_MODULE_BYTES).read_to_end(&mut content))
            .map_err(|error| damaged(error.to_string()))?;
        if content.len() as u64 == MAX_MODULE_BYTES {
            return Err(damaged(format!("larger than {MAX_MODULE_BYTES} bytes")));
        }
        Ok(content)
    }

    fn read(&self, path: &str) -> Result<Vec<u8>, BuildError> {
        match self.source {
            Source::Package(package) => package.read(path)?.ok_or_else(|| BuildError::Package {
                path: self.location.clone(),
                reason: format!("{path} disappeared"),
            }),
            Source::Directory => fs::read(path).map_err(BuildError::io(path)),
        }
    }

    fn missing(&self, module: &str) -> BuildError {
        BuildError::ModuleMissing { module: module.to_string(), path: self.location.clone() }
    }
}

/// The module name of a path such as `kernel/drivers/char/hw_random/virtio-rng.ko.xz`; `None` for other files.
fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|suffix| file.strip_suffix(suffix))?;
    Some(stem.replace('-', "_"))
}

/// The names after `depends=` in the module's `.modinfo` section.
fn dependencies(module: &[u8]) -> Result<Vec<String>, String> {
    let section = elf_section(module, b".modinfo")?;
    for record in section.split(|&byte| byte == 0) {
        if let Some(list) = record.strip_prefix(b"depends=") {
            let list = std::str::from_utf8(list).map_err(|_| "its dependencies are not text".to_string())?;
            return Ok(list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect());
        }
    }
    Ok(Vec::new())
}

/// The content of a named section of a 64-bit little-endian x86-64 ELF file.
fn elf_section<'a>(file: &'a [u8], name: &[u8]) -> Result<&'a [u8], String> {
    const ELF_HEADER_BYTES: usize = 64;
    const SECTION_HEADER_BYTES: usize = 64;
    if file.len() < ELF_HEADER_BYTES || !file.starts_with(b"\x7fELF\x02\x01") {
        return Err("it is not a 64-bit ELF file".into());
    }
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([file[at], file[at + 1]]));
    if u16_at(18) != 62 {
        return Err("it is not for x86-64".into());
    }
    let (table, entry_bytes, count, names) = (u64_at(file, 40), u16_at(58), u16_at(60), u16_at(62));
    if entry_bytes != SECTION_HEADER_BYTES {
        return Err("its section headers have an unknown size".into());
    }
    let header = |index: usize| {
        let start = usize::try_from(table).ok()?.checked_add(index * SECTION_HEADER_BYTES)?;
        file.get(start..start.checked_add(SECTION_HEADER_BYTES)?)
    };
    let content = |header: &[u8]| {
        let start = usize::try_from(u64_at(header, 24)).ok()?;
        file.get(start..start.checked_add(usize::try_from(u64_at(header, 32)).ok()?)?)
    };
    let truncated = || "it is truncated".to_string();
    let names = header(names).and_then(content).ok_or_else(truncated)?;
    for index in 0..count {
        let header = header(index).ok_or_else(truncated)?;
        let found = names.get(u32_at(header, 0) as usize..).and_then(|rest| rest.split(|&byte| byte == 0).next());
        if found == Some(name) {
            return content(header).ok_or_else(truncated);
        }
    }
    Err(format!("it has no section {}", String::from_utf8_lossy(name)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A module with nothing but `.modinfo`.
    fn module(depends: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let info = format!("license=GPL\0depends={depends}\0");
        let mut file = vec![0; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        let names_at = file.len();
        file.extend_from_slice(names);
        let info_at = file.len();
        file.extend_from_slice(info.as_bytes());
        let table = file.len();
        file[40..48].copy_from_slice(&(table as u64).to_le_bytes());
        file[58] = 64;
        file[60] = 3;
        file[62] = 2;
        for (name, at, len) in [(0u32, 0, 0), (1, info_at, info.len()), (10, names_at, names.len())] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(len as u64).to_le_bytes());
            file.extend_from_slice(&header);
        }
        file
    }

    fn library(modules: &[(&str, &str)], built_in: &str) -> (tempfile::TempDir, ModuleLibrary<'static>) {
        let directory = tempfile::tempdir().unwrap();
        for (name, depends) in modules {
            fs::write(directory.path().join(format!("{name}.ko")), module(depends)).unwrap();
        }
        fs::write(directory.path().join("modules.builtin"), built_in).unwrap();
        let library = ModuleLibrary::from_directory(directory.path()).unwrap();
        (directory, library)
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let modules = [
            ("virtio", ""),
            ("virtio_ring", ""),
            ("virtio_mmio", "virtio,virtio_ring"),
            ("virtio_blk", "virtio-ring,virtio"),
            ("failover", ""),
            ("net_failover", "failover"),
            ("virtio_net", "virtio,net_failover"),
        ];
        let (_directory, library) = library(&modules, "kernel/fs/ext4/ext4.ko\n");
        let selected = library.select().unwrap();
        let names: Vec<&str> = selected.iter().map(|module| module.name.as_str()).collect();
        let expected = ["virtio", "virtio_ring", "virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net"];
        assert_eq!(names, expected);
        assert_eq!(selected[0].condition, Condition::Always);
        assert_eq!(selected[4].condition, Condition::VirtioDevice(VIRTIO_NET));
    }

    #[test]
    fn modules_can_be_named() {
        let (_directory, library) = library(&[("kvm", "irqbypass"), ("kvm-amd", "kvm"), ("irqbypass", "")], "");
        let names = |selected: Vec<Module>| selected.into_iter().map(|module| module.name).collect::<Vec<_>>();
        assert_eq!(names(library.select_named(&["kvm_amd", "kvm"]).unwrap()), ["irqbypass", "kvm", "kvm_amd"]);
        let error = library.select_named(&["kvm_intel"]).unwrap_err();
        assert!(matches!(&error, BuildError::ModuleMissing { module, .. } if module == "kvm_intel"), "{error}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let (_directory, library) = library(&[("virtio_mmio", "")], "kernel/fs/ext4/ext4.ko\n");
        let error = library.select().unwrap_err();
        assert!(matches!(&error, BuildError::ModuleMissing { module, .. } if module == "virtio_blk"), "{error}");
    }

    #[test]
    fn cycles_end() {
        let (_directory, library) = library(&[("virtio_mmio", "a"), ("a", "virtio_mmio")], "ext4.ko\nvirtio_blk.ko\n");
        assert!(matches!(library.select(), Err(BuildError::Module { .. })));
    }

    proptest! {
        #[test]
        fn damaged_modules_do_not_panic(at in any::<prop::sample::Index>(), value in any::<u8>(), len in 0usize..400) {
            let mut bytes = module("a,b");
            let at = at.index(bytes.len());
            bytes[at] = value;
            bytes.truncate(len);
            let _ = dependencies(&bytes);
        }
    }
}
