//! The mappings of a process: which part of which file is where.

use std::collections::BTreeSet;

use serde::Serialize;

pub use super::files::FileVersion;
use super::layout::{Layout, VmaPlaces};
use super::memory::{AddressSpace, ReadError};

/// Most mappings of one process that are believed (the default of vm.max_map_count).
const MAPPINGS_MAX: usize = 65_530;
/// Most levels of a maple tree (MAPLE_HEIGHT_MAX).
const MAPLE_DEPTH_MAX: usize = 31;
/// Most directories of a path.
const PATH_PARTS_MAX: usize = 256;
/// Longest name of a file, in bytes (NAME_MAX).
const NAME_MAX: usize = 255;

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// It may be read.
    pub readable: bool,
    /// It may be written.
    pub writable: bool,
    /// It may be executed.
    pub executable: bool,
    /// What is mapped; None for anonymous memory.
    pub file: Option<MappedFile>,
}

/// What is mapped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MappedFile {
    /// Path, as seen from the root of the file system that `/` is.
    pub path: String,
    /// Which version of the file.
    #[serde(skip)]
    pub version: FileVersion,
    /// Kind of file system, such as `ext4`; `vdso` for the page of code that the kernel gives to every process.
    pub file_system: String,
}

/// Reads the mappings of the process with this `mm_struct`, in ascending order.
pub(super) fn mappings(space: &AddressSpace, layout: &Layout, mm: u64) -> Vec<Mapping> {
    let mut areas = Vec::new();
    match layout.mm_vmas {
        VmaPlaces::List { first, next } => {
            let mut seen = BTreeSet::new();
            let mut at = space.u64(mm.wrapping_add(first)).unwrap_or(0);
            while at != 0 && seen.len() < MAPPINGS_MAX && seen.insert(at) {
                areas.push(at);
                at = space.u64(at.wrapping_add(next)).unwrap_or(0);
            }
        }
        VmaPlaces::Maple { root, .. } => {
            let root = space.u64(mm.wrapping_add(root)).unwrap_or(0);
            let mut tree = MapleTree { space, places: &layout.mm_vmas, areas: &mut areas, seen: BTreeSet::new() };
            // The root has bits 1:0 = 10 if it is a node; an empty tree has none, nor has one with index 0 alone.
            if root & 3 == 2 {
                tree.walk(root, u64::MAX, MAPLE_DEPTH_MAX);
            }
        }
    }
    let vdso = layout.mm_vdso.and_then(|offset| space.u64(mm.wrapping_add(offset)).ok());
    areas.into_iter().filter_map(|area| mapping(space, layout, area, vdso).ok()).collect()
}

/// The kernel's maple tree (lib/maple_tree.c): nodes of 256 bytes, their type in bits 3 to 6 of the pointer.
struct MapleTree<'a> {
    space: &'a AddressSpace<'a>,
    places: &'a VmaPlaces,
    areas: &'a mut Vec<u64>,
    seen: BTreeSet<u64>,
}

impl MapleTree<'_> {
    const LEAF_64: u64 = 1;
    const RANGE_64: u64 = 2;
    const ALLOCATION_64: u64 = 3;

    /// Adds the areas below an entry of the tree, whose last index is `last`.
    fn walk(&mut self, entry: u64, last: u64, depth: usize) {
        let VmaPlaces::Maple { range, range_slots, allocation, allocation_slots, .. } = *self.places else { return };
        let full = self.seen.len() > MAPPINGS_MAX || self.areas.len() > MAPPINGS_MAX;
        if entry <= 4096 || full || depth == 0 {
            return;
        }
        let kind = entry >> 3 & 0xF;
        let node = entry & !0xFF;
        let ((pivots, slots), count) = match kind {
            Self::LEAF_64 | Self::RANGE_64 => (range, range_slots),
            Self::ALLOCATION_64 => (allocation, allocation_slots),
            _ => return,
        };
        if !self.seen.insert(node) {
            return;
        }
        for slot in 0..count {
            // The last slot has no pivot: it ends where the node does. A pivot of zero behind the first says the same.
            let pivot = match slot + 1 < count {
                true => self.space.u64(node.wrapping_add(pivots + 8 * slot as u64)).unwrap_or(0),
                false => last,
            };
            let pivot = if pivot == 0 && slot > 0 { last } else { pivot };
            let Ok(child) = self.space.u64(node.wrapping_add(slots + 8 * slot as u64)) else { return };
            if kind == Self::LEAF_64 {
                if child & 3 == 0 && child != 0 {
                    self.areas.push(child);
                }
            } else {
                self.walk(child, pivot, depth - 1);
            }
            if pivot >= last {
                break;
            }
        }
    }
}

fn mapping(space: &AddressSpace, layout: &Layout, area: u64, vdso: Option<u64>) -> Result<Mapping, ReadError> {
    let read = |offset: u64| space.u64(area.wrapping_add(offset));
    let (start, end, flags) = (read(layout.vma_start)?, read(layout.vma_end)?, read(layout.vma_flags)?);
    let file = read(layout.vma_file)?;
    let file = match file {
        0 if vdso == Some(start) => {
            let version = FileVersion { inode: 0, len: end.saturating_sub(start), modified: 0 };
            Some(MappedFile { path: "[vdso]".into(), version, file_system: "vdso".into() })
        }
        0 => None,
        file => mapped_file(space, layout, file).ok(),
    };
    Ok(Mapping {
        start,
        end,
        offset: if file.is_some() { read(layout.vma_pgoff)?.wrapping_mul(4096) } else { 0 },
        readable: flags & 1 != 0,
        writable: flags & 2 != 0,
        executable: flags & 4 != 0,
        file,
    })
}

/// What a `struct file` is.
pub(super) fn mapped_file(space: &AddressSpace, layout: &Layout, file: u64) -> Result<MappedFile, ReadError> {
    let dentry = space.u64(file.wrapping_add(layout.file_dentry))?;
    let mount = space.u64(file.wrapping_add(layout.file_mnt))?;
    let inode = space.u64(dentry.wrapping_add(layout.dentry_inode))?;
    let super_block = space.u64(inode.wrapping_add(layout.inode_sb))?;
    let kind = space.u64(super_block.wrapping_add(layout.sb_type))?;
    let name = space.u64(kind.wrapping_add(layout.fs_type_name))?;
    let member =
        |offset: Option<u64>| offset.and_then(|offset| space.u64(inode.wrapping_add(offset)).ok()).unwrap_or(0);
    let version = FileVersion {
        inode: member(layout.inode_number),
        len: member(layout.inode_size),
        modified: member(layout.inode_modified),
    };
    Ok(MappedFile { path: path_of(space, layout, dentry, mount)?, version, file_system: space.string(name, 32)? })
}

/// The path of a directory entry: names up to the root of its file system, then on from where that is mounted.
fn path_of(space: &AddressSpace, layout: &Layout, dentry: u64, mount: u64) -> Result<String, ReadError> {
    let mut parts = Vec::new();
    let (mut at, mut mount) = (dentry, mount);
    for _ in 0..PATH_PARTS_MAX {
        let parent = space.u64(at.wrapping_add(layout.dentry_parent))?;
        if parent != at {
            let name = space.u64(at.wrapping_add(layout.dentry_name))?;
            parts.push(space.string(name, NAME_MAX)?);
            at = parent;
            continue;
        }
        // `mount` is the address of the `mnt` inside a `struct mount`.
        let Some((mnt, mnt_parent, mountpoint)) = layout.mount else { break };
        let outer = mount.wrapping_sub(mnt);
        let above = space.u64(outer.wrapping_add(mnt_parent))?;
        if above == outer {
            break;
        }
        at = space.u64(outer.wrapping_add(mountpoint))?;
        mount = above.wrapping_add(mnt);
    }
    parts.reverse();
    Ok(format!("/{}", parts.join("/")))
}
