//! Where the members of the kernel's structures are that this library reads, taken from the kernel's types.

use super::btf::{Btf, BtfError};

/// A member whose size differs between kernels.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Bytes from the start of its structure.
    pub offset: u64,
    /// Bytes of it.
    pub size: usize,
}

/// Offsets in bytes, by structure and member.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Layout {
    pub task_tasks: u64,
    pub task_pid: u64,
    pub task_tgid: u64,
    pub task_comm: u64,
    pub task_state: Field,
    pub task_exit_state: u64,
    pub task_flags: u64,
    pub task_mm: u64,
    pub task_real_parent: u64,
    pub task_signal: u64,
    pub task_thread_node: u64,
    pub task_stack: u64,
    pub task_utime: u64,
    pub task_stime: u64,
    pub task_runtime: u64,
    pub task_sp: u64,
    pub signal_thread_head: u64,
    pub mm_pgd: u64,
    pub mm_vmas: VmaPlaces,
    pub mm_arg_start: u64,
    pub mm_arg_end: u64,
    pub mm_exe_file: u64,
    pub vma_start: u64,
    pub vma_end: u64,
    pub vma_flags: u64,
    pub vma_pgoff: u64,
    pub vma_file: u64,
    pub file_dentry: u64,
    pub file_mnt: u64,
    pub dentry_name: u64,
    pub dentry_parent: u64,
    pub dentry_inode: u64,
    pub inode_sb: u64,
    pub inode_number: Option<u64>,
    pub inode_size: Option<u64>,
    pub inode_modified: Option<u64>,
    pub sb_type: u64,
    pub fs_type_name: u64,
    /// Of `struct mount`: its `mnt`, `mnt_parent` and `mnt_mountpoint`.
    pub mount: Option<(u64, u64, u64)>,
    /// `mm_struct.context.vdso`.
    pub mm_vdso: Option<u64>,
    pub module: Option<ModulePlaces>,
    /// Offset of `pcpu_hot.current_task`, for kernels that have it.
    pub pcpu_hot_current: Option<u64>,
    /// Bytes of `struct pt_regs`.
    pub pt_regs_size: u64,
    pub orc: Option<OrcPlaces>,
}

/// How a process's mappings are kept.
#[derive(Clone, Copy, Debug)]
pub enum VmaPlaces {
    /// A maple tree (Linux 6.1 and later): offset of its root in `mm_struct`, and the nodes' shape.
    Maple {
        /// `mm_mt.ma_root`.
        root: u64,
        /// `maple_range_64`: pivots, slots.
        range: (u64, u64),
        /// Slots of a `maple_range_64`.
        range_slots: usize,
        /// `maple_arange_64`: pivots, slots.
        allocation: (u64, u64),
        /// Slots of a `maple_arange_64`.
        allocation_slots: usize,
    },
    /// A linked list: `mm_struct.mmap` and `vm_area_struct.vm_next`.
    List {
        /// The first.
        first: u64,
        /// The next.
        next: u64,
    },
}

/// Members of `struct module`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct ModulePlaces {
    pub list: u64,
    pub name: u64,
    /// Offsets of (base, size) of each part.
    pub memory: Vec<(u64, u64)>,
    pub kallsyms: u64,
    /// In `struct mod_kallsyms`.
    pub symbols: u64,
    pub symbol_count: u64,
    pub strings: u64,
    /// `arch.num_orcs`, `arch.orc_unwind_ip`, `arch.orc_unwind`.
    pub orc: Option<(u64, u64, u64)>,
}

/// Bits of `struct orc_entry`.
#[derive(Clone, Copy, Debug)]
pub struct OrcPlaces {
    /// Bytes of an entry.
    pub size: u64,
    /// Bit offset of the type and its width.
    pub kind: (u32, u32),
    /// Bit of `end` (before Linux 6.4); later the end is a type of its own.
    pub end: Option<u32>,
}

impl Layout {
    /// Looks everything up.
    pub fn of(types: &Btf) -> Result<Layout, BtfError> {
        let at = |name: &str, path: &str| types.member(name, path).map(|member| member.offset());
        let either = |name: &str, first: &str, second: &str| at(name, first).or_else(|_| at(name, second));
        let state = types.member("task_struct", "__state").or_else(|_| types.member("task_struct", "state"))?;
        Ok(Layout {
            task_tasks: at("task_struct", "tasks")?,
            task_pid: at("task_struct", "pid")?,
            task_tgid: at("task_struct", "tgid")?,
            task_comm: at("task_struct", "comm")?,
            task_state: Field { offset: state.offset(), size: state.size.clamp(1, 8) as usize },
            task_exit_state: at("task_struct", "exit_state")?,
            task_flags: at("task_struct", "flags")?,
            task_mm: at("task_struct", "mm")?,
            task_real_parent: at("task_struct", "real_parent")?,
            task_signal: at("task_struct", "signal")?,
            task_thread_node: at("task_struct", "thread_node")?,
            task_stack: at("task_struct", "stack")?,
            task_utime: at("task_struct", "utime")?,
            task_stime: at("task_struct", "stime")?,
            task_runtime: at("task_struct", "se.sum_exec_runtime")?,
            task_sp: at("task_struct", "thread.sp")?,
            signal_thread_head: at("signal_struct", "thread_head")?,
            mm_pgd: at("mm_struct", "pgd")?,
            mm_vmas: vma_places(types)?,
            mm_arg_start: at("mm_struct", "arg_start")?,
            mm_arg_end: at("mm_struct", "arg_end")?,
            mm_exe_file: at("mm_struct", "exe_file")?,
            vma_start: at("vm_area_struct", "vm_start")?,
            vma_end: at("vm_area_struct", "vm_end")?,
            vma_flags: at("vm_area_struct", "vm_flags")?,
            vma_pgoff: at("vm_area_struct", "vm_pgoff")?,
            vma_file: at("vm_area_struct", "vm_file")?,
            file_dentry: either("file", "f_path.dentry", "__f_path.dentry")?,
            file_mnt: either("file", "f_path.mnt", "__f_path.mnt")?,
            dentry_name: either("dentry", "d_name.name", "__d_name.name")?,
            dentry_parent: at("dentry", "d_parent")?,
            dentry_inode: at("dentry", "d_inode")?,
            inode_sb: at("inode", "i_sb")?,
            inode_number: at("inode", "i_ino").ok(),
            inode_size: at("inode", "i_size").ok(),
            inode_modified: either("inode", "i_mtime.tv_sec", "i_mtime_sec").ok(),
            sb_type: at("super_block", "s_type")?,
            fs_type_name: at("file_system_type", "name")?,
            mount: mount_places(types).ok(),
            mm_vdso: at("mm_struct", "context.vdso").ok(),
            module: module_places(types).ok(),
            pcpu_hot_current: at("pcpu_hot", "current_task").ok(),
            pt_regs_size: types.size_of("pt_regs")?,
            orc: orc_places(types).ok(),
        })
    }
}

fn mount_places(types: &Btf) -> Result<(u64, u64, u64), BtfError> {
    let at = |path: &str| types.member("mount", path).map(|member| member.offset());
    Ok((at("mnt")?, at("mnt_parent")?, at("mnt_mountpoint")?))
}

fn vma_places(types: &Btf) -> Result<VmaPlaces, BtfError> {
    let at = |name: &str, path: &str| types.member(name, path).map(|member| member.offset());
    if let Ok(root) = at("mm_struct", "mm_mt.ma_root") {
        let slots = |name: &str| types.member(name, "slot").map(|member| (member.size / 8).min(64) as usize);
        return Ok(VmaPlaces::Maple {
            root,
            range: (at("maple_range_64", "pivot")?, at("maple_range_64", "slot")?),
            range_slots: slots("maple_range_64")?,
            allocation: (at("maple_arange_64", "pivot")?, at("maple_arange_64", "slot")?),
            allocation_slots: slots("maple_arange_64")?,
        });
    }
    Ok(VmaPlaces::List { first: at("mm_struct", "mmap")?, next: at("vm_area_struct", "vm_next")? })
}

fn module_places(types: &Btf) -> Result<ModulePlaces, BtfError> {
    let at = |name: &str, path: &str| types.member(name, path).map(|member| member.offset());
    let mut memory = Vec::new();
    for part in ["core_layout", "init_layout"] {
        let of = |member: &str| at("module", &format!("{part}.{member}"));
        if let (Ok(base), Ok(size)) = (of("base"), of("size")) {
            memory.push((base, size));
        }
    }
    // From Linux 6.4 on: an array of `struct module_memory`.
    if memory.is_empty()
        && let (Ok(array), Ok(size)) = (types.member("module", "mem"), types.size_of("module_memory"))
    {
        let (base, bytes) = (at("module_memory", "base")?, at("module_memory", "size")?);
        let count = (array.size / size.max(1)).min(16);
        memory.extend((0..count).map(|number| {
            let start = array.offset() + number * size;
            (start + base, start + bytes)
        }));
    }
    let orc = |member: &str| at("module", &format!("arch.{member}"));
    Ok(ModulePlaces {
        list: at("module", "list")?,
        name: at("module", "name")?,
        memory,
        kallsyms: at("module", "kallsyms")?,
        symbols: at("mod_kallsyms", "symtab")?,
        symbol_count: at("mod_kallsyms", "num_symtab")?,
        strings: at("mod_kallsyms", "strtab")?,
        orc: match (orc("num_orcs"), orc("orc_unwind_ip"), orc("orc_unwind")) {
            (Ok(count), Ok(ips), Ok(entries)) => Some((count, ips, entries)),
            _ => None,
        },
    })
}

fn orc_places(types: &Btf) -> Result<OrcPlaces, BtfError> {
    let kind = types.member("orc_entry", "type")?;
    Ok(OrcPlaces {
        size: types.size_of("orc_entry")?,
        kind: (kind.bit_offset, kind.bit_size.clamp(1, 8)),
        end: types.member("orc_entry", "end").ok().map(|member| member.bit_offset),
    })
}
