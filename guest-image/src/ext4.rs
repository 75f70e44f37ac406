//! Makes an ext4 file system of a [`Tree`], the same bytes for the same tree, without privileges.
//!
//! mke2fs makes the empty file system with everything fixed that it would otherwise choose (UUID, hash seed, time,
//! features); debugfs then creates the entries one by one in path order, with their owners. (`mke2fs -d` would take
//! them in the order of the host's directory.) Both come from e2fsprogs.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::content::{self, Content};
use crate::error::BuildError;
use crate::format::MAX_DISK_BYTES;
use crate::tree::{Kind, Tree};

/// The time of everything in the file system: 2024-01-01 00:00:00 UTC, in seconds since 1970.
pub const FILE_TIME_S: u64 = 1_704_067_200;
/// Identifies the file system, and seeds its directory hashes.
const UUID: &str = "6f727265-7279-4372-8f6f-740000000001";
const BLOCK_BYTES: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Free room on a disk whose size nobody asked for.
const DEFAULT_FREE_MIB: u64 = 256;
/// The features, all named, so that no configuration of the host decides. Checksums are left out: nothing corrupts
/// the disk, and the guest saves the work. The journal is there for programs that rely on it after a crash.
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,\
                        dir_nlink,extra_isize";

/// The tools, found once.
pub struct Tools {
    mke2fs: PathBuf,
    debugfs: PathBuf,
}

impl Tools {
    /// Finds the tools, also where they are not in an ordinary user's PATH.
    pub fn find() -> Result<Tools, BuildError> {
        Ok(Tools { mke2fs: find_tool("mke2fs")?, debugfs: find_tool("debugfs")? })
    }
}

fn find_tool(tool: &'static str) -> Result<PathBuf, BuildError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(tool))
        .find(|candidate| candidate.is_file())
        .ok_or(BuildError::ToolMissing { tool, package: "e2fsprogs" })
}

/// Size of the disk in MiB for this tree: what was asked for if it suffices, or the contents and some room.
pub fn disk_size_mib(tree: &Tree, asked_mib: Option<u64>) -> Result<u64, BuildError> {
    let content_bytes: u64 = tree
        .nodes()
        .map(|(_, node)| match &node.kind {
            // An entry takes its content, and its share of inode table and directories.
            Kind::File { len, .. } => len.next_multiple_of(BLOCK_BYTES) + 512,
            Kind::Directory => 2 * BLOCK_BYTES,
            _ => 1024,
        })
        .sum();
    // Metadata, the journal (at most a sixteenth, and 8 MiB in small file systems), and slack.
    let needed_mib = (content_bytes + content_bytes / 16).div_ceil(MIB) + 16;
    let disk_mib = asked_mib.unwrap_or((needed_mib + DEFAULT_FREE_MIB).next_multiple_of(16));
    if disk_mib > MAX_DISK_BYTES / MIB {
        let reason = format!("{disk_mib} MiB is more than the largest disk, {} MiB", MAX_DISK_BYTES / MIB);
        return Err(BuildError::Option { option: "--disk-size", reason });
    }
    if disk_mib < needed_mib {
        return Err(BuildError::DiskTooSmall { needed_mib, disk_mib });
    }
    Ok(disk_mib)
}

/// Makes the file system and returns its bytes.
pub fn make(tools: &Tools, tree: &Tree, disk_mib: u64) -> Result<Content, BuildError> {
    let directory = tempfile::Builder::new().prefix("orrery-root-").tempdir().map_err(BuildError::io("temporary"))?;
    let disk = directory.path().join("disk");
    let file = File::create(&disk).map_err(BuildError::io(&disk))?;
    file.set_len(disk_mib * MIB).map_err(BuildError::io(&disk))?;
    format(tools, &disk, disk_mib, tree.len() as u64)?;
    populate(tools, &disk, tree, directory.path())?;
    read_disk(&disk).map_err(BuildError::io(&disk))
}

/// Makes the empty file system.
fn format(tools: &Tools, disk: &Path, disk_mib: u64, entries: u64) -> Result<(), BuildError> {
    let inodes = (entries + entries / 4 + 1024).max(disk_mib * MIB / 16384);
    let blocks = disk_mib * MIB / BLOCK_BYTES;
    let journal_mib = (disk_mib / 32).clamp(4, 64);
    let output = fixed_time(Command::new(&tools.mke2fs))
        .env("MKE2FS_CONFIG", "/dev/null")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-o", "Linux", "-L", "orrery-root"])
        .args(["-O", FEATURES, "-U", UUID, "-N", &inodes.to_string(), "-J", &format!("size={journal_mib}")])
        .args(["-E", &format!("hash_seed={UUID},lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0")])
        .arg(disk)
        .arg(blocks.to_string())
        .output();
    finished("mke2fs", output).map(drop)
}

/// Creates all entries.
fn populate(tools: &Tools, disk: &Path, tree: &Tree, directory: &Path) -> Result<(), BuildError> {
    let contents = directory.join("contents");
    fs::create_dir(&contents).map_err(BuildError::io(&contents))?;
    let script_path = directory.join("script");
    let script = script(tree, &contents)?;
    fs::write(&script_path, script).map_err(BuildError::io(&script_path))?;
    let output = fixed_time(Command::new(&tools.debugfs))
        .current_dir(&contents)
        .env("DEBUGFS_PAGER", "cat")
        .args(["-w", "-f"])
        .arg(&script_path)
        .arg(disk)
        .stdin(Stdio::null())
        .output();
    let output = finished("debugfs", output)?;
    // debugfs goes on after errors and ends well: what it says on its error channel decides.
    let complaints = String::from_utf8_lossy(&output.stderr);
    match complaints.lines().find(|line| !line.is_empty() && !line.starts_with("debugfs 1.")) {
        None => Ok(()),
        Some(line) => Err(BuildError::Tool { tool: "debugfs", message: line.to_string() }),
    }
}

/// The commands for debugfs. Contents are put into `contents` under numbers, so that no name of the tree is ever
/// a name on the host.
fn script(tree: &Tree, contents: &Path) -> Result<Vec<u8>, BuildError> {
    let mut script = Script::default();
    script.line(&[b"set_current_time", format!("@{FILE_TIME_S}").as_bytes()]);
    let mut directory: &[u8] = b"/";
    let mut links: std::collections::BTreeMap<&[u8], u32> = Default::default();
    for (index, (path, node)) in tree.nodes().enumerate() {
        let absolute = [b"/", path].concat();
        let split = path.iter().rposition(|&byte| byte == b'/');
        let (parent, name) = split.map_or((&b""[..], path), |at| (&path[..at], &path[at + 1..]));
        if directory != parent {
            script.line(&[b"cd", &[b"/", parent].concat()]);
            directory = parent;
        }
        let mode_kind = match &node.kind {
            Kind::Directory => {
                script.line(&[b"mkdir", name]);
                0o040000
            }
            Kind::File { source, len } => {
                let number = index.to_string();
                match source {
                    crate::tree::Source::Host(host) => {
                        // debugfs would complain about a number: what cannot be read is better found here.
                        File::open(host).map_err(BuildError::io(host))?;
                        let host = std::path::absolute(host).map_err(BuildError::io(host))?;
                        std::os::unix::fs::symlink(&host, contents.join(&number)).map_err(BuildError::io(contents))?;
                    }
                    spooled => tree.copy_to(spooled, *len, &contents.join(&number))?,
                }
                script.line(&[b"write", number.as_bytes(), name]);
                0o100000
            }
            Kind::Symlink(target) => {
                script.line(&[b"symlink", name, target]);
                0o120000
            }
            Kind::HardLink(target) => {
                script.line(&[b"ln", &[b"/", &target[..]].concat(), name]);
                *links.entry(target).or_insert(1) += 1;
                continue;
            }
            Kind::CharacterDevice(major, minor) => {
                script.line(&[b"mknod", name, b"c", major.to_string().as_bytes(), minor.to_string().as_bytes()]);
                0o020000
            }
            Kind::BlockDevice(major, minor) => {
                script.line(&[b"mknod", name, b"b", major.to_string().as_bytes(), minor.to_string().as_bytes()]);
                0o060000
            }
            Kind::Fifo => {
                script.line(&[b"mknod", name, b"p"]);
                0o010000
            }
        };
        let permissions = if mode_kind == 0o120000 { 0o777 } else { node.permissions };
        script.field(&absolute, "mode", &format!("0{:o}", mode_kind | permissions));
        for (field, owner) in [("uid", node.uid), ("gid", node.gid)] {
            if owner != 0 || !matches!(node.kind, Kind::Directory) {
                script.field(&absolute, field, &owner.to_string());
            }
        }
    }
    for (target, count) in links {
        script.field(&[b"/", target].concat(), "links_count", &count.to_string());
    }
    Ok(script.bytes)
}

/// Lines of debugfs commands with every argument quoted.
#[derive(Default)]
struct Script {
    bytes: Vec<u8>,
}

impl Script {
    fn line(&mut self, arguments: &[&[u8]]) {
        for (index, argument) in arguments.iter().enumerate() {
            if index == 0 {
                self.bytes.extend_from_slice(argument);
                continue;
            }
            self.bytes.extend_from_slice(b" \"");
            for &byte in *argument {
                // Inside quotes a doubled quote stands for itself.
                self.bytes.extend_from_slice(if byte == b'"' { b"\"\"" } else { std::slice::from_ref(&byte) });
            }
            self.bytes.push(b'"');
        }
        self.bytes.push(b'\n');
    }

    fn field(&mut self, path: &[u8], field: &str, value: &str) {
        self.line(&[b"set_inode_field", path, field.as_bytes(), value.as_bytes()]);
    }
}

fn fixed_time(mut command: Command) -> Command {
    command.env("E2FSPROGS_FAKE_TIME", FILE_TIME_S.to_string()).env("LC_ALL", "C").env("TZ", "UTC");
    command
}

fn finished(tool: &'static str, output: io::Result<Output>) -> Result<Output, BuildError> {
    let output = output.map_err(|error| BuildError::Tool { tool, message: error.to_string() })?;
    if output.status.success() {
        return Ok(output);
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_string();
    Err(BuildError::Tool { tool, message: if message.is_empty() { output.status.to_string() } else { message } })
}

/// The disk's bytes, in memory that holes do not take.
fn read_disk(path: &Path) -> io::Result<Content> {
    let mut file = File::open(path)?;
    let mut memory = content::allocate(file.metadata()?.len() as usize)?;
    let mut block = vec![0; 1 << 20];
    for target in memory.chunks_mut(block.len()) {
        let block = &mut block[..target.len()];
        file.read_exact(block)?;
        if block.iter().any(|&byte| byte != 0) {
            target.copy_from_slice(block);
        }
    }
    memory.make_read_only().map(Content::from)
}
