//! The root file system as a sorted list of entries, read from a directory or a tar archive.
//!
//! The tree knows no order but that of its paths and no time at all, so that what is made from it is the same
//! wherever it came from. Contents stay on the host's disk until they are used.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::deb::decompressor;
use crate::error::BuildError;

/// Most entries of a tree.
const MAX_ENTRIES: usize = 4_000_000;
/// Most bytes of an unpacked tar archive.
const MAX_TAR_BYTES: u64 = 64 << 30;
/// Most symbolic links followed in one path, as in Linux.
const MAX_LINKS: usize = 40;

/// Where a file's content is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// In a file of the host.
    Host(PathBuf),
    /// In the unpacked archive, which the tree keeps.
    Spool {
        /// First byte.
        offset: u64,
    },
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Its content.
        source: Source,
        /// Bytes of content.
        len: u64,
    },
    /// A symbolic link with its target.
    Symlink(Vec<u8>),
    /// Another name of a file: its path.
    HardLink(Vec<u8>),
    /// A character device with major and minor number.
    CharacterDevice(u32, u32),
    /// A block device with major and minor number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// An entry of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Permission bits, at most 0o7777.
    pub permissions: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Node {
    fn directory(permissions: u32) -> Node {
        Node { kind: Kind::Directory, permissions, uid: 0, gid: 0 }
    }
}

/// A root file system to be. Paths have no leading or trailing slash and no `.` or `..`; parents precede children.
#[derive(Debug, Default)]
pub struct Tree {
    nodes: BTreeMap<Vec<u8>, Node>,
    spool: Option<File>,
    origin: PathBuf,
}

impl Tree {
    /// Reads a directory or a tar archive (plain, gzip, xz or zstd).
    ///
    /// From an archive, owners are taken as they are. From a directory, everything is owned by root: the owners
    /// there are the builder's, not the guest's.
    pub fn read(root: &Path) -> Result<Tree, BuildError> {
        let metadata = fs::metadata(root).map_err(BuildError::io(root))?;
        let mut tree = Tree { origin: root.to_path_buf(), ..Tree::default() };
        if metadata.is_dir() {
            tree.read_directory(root)?;
        } else {
            tree.read_archive(root)?;
        }
        if tree.nodes.is_empty() {
            return Err(tree.error("it is empty"));
        }
        for (path, permissions) in
            [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("tmp", 0o1777), ("root", 0o700)]
        {
            tree.nodes.entry(path.into()).or_insert(Node::directory(permissions));
        }
        Ok(tree)
    }

    /// All entries, sorted by path.
    pub fn nodes(&self) -> impl Iterator<Item = (&[u8], &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_slice(), node))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// True without entries.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Copies a file's content to a file of the host.
    pub(crate) fn copy_to(&self, source: &Source, len: u64, target: &Path) -> Result<(), BuildError> {
        match (source, &self.spool) {
            (Source::Host(path), _) => fs::copy(path, target).map(drop).map_err(BuildError::io(path)),
            (Source::Spool { offset }, Some(spool)) => {
                let mut output = File::create(target).map_err(BuildError::io(target))?;
                let mut part = SpoolPart { spool, offset: *offset, end: offset + len };
                io::copy(&mut part, &mut output).map(drop).map_err(BuildError::io(target))
            }
            (Source::Spool { .. }, None) => Err(self.error("its contents are gone")),
        }
    }

    /// Follows a path inside the tree, symbolic links included, to what it names.
    pub fn resolve(&self, path: &[u8]) -> Option<&Node> {
        let mut pending: Vec<Vec<u8>> = components(path);
        pending.reverse();
        let mut at: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(component) = pending.pop() {
            if component == b".." {
                at.pop();
                continue;
            }
            at.push(component);
            let node = self.nodes.get(&at.join(&b'/'))?;
            if let Kind::Symlink(target) = &node.kind {
                links += 1;
                if links > MAX_LINKS {
                    return None;
                }
                at.pop();
                if target.starts_with(b"/") {
                    at.clear();
                }
                pending.extend(components(target).into_iter().rev());
            }
        }
        self.nodes.get(&at.join(&b'/'))
    }

    fn read_directory(&mut self, root: &Path) -> Result<(), BuildError> {
        let mut hard_links: BTreeMap<(u64, u64), Vec<u8>> = BTreeMap::new();
        let mut pending = vec![(root.to_path_buf(), Vec::new())];
        let mut found = Vec::new();
        while let Some((directory, prefix)) = pending.pop() {
            for entry in fs::read_dir(&directory).map_err(BuildError::io(&directory))? {
                let entry = entry.map_err(BuildError::io(&directory))?;
                let name = entry.file_name().into_vec();
                let path = if prefix.is_empty() { name } else { [&prefix[..], b"/", &name].concat() };
                let metadata = fs::symlink_metadata(entry.path()).map_err(BuildError::io(entry.path()))?;
                if metadata.is_dir() {
                    pending.push((entry.path(), path.clone()));
                }
                found.push((path, entry.path(), metadata));
            }
        }
        // Sorted before hard links are told apart: which name is the first must not depend on the host's order.
        found.sort_by(|a, b| a.0.cmp(&b.0));
        for (path, host, metadata) in found {
            let mut kind = self.kind_on_host(&host, &metadata)?;
            if matches!(kind, Kind::File { .. }) && metadata.nlink() > 1 {
                let first = hard_links.entry((metadata.dev(), metadata.ino())).or_insert_with(|| path.clone());
                if *first != path {
                    kind = Kind::HardLink(first.clone());
                }
            }
            self.insert(path, Node { kind, permissions: metadata.mode() & 0o7777, uid: 0, gid: 0 })?;
        }
        Ok(())
    }

    fn kind_on_host(&self, host: &Path, metadata: &fs::Metadata) -> Result<Kind, BuildError> {
        let kind = metadata.file_type();
        Ok(if kind.is_dir() {
            Kind::Directory
        } else if kind.is_file() {
            Kind::File { source: Source::Host(host.to_path_buf()), len: metadata.len() }
        } else if kind.is_symlink() {
            Kind::Symlink(fs::read_link(host).map_err(BuildError::io(host))?.into_os_string().into_vec())
        } else if kind.is_fifo() {
            Kind::Fifo
        } else {
            let reason = "sockets and device nodes are not copied from directories; remove it, or use a tar archive";
            return Err(BuildError::Root { path: host.to_path_buf(), reason: reason.to_string() });
        })
    }

    fn read_archive(&mut self, path: &Path) -> Result<(), BuildError> {
        let spool = self.unpack(path)?;
        let end = spool.metadata().map_err(BuildError::io(path))?.len();
        if end == 0 {
            return Err(self.error("it is empty"));
        }
        let damaged = |error: io::Error| BuildError::Root {
            path: path.to_path_buf(),
            reason: format!("not a usable tar archive: {error}"),
        };
        let mut archive = tar::Archive::new(SpoolPart { spool: &spool, offset: 0, end });
        for entry in archive.entries().map_err(damaged)? {
            let entry = entry.map_err(damaged)?;
            if let Some((path, node)) = self.archive_node(&entry, end).map_err(damaged)? {
                self.insert(path, node)?;
            }
        }
        self.spool = Some(spool);
        self.check_hard_links()
    }

    /// Decompresses the archive into an unnamed temporary file.
    fn unpack(&self, path: &Path) -> Result<File, BuildError> {
        let file = File::open(path).map_err(BuildError::io(path))?;
        let mut magic = [0; 6];
        let magic_len = file.read_at(&mut magic, 0).map_err(BuildError::io(path))?;
        let extension = match &magic[..magic_len] {
            [0x1f, 0x8b, ..] => "gz",
            [0xfd, b'7', b'z', b'X', b'Z', 0] => "xz",
            [0x28, 0xb5, 0x2f, 0xfd, ..] => "zst",
            _ => "tar",
        };
        let mut spool = tempfile::tempfile().map_err(BuildError::io(std::env::temp_dir()))?;
        let copied = decompressor(file, extension)
            .and_then(|stream| io::copy(&mut stream.take(MAX_TAR_BYTES), &mut spool))
            .map_err(|error| self.error(&format!("it does not unpack: {error}")))?;
        if copied == MAX_TAR_BYTES {
            return Err(self.error(&format!("it unpacks to more than {MAX_TAR_BYTES} bytes")));
        }
        Ok(spool)
    }

    /// What an entry of the archive becomes; `None` for what is no file (headers of extensions, the root itself).
    fn archive_node<R: Read>(&self, entry: &tar::Entry<R>, end: u64) -> io::Result<Option<(Vec<u8>, Node)>> {
        use tar::EntryType;
        let invalid = |reason: &str| {
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            io::Error::new(io::ErrorKind::InvalidData, format!("{name}: {reason}"))
        };
        let parts = components(&entry.path_bytes());
        if parts.iter().any(|part| part == b"..") {
            return Err(invalid("leads out of the archive"));
        }
        let path = parts.join(&b'/');
        if path.is_empty() {
            return Ok(None);
        }
        let link = || entry.link_name_bytes().map(|name| name.into_owned()).ok_or_else(|| invalid("has no target"));
        let header = entry.header();
        let device = || -> io::Result<(u32, u32)> {
            let missing = || invalid("has no device number");
            Ok((header.device_major()?.ok_or_else(missing)?, header.device_minor()?.ok_or_else(missing)?))
        };
        let kind = match header.entry_type() {
            EntryType::Directory => Kind::Directory,
            EntryType::Regular | EntryType::Continuous => {
                let (offset, len) = (entry.raw_file_position(), entry.size());
                if offset.checked_add(len).is_none_or(|file_end| file_end > end) {
                    return Err(invalid("reaches beyond the archive: it is truncated"));
                }
                Kind::File { source: Source::Spool { offset }, len }
            }
            EntryType::Symlink => Kind::Symlink(link()?),
            EntryType::Link => Kind::HardLink(components(&link()?).join(&b'/')),
            EntryType::Char => device().map(|(major, minor)| Kind::CharacterDevice(major, minor))?,
            EntryType::Block => device().map(|(major, minor)| Kind::BlockDevice(major, minor))?,
            EntryType::Fifo => Kind::Fifo,
            EntryType::XGlobalHeader => return Ok(None),
            _ => return Err(invalid("is of a kind that cannot be in a root file system")),
        };
        let id = |value: io::Result<u64>| value.map(|id| u32::try_from(id).unwrap_or(u32::MAX));
        let permissions = header.mode()? & 0o7777;
        Ok(Some((path, Node { kind, permissions, uid: id(header.uid())?, gid: id(header.gid())? })))
    }

    /// Adds an entry, replacing one of the same path, and its parents where they are missing.
    fn insert(&mut self, path: Vec<u8>, node: Node) -> Result<(), BuildError> {
        let bad = |reason: &str| BuildError::Root {
            path: self.origin.join(std::ffi::OsStr::from_bytes(&path)),
            reason: reason.to_string(),
        };
        if path.iter().any(|&byte| byte == b'\n' || byte == b'\r' || byte == 0) {
            return Err(bad("line ends are not supported in file names"));
        }
        if path.split(|&byte| byte == b'/').any(|part| part.len() > 255) {
            return Err(bad("a file name is longer than 255 bytes"));
        }
        if let Kind::Symlink(target) = &node.kind
            && (target.is_empty() || target.len() > 4095 || target.iter().any(|&byte| b"\n\r\0".contains(&byte)))
        {
            return Err(bad("the symbolic link's target is empty, too long or has line ends"));
        }
        if self.nodes.len() >= MAX_ENTRIES {
            return Err(bad("there are too many files"));
        }
        for at in path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at) {
            let parent = self.nodes.entry(path[..at].to_vec()).or_insert(Node::directory(0o755));
            if parent.kind != Kind::Directory {
                return Err(bad("its parent is not a directory"));
            }
        }
        let was_directory = self.nodes.get(&path).is_some_and(|old| old.kind == Kind::Directory);
        if was_directory && node.kind != Kind::Directory {
            return Err(bad("a directory of the same name is there as well"));
        }
        self.nodes.insert(path, node);
        Ok(())
    }

    /// Makes sure that every hard link names a file that precedes it in path order, by exchanging the names of
    /// those that do not.
    fn check_hard_links(&mut self) -> Result<(), BuildError> {
        let links: Vec<(Vec<u8>, Vec<u8>)> = self
            .nodes
            .iter()
            .filter_map(|(path, node)| match &node.kind {
                Kind::HardLink(target) => Some((path.clone(), target.clone())),
                _ => None,
            })
            .collect();
        for (path, target) in links {
            // The target may itself have become a link to an earlier name.
            let target = match self.nodes.get(&target).map(|node| &node.kind) {
                Some(Kind::HardLink(earlier)) => earlier.clone(),
                _ => target,
            };
            let Some(node) = self.nodes.get(&target).filter(|node| matches!(node.kind, Kind::File { .. })) else {
                let name = String::from_utf8_lossy(&path).into_owned();
                return Err(self.error(&format!("{name} is a hard link to a file that is not there")));
            };
            let node = node.clone();
            let (first, second) = if path < target { (path, target) } else { (target, path) };
            let link = Node { kind: Kind::HardLink(first.clone()), ..node.clone() };
            self.nodes.insert(first, node);
            self.nodes.insert(second, link);
        }
        Ok(())
    }

    fn error(&self, reason: &str) -> BuildError {
        BuildError::Root { path: self.origin.clone(), reason: reason.to_string() }
    }
}

/// A stretch of the unpacked archive as a stream.
struct SpoolPart<'a> {
    spool: &'a File,
    offset: u64,
    end: u64,
}

impl Read for SpoolPart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = (buffer.len() as u64).min(self.end.saturating_sub(self.offset)) as usize;
        let read = self.spool.read_at(&mut buffer[..len], self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

/// The parts of a path but empty ones and `.`.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".").map(<[u8]>::to_vec).collect()
}
