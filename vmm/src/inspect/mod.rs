//! Looking at a guest from outside, without running code in it: memory, symbols, processes, stacks.
//!
//! An [`Inspector`] stands on a machine that does not move, and reads nothing but its registers, its RAM and its
//! disks; it changes neither, so that a state has the same hash before and after. What it knows of the guest it finds
//! in the guest: the kernel's symbols and types in the kernel's own memory ([`kallsyms`], [`btf`]), those of programs
//! in their files on the guest's disks ([`object`]). A kernel that is not Linux, or has not started yet, has no
//! symbols, and says so.
//!
//! ```no_run
//! use orrery_vmm::inspect::Inspector;
//! # fn example(machine: &orrery_vmm::Machine) -> Result<(), orrery_vmm::inspect::InspectError> {
//! let inspector = Inspector::new(machine);
//! if let Some(symbol) = inspector.symbolize(machine.cpu().rip) {
//!     println!("at {symbol}"); // at ext4_file_write_iter+0x12 [ext4]
//! }
//! for place in inspector.lookup("do_sys_openat2") {
//!     println!("{:#x}", place.address);
//! }
//! for process in inspector.processes()? {
//!     println!("{} {}", process.pid, process.name);
//! }
//! # Ok(()) }
//! ```
//!
//! Everything read is hostile: a guest may write what it likes into its own memory and files. Walks are bounded,
//! errors are typed, nothing panics, and what is not known is left out or marked as a guess. It follows that what an
//! inspector says is what the guest's memory says, not what is true.
//!
//! This room depends on `orrery-cpu` for registers and memory and on `orrery-devices` for disks. It knows neither
//! runs nor the command line.

pub mod btf;
mod files;
mod go;
pub mod kallsyms;
mod kernel;
mod layout;
mod mappings;
pub mod memory;
pub mod object;
mod orc;
pub mod profile;
mod symbols;
mod tasks;
mod unwind;

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use orrery_cpu::CpuState;
use orrery_devices::CowDisk;
use orrery_devices::GuestMemory;

pub use kernel::Module;
pub use mappings::{MappedFile, Mapping};
pub use memory::{AddressSpace, ReadError};
pub use object::SourceLine;
pub use symbols::{Frame, Place, Symbol};
pub use tasks::{Task, TaskState};
pub use unwind::{How, Registers};

use btf::BtfError;
use files::{FileVersion, Files};
use kernel::{Kernel, kernel_space};
use object::Object;
use tasks::TaskReader;

use crate::machine::Machine;

/// What cannot be seen from outside.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InspectError {
    /// No Linux kernel is there, or not yet.
    #[error("no Linux kernel with a symbol table is in the guest's memory; early in the boot it is not unpacked yet")]
    NoKernel,
    /// The kernel's types are not known.
    #[error("{0}; processes can be read from kernels built with CONFIG_DEBUG_INFO_BTF only")]
    Types(BtfError),
    /// A variable of the kernel is not in its symbol table.
    #[error("the kernel's symbol table has no {name}; it was built without CONFIG_KALLSYMS_ALL")]
    NoSymbol {
        /// Its name.
        name: &'static str,
    },
    /// Memory that cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// There is no such task.
    #[error("no process or thread has the id {id}")]
    NoTask {
        /// The id asked for.
        id: i32,
    },
}

/// What was read from files, by path and version; None for what is no program.
type Objects = BTreeMap<(String, FileVersion), Option<Arc<Object>>>;

/// What stays the same from one moment of a guest to the next: the kernel's tables, and what was read from programs'
/// files. Sharing it makes the second [`Inspector`] cheap. One cache may serve any number of guests.
#[derive(Default)]
pub struct InspectCache {
    kernels: Mutex<Vec<Arc<Kernel>>>,
    objects: Mutex<Objects>,
    modules: Mutex<Arc<[Module]>>,
}

/// Most bytes of the page of code that the kernel gives to every process.
const VDSO_MAX: u64 = 1 << 20;
/// Most kernels and most files that a cache keeps.
const CACHED_KERNELS_MAX: usize = 4;
const CACHED_OBJECTS_MAX: usize = 256;

/// A look at a guest that stands still.
pub struct Inspector<'a> {
    cpu: &'a CpuState,
    memory: &'a GuestMemory,
    files: Files<'a>,
    cache: Arc<InspectCache>,
    /// The kernel's view of memory.
    space: AddressSpace<'a>,
    kernel: OnceCell<Result<Arc<Kernel>, InspectError>>,
    modules: OnceCell<Arc<[Module]>>,
    mappings: Mutex<BTreeMap<u64, Arc<[Mapping]>>>,
}

impl<'a> Inspector<'a> {
    /// Looks at a machine.
    pub fn new(machine: &'a Machine) -> Inspector<'a> {
        Inspector::with_cache(machine, &Arc::default())
    }

    /// Looks at a machine, with what was learned at other moments.
    pub fn with_cache(machine: &'a Machine, cache: &Arc<InspectCache>) -> Inspector<'a> {
        Inspector::over(machine.cpu(), &machine.board().memory, machine.board().disks().collect(), cache)
    }

    /// Looks at registers, memory and disks.
    pub fn over(
        cpu: &'a CpuState,
        memory: &'a GuestMemory,
        disks: Vec<&'a CowDisk>,
        cache: &Arc<InspectCache>,
    ) -> Inspector<'a> {
        Inspector {
            cpu,
            memory,
            files: Files::new(disks),
            cache: Arc::clone(cache),
            space: kernel_space(cpu, memory),
            kernel: OnceCell::new(),
            modules: OnceCell::new(),
            mappings: Mutex::default(),
        }
    }

    /// The vCPU's registers.
    pub fn cpu(&self) -> &'a CpuState {
        self.cpu
    }

    /// Memory as the vCPU sees it now.
    pub fn current_space(&self) -> AddressSpace<'a> {
        AddressSpace::of(self.cpu, self.memory)
    }

    /// Memory as the kernel sees it.
    pub fn kernel_space(&self) -> AddressSpace<'a> {
        self.space
    }

    /// Memory by guest-physical address.
    pub fn physical(&self) -> AddressSpace<'a> {
        AddressSpace::physical(self.memory)
    }

    /// Memory as a task sees it: its own page tables, or the kernel's for a task that has none.
    pub fn space_of(&self, task: &Task) -> AddressSpace<'a> {
        task.root.map_or(self.space, |root| AddressSpace::rooted(self.memory, root))
    }

    fn kernel(&self) -> Result<&Kernel, InspectError> {
        self.kernel.get_or_init(|| self.find_kernel()).as_deref().map_err(Clone::clone)
    }

    fn find_kernel(&self) -> Result<Arc<Kernel>, InspectError> {
        let mut known = self.cache.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = known.iter().find(|kernel| kernel.is_in(&self.space)) {
            return Ok(Arc::clone(kernel));
        }
        let kernel = Arc::new(Kernel::locate(&self.space)?);
        if known.len() >= CACHED_KERNELS_MAX {
            known.remove(0);
        }
        known.push(Arc::clone(&kernel));
        Ok(kernel)
    }

    /// The kernel's version, as it announces itself.
    pub fn kernel_banner(&self) -> Result<String, InspectError> {
        let address = self.kernel()?.variable("linux_banner")?;
        Ok(self.space.string(address, 512)?.trim_end().to_owned())
    }

    /// The kernel modules that are loaded.
    pub fn modules(&self) -> &[Module] {
        self.modules.get_or_init(|| {
            let Ok(kernel) = self.kernel() else { return Arc::default() };
            let mut known = self.cache.modules.lock().unwrap_or_else(PoisonError::into_inner);
            let names = kernel.module_names(&self.space).unwrap_or_default();
            let same = known.iter().map(|module| (module.address, module.name.as_str()));
            if !same.eq(names.iter().map(|(address, name)| (*address, name.as_str()))) {
                *known = kernel.modules(&self.space, &names).unwrap_or_default().into();
            }
            Arc::clone(&known)
        })
    }

    fn tasks_reader(&self) -> Result<TaskReader<'_>, InspectError> {
        let kernel = self.kernel()?;
        let current = kernel.current_task(&self.space).ok();
        Ok(TaskReader { space: &self.space, kernel, layout: kernel.layout()?, current })
    }

    /// Every thread of every process, the kernel's idle task (0) first.
    pub fn tasks(&self) -> Result<Vec<Task>, InspectError> {
        self.tasks_reader()?.all()
    }

    /// Every process: its first thread stands for it.
    pub fn processes(&self) -> Result<Vec<Task>, InspectError> {
        let mut tasks = self.tasks()?;
        tasks.retain(Task::is_leader);
        Ok(tasks)
    }

    /// The task with a thread or process id.
    pub fn task(&self, id: i32) -> Result<Task, InspectError> {
        self.tasks()?.into_iter().find(|task| task.tid == id).ok_or(InspectError::NoTask { id })
    }

    /// The task that runs on the vCPU.
    pub fn current_task(&self) -> Result<Task, InspectError> {
        let reader = self.tasks_reader()?;
        let address = reader.kernel.current_task(&self.space)?;
        Ok(reader.task(address)?)
    }

    /// The process that runs on the vCPU: as [`Inspector::current_task`], which says more.
    pub fn current_process(&self) -> Result<Task, InspectError> {
        self.current_task()
    }

    /// A process's command line, as it is in its memory now.
    pub fn arguments(&self, task: &Task) -> Vec<String> {
        match self.tasks_reader() {
            Ok(reader) => reader.arguments(task, &self.space_of(task)),
            Err(_) => Vec::new(),
        }
    }

    /// The program that a process runs.
    pub fn executable(&self, task: &Task) -> Option<MappedFile> {
        let layout = self.kernel().ok()?.layout().ok()?;
        let file = self.space.u64(task.mm.wrapping_add(layout.mm_exe_file)).ok()?;
        mappings::mapped_file(&self.space, layout, file).ok().filter(|_| task.mm != 0 && file != 0)
    }

    /// A process's mappings, in ascending order. Kernel threads have none.
    pub fn mappings(&self, task: &Task) -> Arc<[Mapping]> {
        let mut known = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        let read = || -> Arc<[Mapping]> {
            match self.kernel().and_then(|kernel| kernel.layout()) {
                Ok(layout) if task.mm != 0 => mappings::mappings(&self.space, layout, task.mm).into(),
                _ => Arc::from([]),
            }
        };
        Arc::clone(known.entry(task.mm).or_insert_with(read))
    }

    /// What is known of the file that a mapping shows.
    fn object(&self, task: &Task, mapping: &Mapping) -> Option<Arc<Object>> {
        let file = mapping.file.as_ref()?;
        // Files of other file systems are not on the disks, even if one of the same name is.
        if file.file_system != "vdso" && !file.file_system.starts_with("ext") {
            return None;
        }
        self.cached_object(file, || {
            if file.file_system == "vdso" {
                let len = mapping.end.saturating_sub(mapping.start).min(VDSO_MAX);
                return Some(self.space_of(task).read_up_to(mapping.start, len as usize));
            }
            self.files.read(&file.path)
        })
    }

    /// The contents of a file on the guest's disks: what the guest has written back, which may be less than what it
    /// would read itself.
    pub fn disk_file(&self, path: &str) -> Option<Vec<u8>> {
        self.files.read(path)
    }

    fn cached_object(&self, file: &MappedFile, read: impl FnOnce() -> Option<Vec<u8>>) -> Option<Arc<Object>> {
        let key = (file.path.clone(), file.version);
        let mut known = self.cache.objects.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(object) = known.get(&key) {
            return object.clone();
        }
        let object = read().and_then(|bytes| Object::parse(&bytes)).map(Arc::new);
        if known.len() >= CACHED_OBJECTS_MAX {
            known.pop_first();
        }
        known.insert(key, object.clone());
        object
    }
}
