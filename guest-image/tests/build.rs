//! The builder: the same image from the same things, roots with everything in them, and mistakes that are named.
//! Needs mke2fs and debugfs (e2fsprogs), as the builder does.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use orrery_guest_image::error::KernelError;
use orrery_guest_image::tree::Tree;
use orrery_guest_image::{BuildError, BuildOptions, Image, Progress, build};
use proptest::prelude::*;

/// A bzImage as far as headers go.
fn write_kernel(path: &Path) {
    let mut kernel = vec![0; 1024 + 4096];
    kernel[0x1f1] = 1;
    kernel[0x1f4..0x1f8].copy_from_slice(&256u32.to_le_bytes());
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    kernel[0x236] = 1;
    fs::write(path, kernel).unwrap();
}

fn executable(path: &Path, content: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Names for files, awkward ones among them.
const NAMES: [&str; 9] =
    ["plain", "with space", "quote\"d", "back\\slash", "<12>", "-dash", "ünïcode", "#hash", "z'apostrophe"];

/// A root directory whose entries are created in the given order.
fn write_root(root: &Path, names: impl Iterator<Item = &'static str>) {
    executable(&root.join("usr/bin/tool"), b"#!/bin/true\n");
    symlink("usr/bin", root.join("bin")).unwrap();
    fs::create_dir_all(root.join("data/deep/er")).unwrap();
    for name in names {
        fs::write(root.join("data").join(name), name.repeat(3000)).unwrap();
    }
    File::create(root.join("data/sparse")).unwrap().set_len(3 << 20).unwrap();
    fs::write(root.join("data/original"), b"twice").unwrap();
    fs::hard_link(root.join("data/original"), root.join("data/deep/another")).unwrap();
    fs::set_permissions(root.join("data/deep"), fs::Permissions::from_mode(0o1777)).unwrap();
}

struct Fixture {
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        write_kernel(&directory.path().join("kernel"));
        Fixture { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn options(&self, root: &str) -> BuildOptions {
        BuildOptions {
            kernel: self.path("kernel"),
            root: self.path(root),
            entry: vec!["tool".into()],
            disk_size_mib: Some(64),
            ..BuildOptions::default()
        }
    }

    fn build(&self, root: &str) -> Image {
        build(&self.options(root), |_| {}).unwrap_or_else(|error| panic!("{error}"))
    }

    fn failure(&self, change: impl FnOnce(&mut BuildOptions)) -> BuildError {
        let mut options = self.options("root");
        change(&mut options);
        build(&options, |_| {}).expect_err("the build succeeds")
    }
}

/// Runs debugfs on the image's disk.
fn debugfs(image: &Image, directory: &Path, request: &str) -> String {
    image.extract(directory).unwrap();
    let output = Command::new("/usr/sbin/debugfs").args(["-R", request]).arg(directory.join("disk0.img")).output();
    String::from_utf8_lossy(&output.unwrap().stdout).into_owned()
}

#[test]
fn the_same_root_gives_the_same_image() {
    let fixture = Fixture::new();
    write_root(&fixture.path("root"), NAMES.into_iter());
    write_root(&fixture.path("elsewhere"), NAMES.into_iter().rev());
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let first = fixture.build("root");
    let second = fixture.build("elsewhere");
    assert!(first.disks()[0][..] == second.disks()[0][..], "the disks differ");
    assert_eq!(first.hash(), second.hash());
    let (a, b) = (fixture.path("a.img"), fixture.path("b.img"));
    first.write(&a).unwrap();
    second.write(&b).unwrap();
    assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
}

#[test]
fn the_disk_is_sound_and_complete() {
    let fixture = Fixture::new();
    write_root(&fixture.path("root"), NAMES.into_iter());
    let image = fixture.build("root");
    let out = fixture.path("out");
    image.extract(&out).unwrap();
    let check = Command::new("/usr/sbin/e2fsck").args(["-f", "-n"]).arg(out.join("disk0.img")).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    for name in NAMES {
        let quoted = format!("cat \"/data/{}\"", name.replace('"', "\"\""));
        assert_eq!(debugfs(&image, &out, &quoted), name.repeat(3000), "{name}");
    }
    assert_eq!(debugfs(&image, &out, "cat /data/deep/another"), "twice");
    let stat = debugfs(&image, &out, "stat /data/original");
    assert!(stat.contains("Links: 2") && stat.contains("User:     0"), "{stat}");
    assert!(debugfs(&image, &out, "stat /data/deep").contains("Mode:  01777"));
    assert!(debugfs(&image, &out, "stat /bin").contains("\"usr/bin\""));
    assert!(debugfs(&image, &out, "stat /tmp").contains("Mode:  01777"));
    let stat = debugfs(&image, &out, "stat /data/plain");
    assert_eq!(stat.matches("Jan  1 00:00:00 2024").count(), 4, "{stat}");
}

#[test]
fn an_archive_keeps_owners_and_devices() {
    let fixture = Fixture::new();
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |path: &str, kind: tar::EntryType, mode: u32, owner: u64, content: &[u8], link: Option<&str>| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_size(content.len() as u64);
        header.set_mtime(123_456_789);
        if kind.is_character_special() {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        if let Some(link) = link {
            header.set_link_name(link).unwrap();
        }
        builder.append_data(&mut header, path, content).unwrap();
    };
    // A hard link that precedes its target in path order, and a directory that is never named.
    add("z/tool", tar::EntryType::Regular, 0o4755, 70_000, b"#!", None);
    add("bin/tool", tar::EntryType::Link, 0o4755, 70_000, b"", Some("z/tool"));
    add("dev/null", tar::EntryType::Char, 0o666, 0, b"", None);
    add("srv/fifo", tar::EntryType::Fifo, 0o600, 33, b"", None);
    add("lib", tar::EntryType::Symlink, 0o777, 5, b"", Some("usr/lib"));
    let plain = builder.into_inner().unwrap();
    fs::write(fixture.path("root.tar"), &plain).unwrap();
    fs::write(fixture.path("root.tar.zst"), zstd::bulk::compress(&plain, 1).unwrap()).unwrap();

    let image = fixture.build("root.tar");
    assert_eq!(fixture.build("root.tar.zst").hash(), image.hash());
    let out = fixture.path("out");
    let stat = debugfs(&image, &out, "stat /bin/tool");
    assert!(stat.contains("Mode:  04755") && stat.contains("70000") && stat.contains("Links: 2"), "{stat}");
    assert!(debugfs(&image, &out, "stat /dev/null").contains("Type: character special"));
    assert!(debugfs(&image, &out, "stat /srv/fifo").contains("Type: FIFO"));
    let check = Command::new("/usr/sbin/e2fsck").args(["-f", "-n"]).arg(out.join("disk0.img")).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
}

#[test]
fn hostile_archives_are_refused() {
    let fixture = Fixture::new();
    let entry = |path: &[u8], kind: tar::EntryType, size: u64| {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path);
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let regular = tar::EntryType::Regular;
    let cases: [(&str, Vec<u8>); 6] = [
        ("leads out", entry(b"../../etc/passwd", regular, 0)),
        ("truncated", entry(b"bin/tool", regular, 1 << 40)),
        ("line ends", entry(b"bin/to\nol", regular, 0)),
        ("not a directory", [entry(b"bin", regular, 0), entry(b"bin/tool", regular, 0)].concat()),
        ("has no target", entry(b"bin/tool", tar::EntryType::Symlink, 0)),
        ("not a usable tar", b"this is text, and no archive at all".repeat(100)),
    ];
    for (part, mut bytes) in cases {
        bytes.extend([0; 1024]);
        fs::write(fixture.path("root.tar"), bytes).unwrap();
        let error = fixture.failure(|options| options.root = fixture.path("root.tar")).to_string();
        assert!(error.contains(part), "{error} should mention {part}");
    }
}

#[test]
fn mistakes_are_named() {
    let fixture = Fixture::new();
    write_root(&fixture.path("root"), ["plain"].into_iter());
    fs::create_dir(fixture.path("empty")).unwrap();
    fs::write(fixture.path("nothing"), b"").unwrap();
    let contains = |error: BuildError, parts: &[&str]| {
        let text = error.to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{text} should mention {parts:?}");
    };
    contains(fixture.failure(|o| o.kernel = "/nonexistent".into()), &["/nonexistent", "No such file"]);
    contains(fixture.failure(|o| o.kernel = fixture.path("nothing")), &["nothing", "empty"]);
    contains(fixture.failure(|o| o.root = "/nonexistent".into()), &["/nonexistent", "No such file"]);
    contains(fixture.failure(|o| o.root = fixture.path("empty")), &["empty"]);
    contains(fixture.failure(|o| o.root = fixture.path("nothing")), &["empty"]);
    contains(fixture.failure(|o| o.entry = vec!["/bin/absent".into()]), &["--entry", "/bin/absent", "not in the root"]);
    contains(fixture.failure(|o| o.entry = vec!["/data/plain".into()]), &["--entry", "not executable"]);
    contains(fixture.failure(|o| o.entry = vec!["/data".into()]), &["--entry", "is a directory"]);
    contains(fixture.failure(|o| o.disk_size_mib = Some(1)), &["--disk-size"]);
    contains(fixture.failure(|o| o.disk_size_mib = Some(u64::MAX)), &["--disk-size", "largest"]);
    contains(fixture.failure(|o| o.command_line = "x".repeat(3000)), &["--cmdline", "3000"]);
    contains(fixture.failure(|o| o.environment = vec![("A=B".into(), "x".into())]), &["--env"]);
    contains(fixture.failure(|o| o.host_name = Some("a b".into())), &["--hostname"]);
    contains(fixture.failure(|o| o.modules = Some(fixture.path("empty"))), &["virtio_mmio"]);
}

#[test]
fn kernels_that_cannot_boot_are_named() {
    let fixture = Fixture::new();
    write_root(&fixture.path("root"), ["plain"].into_iter());
    let whole = fs::read(fixture.path("kernel")).unwrap();
    let mut arm = vec![0; 4096];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    for (bytes, expected) in [
        (&whole[..3000], KernelError::Truncated { bytes: 3000, needed: 5120 }),
        (&arm, KernelError::Architecture { architecture: "arm64".into() }),
    ] {
        fs::write(fixture.path("bad"), bytes).unwrap();
        match fixture.failure(|options| options.kernel = fixture.path("bad")) {
            BuildError::Kernel { error, .. } => assert_eq!(error, expected),
            other => panic!("{other}"),
        }
    }
    let mut package = File::create(fixture.path("bad.deb")).unwrap();
    package.write_all(b"!<arch>\ndebian-binary   ").unwrap();
    let error = fixture.failure(|options| options.kernel = fixture.path("bad.deb"));
    assert!(matches!(&error, BuildError::Package { .. }), "{error}");
}

#[test]
fn the_size_that_the_error_asks_for_suffices() {
    let fixture = Fixture::new();
    executable(&fixture.path("root/bin/tool"), b"#!");
    for index in 0..600u32 {
        let content: Vec<u8> = (0..40_000u32).map(|at| (at.wrapping_mul(index + 1) >> 5) as u8).collect();
        fs::write(fixture.path(&format!("root/a file with quite a long name, number {index}")), content).unwrap();
    }
    let error = fixture.failure(|options| options.disk_size_mib = Some(2));
    let BuildError::DiskTooSmall { needed_mib, disk_mib: 2 } = error else { panic!("{error}") };
    let options = BuildOptions { disk_size_mib: Some(needed_mib), ..fixture.options("root") };
    let image = build(&options, |_| {}).unwrap();
    assert_eq!(image.disks()[0].len() as u64, needed_mib << 20);
}

#[test]
fn progress_tells_every_step() {
    let fixture = Fixture::new();
    write_root(&fixture.path("root"), ["plain"].into_iter());
    let mut seen = Vec::new();
    build(&fixture.options("root"), |step| seen.push(step)).unwrap();
    assert_eq!(seen, Progress::STEPS);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Archives come from anywhere: damaged ones are read or refused, without panic and without end.
    #[test]
    fn damaged_archives_do_not_panic(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        len in any::<prop::sample::Index>(),
    ) {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, link) in [("bin/tool", None), ("lib", Some("usr/lib")), ("a/long/path", Some("../bin/tool"))] {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o755);
            header.set_size(if link.is_some() { 0 } else { 700 });
            if let Some(link) = link {
                header.set_entry_type(if path == "lib" { tar::EntryType::Symlink } else { tar::EntryType::Link });
                header.set_link_name(link).unwrap();
            }
            builder.append_data(&mut header, path, &[7; 700][..if link.is_some() { 0 } else { 700 }]).unwrap();
        }
        let mut bytes = builder.into_inner().unwrap();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
            // Most damage is found by the header's checksum: half of the time, make it right again.
            if value % 2 == 0 {
                let start = at / 512 * 512;
                let mut header = tar::Header::from_byte_slice(&bytes[start..start + 512]).clone();
                header.set_cksum();
                bytes[start..start + 512].copy_from_slice(header.as_bytes());
            }
        }
        bytes.truncate(len.index(bytes.len() + 1));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        if let Ok(tree) = Tree::read(file.path()) {
            for (path, _) in tree.nodes() {
                let _ = tree.resolve(path);
                prop_assert!(!path.starts_with(b"/") && !path.split(|&byte| byte == b'/').any(|part| part == b".."));
            }
        }
    }
}
