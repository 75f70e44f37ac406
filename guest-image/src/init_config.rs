//! The configuration that the builder leaves for init in the initramfs. The reader's side, with the meaning of
//! every key, is `init/src/config.rs`.

/// Where init looks for it.
pub const PATH: &str = "etc/orrery/init.conf";

/// When init loads a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// In every machine.
    Always,
    /// Where a PCI function of this vendor is present.
    PciVendor(u32),
    /// Where a virtio device of this type is present.
    VirtioDevice(u32),
}

/// What init is told.
#[derive(Clone, Debug, Default)]
pub struct InitConfig {
    /// Modules with their paths in the initramfs, in load order.
    pub modules: Vec<(Condition, String)>,
    /// Block device of the root file system.
    pub root: Option<String>,
    /// The guest's host name.
    pub host_name: String,
    /// Working directory of the entry command.
    pub working_directory: String,
    /// Environment of the entry command.
    pub environment: Vec<(String, String)>,
    /// The entry command and its arguments.
    pub entry: Vec<String>,
}

impl InitConfig {
    /// The file's bytes: records `key=value`, each ended by NUL. Values hold no NUL; the builder has refused them.
    pub fn encode(&self) -> Vec<u8> {
        let mut records = vec!["version=1".to_string()];
        for (condition, path) in &self.modules {
            let condition = match condition {
                Condition::Always => "always".to_string(),
                Condition::PciVendor(vendor) => format!("pci:{vendor:x}"),
                Condition::VirtioDevice(id) => format!("virtio:{id:x}"),
            };
            records.push(format!("module={condition} {path}"));
        }
        records.extend(self.root.iter().map(|device| format!("root={device}")));
        records.push(format!("hostname={}", self.host_name));
        records.push(format!("workdir={}", self.working_directory));
        records.extend(self.environment.iter().map(|(name, value)| format!("env={name}={value}")));
        records.extend(self.entry.iter().map(|argument| format!("arg={argument}")));
        records.into_iter().flat_map(|record| [record.into_bytes(), vec![0]].concat()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_end_with_nul() {
        let config = InitConfig {
            modules: vec![(Condition::VirtioDevice(2), "/lib/b.ko".into())],
            root: Some("/dev/vda".into()),
            host_name: "h".into(),
            working_directory: "/".into(),
            environment: vec![("A".into(), "1".into())],
            entry: vec!["/bin/true".into()],
        };
        assert_eq!(
            config.encode(),
            b"version=1\0module=virtio:2 /lib/b.ko\0root=/dev/vda\0hostname=h\0workdir=/\0env=A=1\0arg=/bin/true\0"
        );
    }
}
