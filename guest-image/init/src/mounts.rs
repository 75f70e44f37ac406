//! File systems: the kernel's own, the root disk, and leaving the initramfs behind.

use std::fs;
use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::failure::Failure;
use crate::sys;

/// Where the root disk is mounted before it becomes `/`.
const NEW_ROOT: &str = "/newroot";
/// How often the root disk is looked for, and how long one look is apart from the next.
const ROOT_DISK_LOOKS: u32 = 500;
const ROOT_DISK_INTERVAL: Duration = Duration::from_millis(10);

const NO_DEVICES: libc::c_ulong = libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV;

/// Mounts `/dev`, `/proc` and `/sys` in the initramfs.
pub fn kernel_file_systems() -> Result<(), Failure> {
    for (kind, target, flags) in
        [("devtmpfs", "/dev", libc::MS_NOSUID), ("proc", "/proc", NO_DEVICES), ("sysfs", "/sys", NO_DEVICES)]
    {
        let _ = fs::create_dir(target);
        sys::mount(kind, target, kind, flags, "").map_err(|error| mount_failure(kind, error))?;
    }
    Ok(())
}

/// Waits for the disk, mounts it and makes it `/`, with the kernel's file systems moved along.
pub fn switch_to_root(device: &str) -> Result<(), Failure> {
    wait_for(device)?;
    let _ = fs::create_dir(NEW_ROOT);
    sys::mount(device, NEW_ROOT, "ext4", 0, "").map_err(|error| mount_failure(device, error))?;
    // The modules are in the kernel now: give their memory back.
    let _ = fs::remove_dir_all("/lib");
    for directory in ["/dev", "/proc", "/sys"] {
        let target = format!("{NEW_ROOT}{directory}");
        let _ = fs::create_dir(&target);
        sys::mount(directory, &target, "", libc::MS_MOVE, "").map_err(|error| mount_failure(&target, error))?;
    }
    let step = |step| move |error| Failure::SwitchRoot { step, error };
    std::env::set_current_dir(NEW_ROOT).map_err(step("chdir"))?;
    let _ = fs::remove_file("/init");
    sys::mount(".", "/", "", libc::MS_MOVE, "").map_err(step("mount"))?;
    std::os::unix::fs::chroot(".").map_err(step("chroot"))?;
    std::env::set_current_dir("/").map_err(step("chdir"))
}

/// Mounts what programs expect beyond the kernel's own file systems. Each is a convenience: a root without the
/// directory, or a kernel without the file system, goes without.
pub fn runtime_file_systems() {
    let _ = fs::create_dir("/dev/pts");
    let _ = fs::create_dir("/dev/shm");
    let _ = sys::mount("devpts", "/dev/pts", "devpts", libc::MS_NOSUID | libc::MS_NOEXEC, "mode=620,ptmxmode=666");
    let _ = sys::mount("tmpfs", "/dev/shm", "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, "mode=1777");
    let _ = sys::mount("tmpfs", "/run", "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, "mode=755");
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        let _ = std::os::unix::fs::symlink(target, Path::new("/dev").join(link));
    }
}

/// Writes everything back and makes the root read-only, so that the disk is clean when the power goes.
pub fn quiesce() {
    sys::sync();
    let _ = sys::mount("", "/", "", libc::MS_REMOUNT | libc::MS_RDONLY, "");
    sys::sync();
}

/// Waits until the device node exists. Probing is done by the time the modules have loaded on most machines; the
/// sleeps are for those that find their devices later.
fn wait_for(device: &str) -> Result<(), Failure> {
    for _ in 0..ROOT_DISK_LOOKS {
        if Path::new(device).exists() {
            return Ok(());
        }
        thread::sleep(ROOT_DISK_INTERVAL);
    }
    Err(Failure::RootDisk { device: device.to_string() })
}

fn mount_failure(what: &str, error: io::Error) -> Failure {
    Failure::Mount { what: what.to_string(), error }
}
