//! The virtual machine: one vCPU that only ever executes translated code at CPL 3, its memory slots, and a handler for
//! every exception that says so and stops.
//!
//! General registers, segments and CR3 travel in `kvm_run` (KVM_CAP_SYNC_REGS), so that a round trip is one system call.

use super::tables::{Arena, EXCEPTION_STACK_TOP, GDT, IDT, SLOT_BYTES, STUBS, TSS};
use crate::memory::PhysMemory;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuExit, VcpuFd, VmFd};

/// Guest-physical addresses in the VM. The arena, with the page tables and all else that is the VM's own, is at 0.
/// A page that nothing is behind: a store there leaves KVM.
pub const EXIT: u64 = 0x1_8000_0000;
pub const CODE: u64 = 0x2_0000_0000;
/// The guest's RAM begins here.
pub const RAM: u64 = 0x10_0000_0000;

const KERNEL_CS: u16 = 0x10;
const USER_SS: u16 = 0x1B;
const USER_CS: u16 = 0x23;
const TSS_SELECTOR: u16 = 0x28;

/// A call to KVM failed, or KVM lacks something.
#[derive(Clone, Debug, thiserror::Error)]
pub enum KvmError {
    /// An ioctl.
    #[error("{call}: {error}")]
    Call {
        /// Its name.
        call: &'static str,
        /// What the kernel said.
        error: String,
    },
    /// A capability.
    #[error("this KVM lacks {0}")]
    Lacks(&'static str),
    /// No memory for the VM's own tables.
    #[error("no memory for page tables: {0}")]
    Memory(String),
    /// The VM stopped for a reason that it should not have.
    #[error("the virtual machine stopped with {0}")]
    Exit(String),
}

/// Counts calls, and lets one of them fail for tests.
#[derive(Debug, Default)]
pub struct Calls {
    count: u32,
    fails: Option<u32>,
}

impl Calls {
    pub fn new(fails: Option<u32>) -> Calls {
        Calls { count: 0, fails }
    }

    /// Makes a call unless it is the one that fails.
    fn make<T>(
        &mut self,
        call: &'static str,
        what: impl FnOnce() -> Result<T, kvm_ioctls::Error>,
    ) -> Result<T, KvmError> {
        let number = self.count;
        self.count += 1;
        if self.fails == Some(number) {
            return Err(KvmError::Call { call, error: "made to fail".to_string() });
        }
        what().map_err(|error| KvmError::Call { call, error: error.to_string() })
    }
}

/// Why the vCPU came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Translated code left through this site.
    Site(u32),
    /// An exception, or something that KVM could not do for the instruction: registers are those before it.
    Exception { page_fault: Option<PageFault> },
}

/// A page fault in the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    pub linear: u64,
    pub write: bool,
}

/// See the module's text.
pub struct Vm {
    vcpu: VcpuFd,
    vm: VmFd,
    _kvm: Kvm,
    calls: Calls,
    /// What the next entry needs besides RIP and the general registers.
    system: bool,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
}

fn segment(selector: u16, kind: u8, dpl: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// GDT, IDT, TSS and the handlers: an OUT to the port with the vector's number.
fn fill_arena(arena: &Arena) {
    let write = |at: u64, value: u64| arena.write(at, value);
    write(GDT + u64::from(KERNEL_CS), 0x00AF_9B00_0000_FFFF);
    write(GDT + u64::from(USER_SS & !3), 0x00CF_F300_0000_FFFF);
    write(GDT + u64::from(USER_CS & !3), 0x00AF_FB00_0000_FFFF);
    let tss = arena.linear(TSS);
    let low = 0x67 | (tss & 0xFF_FFFF) << 16 | 0x89 << 40 | (tss >> 24 & 0xFF) << 56;
    write(GDT + u64::from(TSS_SELECTOR), low);
    write(GDT + u64::from(TSS_SELECTOR) + 8, tss >> 32);
    // RSP0 and IST1 are not aligned to 8 bytes.
    for at in [TSS + 4, TSS + 0x24] {
        let top = arena.linear(EXCEPTION_STACK_TOP);
        arena.write32(at, top as u32);
        arena.write32(at + 4, (top >> 32) as u32);
    }
    arena.write32(TSS + 0x64, 0x68 << 16);
    for vector in 0..256u64 {
        let handler = arena.linear(STUBS + 16 * vector);
        let gate =
            handler & 0xFFFF | u64::from(KERNEL_CS) << 16 | 1 << 32 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48;
        write(IDT + 16 * vector, gate);
        write(IDT + 16 * vector + 8, handler >> 32);
        // out vector, al; jmp to itself
        write(STUBS + 16 * vector, 0xFEEB << 16 | vector << 8 | 0xE6);
    }
}

impl Vm {
    /// A VM with the guest's RAM, the code memory and the arena in it.
    pub fn new(memory: &PhysMemory, arena: &Arena, code: (u64, u64), fails: Option<u32>) -> Result<Vm, KvmError> {
        let mut calls = Calls::new(fails);
        let kvm = calls.make("opening /dev/kvm", Kvm::new)?;
        if !kvm.check_extension(Cap::SyncRegs) {
            return Err(KvmError::Lacks("KVM_CAP_SYNC_REGS"));
        }
        let vm = calls.make("KVM_CREATE_VM", || kvm.create_vm())?;
        // KVM on VMX without unrestricted guests wants it; elsewhere it is harmless.
        let _ = vm.set_tss_address(0xFFFB_D000);
        // Each slot more takes KVM some milliseconds.
        let mut slots = vec![(0, SLOT_BYTES, arena.host()), (CODE, code.1 - code.0, code.0)];
        slots.extend(memory.regions().map(|(start, len, host)| (RAM + start, len, host as u64)));
        for (slot, (guest_phys_addr, memory_size, userspace_addr)) in (0..).zip(slots) {
            let region = kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr };
            // SAFETY: the mappings outlive the VM: the engine drops it before them, and the machine's RAM is held by
            // `PhysMemory`. The VM changes them only through translated code, as the engine itself does.
            calls.make("KVM_SET_USER_MEMORY_REGION", || unsafe { vm.set_user_memory_region(region) })?;
        }
        let vcpu = calls.make("KVM_CREATE_VCPU", || vm.create_vcpu(0))?;
        let cpuid: CpuId = calls.make("KVM_GET_SUPPORTED_CPUID", || kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
        calls.make("KVM_SET_CPUID2", || vcpu.set_cpuid2(&cpuid))?;
        fill_arena(arena);
        let mut this =
            Vm { vcpu, vm, _kvm: kvm, calls, system: true, sregs: kvm_sregs::default(), xsave: Box::default() };
        this.load_system(arena)?;
        Ok(this)
    }

    fn load_system(&mut self, arena: &Arena) -> Result<(), KvmError> {
        let vcpu = &mut self.vcpu;
        let mut sregs = self.calls.make("KVM_GET_SREGS", || vcpu.get_sregs())?;
        sregs.cs = segment(USER_CS, 11, 3, true);
        sregs.ss = segment(USER_SS, 3, 3, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (sregs.ss, sregs.ss, sregs.ss, sregs.ss);
        let table = |base, limit| kvm_dtable { base, limit, padding: [0; 3] };
        sregs.gdt = table(arena.linear(GDT), 0x37);
        sregs.idt = table(arena.linear(IDT), 0xFFF);
        sregs.tr = kvm_segment {
            limit: 0x67,
            s: 0,
            g: 0,
            db: 0,
            base: arena.linear(TSS),
            ..segment(TSS_SELECTOR, 11, 0, false)
        };
        sregs.cr0 = 0x8001_0033; // PG, WP, NE, ET, MP, PE
        sregs.cr4 = 0x0004_06A0; // OSXSAVE, OSXMMEXCPT, OSFXSR, PGE, PAE
        sregs.cr3 = arena.root();
        sregs.efer = 0xD01; // NXE, LMA, LME, SCE
        self.calls.make("KVM_SET_SREGS", || vcpu.set_sregs(&sregs))?;
        self.sregs = sregs;
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = 7;
        self.calls.make("KVM_SET_XCRS", || vcpu.set_xcrs(&xcrs))?;
        // SYSCALL, which translated code does not use, ends where an exception does.
        let entries = [
            (0xC000_0081, u64::from(KERNEL_CS) << 32 | 0x13 << 48),
            (0xC000_0082, arena.linear(STUBS)),
            (0xC000_0084, 0x4_7700),
        ]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
        let msrs = Msrs::from_entries(&entries).expect("a short list");
        if self.calls.make("KVM_SET_MSRS", || vcpu.set_msrs(&msrs))? != entries.len() {
            return Err(KvmError::Lacks("the MSRs of SYSCALL"));
        }
        vcpu.set_sync_valid_reg(SyncReg::Register);
        vcpu.set_sync_valid_reg(SyncReg::SystemRegister);
        Ok(())
    }

    /// The general registers as they are now, to be changed before the next entry.
    pub fn regs(&mut self) -> &mut kvm_regs {
        &mut self.vcpu.sync_regs_mut().regs
    }

    /// Makes KVM forget all that it knows of the arena's pages.
    pub fn forget_arena(&mut self, arena: &Arena) -> Result<(), KvmError> {
        for memory_size in [0, SLOT_BYTES] {
            let region =
                kvm_userspace_memory_region { memory_size, userspace_addr: arena.host(), ..Default::default() };
            let vm = &self.vm;
            // SAFETY: as in `new`.
            self.calls.make("KVM_SET_USER_MEMORY_REGION", || unsafe { vm.set_user_memory_region(region) })?;
        }
        Ok(())
    }

    /// The page tables of the next entry. The VM forgets all translations if they are others.
    pub fn set_root(&mut self, root: u64) {
        self.system |= self.sregs.cr3 != root;
        self.sregs.cr3 = root;
    }

    /// x87 and vector registers of the guest, as an XSAVE image in the standard form.
    pub fn set_fpu(&mut self, image: &[u8]) -> Result<(), KvmError> {
        for (word, bytes) in self.xsave.region.iter_mut().zip(image.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        let (vcpu, xsave) = (&self.vcpu, &self.xsave);
        // SAFETY: no component beyond the 4096 bytes of `kvm_xsave` was enabled for this process.
        self.calls.make("KVM_SET_XSAVE", || unsafe { vcpu.set_xsave(xsave) })
    }

    /// The same, of the VM. Components in their initial state may be absent from it.
    pub fn fpu(&mut self) -> Result<Vec<u8>, KvmError> {
        let vcpu = &self.vcpu;
        let xsave = self.calls.make("KVM_GET_XSAVE", || vcpu.get_xsave())?;
        Ok(xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    /// Enters translated code with the registers that `regs` holds, and returns when it leaves.
    pub fn run(&mut self, arena: &Arena) -> Result<Exit, KvmError> {
        self.vcpu.set_sync_dirty_reg(SyncReg::Register);
        if std::mem::take(&mut self.system) {
            self.vcpu.sync_regs_mut().sregs = self.sregs;
            self.vcpu.set_sync_dirty_reg(SyncReg::SystemRegister);
        }
        loop {
            let vcpu = &mut self.vcpu;
            let number = self.calls.count;
            self.calls.count += 1;
            if self.calls.fails == Some(number) {
                return Err(KvmError::Call { call: "KVM_RUN", error: "made to fail".to_string() });
            }
            let (port, exit) = match vcpu.run() {
                Ok(VcpuExit::MmioWrite(EXIT, data)) if data.len() == 4 => {
                    return Ok(Exit::Site(u32::from_le_bytes([data[0], data[1], data[2], data[3]])));
                }
                Ok(VcpuExit::IoOut(port, _)) if port < 256 => (Some(port), String::new()),
                Ok(VcpuExit::InternalError) => (None, String::new()),
                Ok(other) => (None, format!("{other:?}")),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(error) => return Err(KvmError::Call { call: "KVM_RUN", error: error.to_string() }),
            };
            if !exit.is_empty() {
                return Err(KvmError::Exit(exit));
            }
            // A handler of an exception, or an instruction that KVM tried to execute and could not.
            let Some(vector) = port else {
                return Ok(Exit::Exception { page_fault: None });
            };
            self.system = true;
            let cr2 = self.vcpu.sync_regs_mut().sregs.cr2;
            let frame = EXCEPTION_STACK_TOP - 40;
            let write = arena.read(frame - 8) & 2 != 0;
            let regs = &mut self.vcpu.sync_regs_mut().regs;
            regs.rip = arena.read(frame);
            regs.rflags = arena.read(frame + 16);
            regs.rsp = arena.read(frame + 24);
            return Ok(Exit::Exception { page_fault: (vector == 14).then_some(PageFault { linear: cr2, write }) });
        }
    }
}
