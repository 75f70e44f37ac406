//! What this host is: processor, KVM, memory. For `orrery doctor` and for the manifest.

use std::arch::x86_64::__cpuid;
use std::fs;

use serde::Serialize;

/// Vendor string of the host's processor (CPUID leaf 0).
pub fn cpu_vendor() -> String {
    let leaf = __cpuid(0);
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
}

/// Name of the host's processor (CPUID leaves 0x80000002..=0x80000004).
pub fn cpu_name() -> String {
    if __cpuid(0x8000_0000).eax < 0x8000_0004 {
        return String::new();
    }
    let leaves = (0x8000_0002..=0x8000_0004).map(__cpuid);
    let bytes: Vec<u8> =
        leaves.flat_map(|l| [l.eax, l.ebx, l.ecx, l.edx]).flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').trim().to_owned()
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub name: &'static str,
    /// How it is.
    pub level: Level,
    /// What was found and what it means.
    pub detail: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, with something missing.
    Warning,
    /// Guests cannot run.
    Error,
}

fn finding(name: &'static str, level: Level, detail: impl Into<String>) -> Finding {
    Finding { name, level, detail: detail.into() }
}

/// Looks at everything that matters.
pub fn examine() -> Vec<Finding> {
    let mut findings = vec![processor()];
    findings.extend(features());
    findings.push(fsgsbase());
    findings.push(kvm());
    findings.extend(kvm_costs());
    findings.push(memory());
    findings.push(huge_pages());
    findings
}

fn processor() -> Finding {
    finding("processor", Level::Ok, format!("{} ({})", cpu_name(), cpu_vendor()))
}

fn features() -> Vec<Finding> {
    macro_rules! missing {
        ($($name:tt),*) => {{
            let mut missing: Vec<&str> = Vec::new();
            $(if !std::arch::is_x86_feature_detected!($name) { missing.push($name); })*
            missing
        }};
    }
    let needed = missing!(
        "avx",
        "avx2",
        "bmi1",
        "bmi2",
        "fma",
        "f16c",
        "movbe",
        "lzcnt",
        "popcnt",
        "sse4.2",
        "cmpxchg16b",
        "xsave"
    );
    let crypto = missing!("aes", "pclmulqdq", "sha");
    let mut findings = Vec::new();
    findings.push(if needed.is_empty() {
        finding("instructions", Level::Ok, "x86-64-v3: guests run at full speed in the translator")
    } else {
        let detail = format!("the processor lacks {}: the machine's CPU model cannot run here", needed.join(", "));
        finding("instructions", Level::Error, detail)
    });
    findings.push(if crypto.is_empty() {
        finding("crypto", Level::Ok, "AES, PCLMULQDQ and SHA are there")
    } else {
        let detail = format!("lacks {}: use --no-crypto-extensions on every host of a run", crypto.join(", "));
        finding("crypto", Level::Warning, detail)
    });
    findings
}

/// AT_HWCAP2 bit 1: user space may write FS and GS base.
fn fsgsbase() -> Finding {
    // SAFETY: getauxval only reads the process's auxiliary vector.
    let enabled = unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0;
    if enabled {
        finding("fsgsbase", Level::Ok, "WRGSBASE may be used in user mode")
    } else {
        finding("fsgsbase", Level::Error, "WRGSBASE is not allowed in user mode: Linux 5.9 or newer is needed")
    }
}

fn kvm() -> Finding {
    const MEANING: &str = "guests run in software, which needs no KVM";
    let kvm = match kvm_ioctls::Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let why = match error.errno() {
                libc::ENOENT => "no /dev/kvm".to_owned(),
                libc::EACCES | libc::EPERM => "no permission for /dev/kvm (group kvm?)".to_owned(),
                _ => format!("/dev/kvm: {error}"),
            };
            return finding("kvm", Level::Warning, format!("{why}; {MEANING}"));
        }
    };
    let module = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .find(|module| fs::exists(format!("/sys/module/{module}")).unwrap_or(false));
    let hardware = fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| {
        let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
    });
    let flavour = match (module, hardware) {
        (Some("kvm_intel"), _) => "VMX",
        (Some("kvm_amd"), _) => "SVM",
        (Some(_), _) => "PVM, without hardware support",
        (None, true) => "built in, with hardware support",
        (None, false) => "without hardware support (PVM or built in)",
    };
    let detail = format!("API {}, {flavour}", kvm.get_api_version());
    finding("kvm", Level::Ok, detail)
}

/// What going into a virtual machine and out of it costs, and for whom it pays.
fn kvm_costs() -> Option<Finding> {
    /// Instructions that the soft engine executes in a microsecond, by a rule of thumb.
    const SOFT_PER_US: u64 = 2_000;
    kvm_ioctls::Kvm::new().ok()?;
    Some(match orrery_cpu::engine::measure_kvm() {
        Ok(costs) => {
            let us = |ns: u64| ns as f64 / 1000.0;
            let visit_ns = costs.exit_ns + costs.registers_ns;
            let detail = format!(
                "an exit takes {:.1} us, a page fault {:.1} us, registers {:.1} us: --engine kvm pays off for programs that compute for much more than {} instructions between system calls; --engine auto finds out",
                us(costs.exit_ns),
                us(costs.fault_ns),
                us(costs.registers_ns),
                visit_ns * SOFT_PER_US / 1000,
            );
            finding("engine", Level::Ok, detail)
        }
        Err(error) => finding("engine", Level::Warning, format!("{error}: use --engine soft")),
    })
}

fn memory() -> Finding {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    match available {
        Some(kib) if kib < 2 << 20 => {
            finding("memory", Level::Warning, format!("{} MiB available: give small machines (--memory)", kib >> 10))
        }
        Some(kib) => finding("memory", Level::Ok, format!("{} MiB available", kib >> 10)),
        None => finding("memory", Level::Warning, "cannot tell how much is available"),
    }
}

fn huge_pages() -> Finding {
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let text = fs::read_to_string(path).unwrap_or_default();
    let chosen = text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    match chosen {
        Some("always" | "advise" | "within_size" | "force") => {
            finding("huge pages", Level::Ok, "guest memory may use them")
        }
        _ => finding("huge pages", Level::Warning, format!("not for guest memory; `echo advise > {path}` helps speed")),
    }
}
