//! KVM as the other side: one VM with one vCPU, loaded with a [`CpuState`], stepped, and read back into one.
//!
//! Some KVMs (PVM, which has no help of the processor) step kernel mode only: KVM_GUESTDBG_SINGLESTEP means nothing
//! to user mode there. Then user mode runs with TF set, and its #DB goes to the guest's own handler, on a stack of its
//! own, which writes to a port. While KVM stands there the vCPU is *parked*: the registers of user mode are in the
//! handler's frame, and IRETQ leads to the next instruction.

use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable,
    kvm_guest_debug, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use orrery_cpu::memory::GuestMemory;
use orrery_cpu::model::{CpuidContext, ModelFeatures, cpuid};
use orrery_cpu::state::{CpuState, Segment, TableRegister, XSAVE_SIZE, XsaveImage, gpr, rflags, seg};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::case::Registers;
use crate::machine::{self, RAM_BYTES, STEP_FRAME, STEP_PORT};

/// Why a VM cannot be had on this host.
#[derive(Debug)]
pub struct Unavailable(pub String);

/// How one step of the vCPU ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Between two instructions.
    Done,
    /// HLT.
    Halted,
    /// Triple fault.
    Shutdown,
    /// KVM could not execute the instruction.
    Refused(String),
}

type Field = fn(&mut CpuState) -> &mut u64;

/// MSRs that are compared, and where they are in [`CpuState`].
const MSRS: [(u32, Field); 10] = [
    (0xC000_0081, |s| &mut s.star),
    (0xC000_0082, |s| &mut s.lstar),
    (0xC000_0083, |s| &mut s.cstar),
    (0xC000_0084, |s| &mut s.sfmask),
    (0xC000_0102, |s| &mut s.kernel_gs_base),
    (0x174, |s| &mut s.sysenter_cs),
    (0x175, |s| &mut s.sysenter_esp),
    (0x176, |s| &mut s.sysenter_eip),
    (0x277, |s| &mut s.pat),
    (0xC000_0103, |s| &mut s.tsc_aux),
];

/// The VM.
pub struct Vm {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: GuestMemory,
    /// User mode is stepped by TF and the guest's #DB.
    pub steps_by_trap: bool,
    /// The processor below KVM is one that QEMU emulates.
    pub emulated_processor: bool,
    /// Stops after each instruction.
    stepping: bool,
    /// Between two instructions of user mode, in the handler of #DB.
    parked: bool,
}

/// Longest run of the vCPU without a stop, in processor time of this thread: other programs do not count.
const PATIENCE: Duration = Duration::from_millis(300);

/// Processor time of this thread.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to the structure given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A timer that keeps interrupting KVM_RUN, so that a guest without an end can be left.
fn start_timer() {
    extern "C" fn nothing(_: libc::c_int) {}
    let period = libc::timeval { tv_sec: 0, tv_usec: 100_000 };
    let times = libc::itimerval { it_interval: period, it_value: period };
    // SAFETY: a handler that does nothing, and plain values.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK;
        libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut());
        libc::setitimer(libc::ITIMER_REAL, &times, std::ptr::null_mut());
    }
}

fn refused<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> Unavailable {
    move |error| Unavailable(format!("{what}: {error}"))
}

/// True if a hypervisor says that it is QEMU's own emulation (CPUID leaf 0x40000000).
fn is_emulated_processor() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    std::arch::x86_64::__cpuid(1).ecx >> 31 == 1
        && (leaf.ebx, leaf.ecx, leaf.edx) == (0x5447_4354, 0x4354_4743, 0x4743_5447)
}

fn model_cpuid() -> CpuId {
    let context = CpuidContext { osxsave: true, xcr0: 7, apic_id: 0 };
    let leaves = [
        (0, 1),
        (1, 1),
        (2, 1),
        (4, 5),
        (6, 1),
        (7, 1),
        (0xB, 3),
        (0xD, 3),
        (0x15, 1),
        (0x16, 1),
        (0x4000_0000, 1),
        (0x4000_0010, 1),
        (0x8000_0000, 1),
        (0x8000_0001, 1),
        (0x8000_0002, 1),
        (0x8000_0003, 1),
        (0x8000_0004, 1),
        (0x8000_0006, 1),
        (0x8000_0007, 1),
        (0x8000_0008, 1),
    ];
    let mut entries = Vec::new();
    for (function, count) in leaves {
        for index in 0..count {
            let answer = cpuid(function, index, &ModelFeatures::default(), &context);
            entries.push(kvm_cpuid_entry2 {
                function,
                index,
                // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                flags: u32::from(count > 1 || function == 7),
                eax: answer.eax,
                ebx: answer.ebx,
                ecx: answer.ecx,
                edx: answer.edx,
                ..Default::default()
            });
        }
    }
    CpuId::from_entries(&entries).expect("a short list")
}

fn to_segment(s: &Segment) -> kvm_segment {
    let bit = |n: u16| (s.attributes >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind(),
        present: bit(7),
        dpl: s.dpl(),
        db: bit(10),
        s: bit(4),
        l: bit(9),
        g: bit(11),
        avl: bit(8),
        unusable: u8::from(!s.present()),
        padding: 0,
    }
}

fn from_segment(s: &kvm_segment) -> Segment {
    if s.unusable != 0 || s.present == 0 {
        return Segment { base: s.base, limit: 0, selector: s.selector, attributes: 0 };
    }
    let attributes = u16::from(s.type_ & 15)
        | u16::from(s.s & 1) << 4
        | u16::from(s.dpl & 3) << 5
        | 0x80
        | u16::from(s.avl & 1) << 8
        | u16::from(s.l & 1) << 9
        | u16::from(s.db & 1) << 10
        | u16::from(s.g & 1) << 11;
    Segment { base: s.base, limit: s.limit, selector: s.selector, attributes }
}

/// Brings an XSAVE image to the form of [`CpuState`]: all components present, no addresses of x87.
fn normalised(area: &[u8]) -> XsaveImage {
    let mut image = Registers::default().fpu;
    let present = area[512];
    if present & 1 != 0 {
        image.0[0..6].copy_from_slice(&area[0..6]);
        for register in 0..8 {
            let at = 32 + register * 16;
            image.0[at..at + 10].copy_from_slice(&area[at..at + 10]);
        }
    }
    image.0[24..28].copy_from_slice(&area[24..28]);
    if present & 2 != 0 {
        image.0[160..416].copy_from_slice(&area[160..416]);
    }
    if present & 4 != 0 {
        image.0[576..XSAVE_SIZE].copy_from_slice(&area[576..XSAVE_SIZE]);
    }
    image
}

impl Vm {
    /// A VM over RAM of its own, with the CPUID of the model.
    pub fn new() -> Result<Vm, Unavailable> {
        let kvm = Kvm::new().map_err(refused("/dev/kvm"))?;
        let vm = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
        // KVM on VMX without unrestricted guests wants it; elsewhere it is harmless.
        let _ = vm.set_tss_address(0xFFFB_D000);
        let memory = machine::memory();
        let host = memory.get_host_address(GuestAddress(0)).expect("RAM begins at 0");
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM_BYTES,
            userspace_addr: host as u64,
        };
        // SAFETY: the mapping lives in `memory`, which the VM owns, and is RAM_BYTES long.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("KVM_SET_USER_MEMORY_REGION"))?;
        let vcpu = vm.create_vcpu(0).map_err(refused("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(&model_cpuid()).map_err(refused("KVM_SET_CPUID2"))?;
        let mut vm = Vm {
            vcpu,
            vm,
            memory,
            steps_by_trap: false,
            emulated_processor: is_emulated_processor(),
            stepping: false,
            parked: false,
        };
        vm.set_stepping(true);
        start_timer();
        vm.steps_by_trap = !vm.steps_user_mode().map_err(Unavailable)?;
        Ok(vm)
    }

    /// Whether KVM_GUESTDBG_SINGLESTEP stops behind an instruction of user mode.
    fn steps_user_mode(&mut self) -> Result<bool, String> {
        let (state, image) = machine::probe();
        self.load(&state, &image)?;
        let step = self.step();
        Ok(step == Step::Done && self.rip() == state.rip + 1)
    }

    /// Forgets what KVM has cached of the page tables: it does not see that they are loaded anew.
    pub fn forget_translations(&mut self) -> Result<(), String> {
        for memory_size in [0, RAM_BYTES] {
            let host = self.memory.get_host_address(GuestAddress(0)).expect("RAM begins at 0");
            let region = kvm_userspace_memory_region {
                slot: 0,
                flags: 0,
                guest_phys_addr: 0,
                memory_size,
                userspace_addr: host as u64,
            };
            // SAFETY: as in `new`; a size of 0 takes it away.
            unsafe { self.vm.set_user_memory_region(region) }
                .map_err(|error| format!("KVM_SET_USER_MEMORY_REGION: {error}"))?;
        }
        Ok(())
    }

    /// Stops after each instruction from now on, or only where the guest leaves KVM.
    pub fn set_stepping(&mut self, stepping: bool) {
        self.stepping = stepping;
        self.apply_stepping();
    }

    fn apply_stepping(&self) {
        let control = if self.stepping { KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP } else { 0 };
        let debug = kvm_guest_debug { control, ..Default::default() };
        self.vcpu.set_guest_debug(&debug).expect("KVM_SET_GUEST_DEBUG");
    }

    /// The VM's RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Loads RAM and registers.
    pub fn load(&mut self, state: &CpuState, image: &[u8]) -> Result<(), String> {
        machine::load(&self.memory, image);
        self.parked = false;
        let said = |what: &'static str| move |error: kvm_ioctls::Error| format!("{what}: {error}");
        let mut events = self.vcpu.get_vcpu_events().map_err(said("KVM_GET_VCPU_EVENTS"))?;
        events.exception = Default::default();
        events.interrupt = Default::default();
        events.nmi = Default::default();
        self.vcpu.set_vcpu_events(&events).map_err(said("KVM_SET_VCPU_EVENTS"))?;
        // A stepped HLT leaves the vCPU halted, which is told at the next step only. KVM_MP_STATE_RUNNABLE is 0.
        self.vcpu.set_mp_state(kvm_mp_state { mp_state: 0 }).map_err(said("KVM_SET_MP_STATE"))?;
        let table = |t: &TableRegister| kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] };
        let [es, cs, ss, ds, fs, gs] = [0, 1, 2, 3, 4, 5].map(|n: usize| to_segment(&state.seg[n]));
        let sregs = kvm_sregs {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr: to_segment(&state.tr),
            ldt: to_segment(&state.ldtr),
            gdt: table(&state.gdtr),
            idt: table(&state.idtr),
            cr0: state.cr0,
            cr2: state.cr2,
            cr3: state.cr3,
            cr4: state.cr4,
            cr8: 0,
            efer: state.efer,
            apic_base: 0xFEE0_0900,
            interrupt_bitmap: [0; 4],
        };
        self.vcpu.set_sregs(&sregs).map_err(said("KVM_SET_SREGS"))?;
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = state.xcr0;
        self.vcpu.set_xcrs(&xcrs).map_err(said("KVM_SET_XCRS"))?;
        let mut xsave = kvm_xsave::default();
        for (word, bytes) in xsave.region.iter_mut().zip(state.fpu.0.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        // SAFETY: no component beyond the 4096 bytes of `kvm_xsave` was enabled for this process.
        unsafe { self.vcpu.set_xsave(&xsave) }.map_err(said("KVM_SET_XSAVE"))?;
        let mut copy = state.clone();
        let entries: Vec<_> = MSRS
            .iter()
            .map(|(index, field)| kvm_msr_entry { index: *index, data: *field(&mut copy), ..Default::default() })
            .collect();
        let written = self.vcpu.set_msrs(&Msrs::from_entries(&entries).expect("a short list"));
        if written.map_err(said("KVM_SET_MSRS"))? != MSRS.len() {
            return Err("KVM refuses an MSR".to_string());
        }
        let db = [state.dr[0], state.dr[1], state.dr[2], state.dr[3]];
        let debug = kvm_debugregs { db, dr6: state.dr[6], dr7: state.dr[7], ..Default::default() };
        self.vcpu.set_debug_regs(&debug).map_err(said("KVM_SET_DEBUGREGS"))?;
        let g = &state.gpr;
        let regs = kvm_regs {
            rax: g[gpr::RAX],
            rbx: g[gpr::RBX],
            rcx: g[gpr::RCX],
            rdx: g[gpr::RDX],
            rsi: g[gpr::RSI],
            rdi: g[gpr::RDI],
            rsp: g[gpr::RSP],
            rbp: g[gpr::RBP],
            r8: g[8],
            r9: g[9],
            r10: g[10],
            r11: g[11],
            r12: g[12],
            r13: g[13],
            r14: g[14],
            r15: g[15],
            rip: state.rip,
            rflags: state.rflags,
        };
        self.vcpu.set_regs(&regs).map_err(said("KVM_SET_REGS"))
    }

    /// One step.
    pub fn step(&mut self) -> Step {
        if self.steps_by_trap {
            self.set_trap();
        } else if self.stepping {
            // The processor steps with TF. KVM sets it where KVM_SET_GUEST_DEBUG is called; KVM_SET_REGS, POPF and
            // IRET clear it.
            self.apply_stepping();
        }
        self.parked = false;
        let start = processor_time();
        // QEMU's time goes on while the host does something else.
        let patience = if self.emulated_processor { 100 * PATIENCE } else { PATIENCE };
        loop {
            return match self.vcpu.run() {
                // The port's handler is stepped, too.
                Ok(VcpuExit::Debug(debug)) if self.steps_by_trap && machine::is_step_handler(debug.pc) => continue,
                Ok(VcpuExit::Debug(_)) => Step::Done,
                Ok(VcpuExit::IoOut(STEP_PORT, _)) if self.steps_by_trap => {
                    self.parked = true;
                    Step::Done
                }
                Ok(VcpuExit::Hlt) => Step::Halted,
                Ok(VcpuExit::Shutdown) => Step::Shutdown,
                Ok(VcpuExit::InternalError) => Step::Refused("emulation failure".to_string()),
                Ok(other) => Step::Refused(format!("exit {other:?}")),
                Err(error) if error.errno() == libc::EINTR && processor_time() - start < patience => continue,
                Err(error) if error.errno() == libc::EINTR => Step::Refused("no end in sight".to_string()),
                Err(error) => Step::Refused(format!("KVM_RUN: {error}")),
            };
        }
    }

    /// Sets TF for the next instruction of user mode.
    fn set_trap(&mut self) {
        if self.parked {
            let flags = self.frame(2) | rflags::TF;
            self.memory.write_obj(flags, GuestAddress(STEP_FRAME + 16)).expect("RAM");
        } else if self.vcpu.get_sregs().expect("KVM_GET_SREGS").cs.selector & 3 == 3 {
            self.change_registers(|r| r.rflags |= rflags::TF);
        }
    }

    /// Changes general-purpose registers, RIP or RFLAGS between two steps.
    pub fn change_registers(&mut self, change: impl FnOnce(&mut kvm_regs)) {
        let mut registers = self.vcpu.get_regs().expect("KVM_GET_REGS");
        change(&mut registers);
        self.vcpu.set_regs(&registers).expect("KVM_SET_REGS");
    }

    /// Gives the flags in `mask` the values that they have in `flags`, between two steps.
    pub fn change_flags(&mut self, mask: u64, flags: u64) {
        if self.parked {
            let flags = self.frame(2) & !mask | flags & mask;
            self.memory.write_obj(flags, GuestAddress(STEP_FRAME + 16)).expect("RAM");
        } else {
            self.change_registers(|r| r.rflags = r.rflags & !mask | flags & mask);
        }
    }

    /// Takes the traps of stepping out of DR6.
    pub fn clear_trap_status(&self) {
        let mut debug = self.vcpu.get_debug_regs().expect("KVM_GET_DEBUGREGS");
        debug.dr6 &= !(1 << 14);
        self.vcpu.set_debug_regs(&debug).expect("KVM_SET_DEBUGREGS");
    }

    /// True if user mode is between two instructions and KVM in the handler of #DB.
    pub fn is_parked(&self) -> bool {
        self.parked
    }

    /// RIP, CS, RFLAGS, RSP or SS of the frame of #DB.
    fn frame(&self, index: u64) -> u64 {
        self.memory.read_obj(GuestAddress(STEP_FRAME + 8 * index)).expect("RAM")
    }

    fn raw_rip(&self) -> u64 {
        self.vcpu.get_regs().expect("KVM_GET_REGS").rip
    }

    /// RIP, which is cheaper than all of it.
    pub fn rip(&self) -> u64 {
        if self.parked { self.frame(0) } else { self.raw_rip() }
    }

    /// All registers; what KVM does not tell is that of `like`.
    pub fn capture(&self, like: &CpuState) -> CpuState {
        let r = self.vcpu.get_regs().expect("KVM_GET_REGS");
        let s = self.vcpu.get_sregs().expect("KVM_GET_SREGS");
        let mut state = like.clone();
        state.gpr = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ];
        (state.rip, state.rflags) = (r.rip, r.rflags);
        state.seg = [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].map(|segment| from_segment(&segment));
        (state.ldtr, state.tr) = (from_segment(&s.ldt), from_segment(&s.tr));
        state.gdtr = TableRegister { base: s.gdt.base, limit: s.gdt.limit };
        state.idtr = TableRegister { base: s.idt.base, limit: s.idt.limit };
        (state.cr0, state.cr2, state.cr3, state.cr4, state.efer) = (s.cr0, s.cr2, s.cr3, s.cr4, s.efer);
        state.cpl = (s.cs.selector & 3) as u8;
        state.xcr0 = self.vcpu.get_xcrs().expect("KVM_GET_XCRS").xcrs[0].value;
        let entries = MSRS.map(|(index, _)| kvm_msr_entry { index, ..Default::default() });
        let mut msrs = Msrs::from_entries(&entries).expect("a short list");
        self.vcpu.get_msrs(&mut msrs).expect("KVM_GET_MSRS");
        for ((_, field), entry) in MSRS.iter().zip(msrs.as_slice()) {
            *field(&mut state) = entry.data;
        }
        let debug = self.vcpu.get_debug_regs().expect("KVM_GET_DEBUGREGS");
        state.dr[..4].copy_from_slice(&debug.db);
        (state.dr[6], state.dr[7]) = (debug.dr6, debug.dr7);
        // BS, of the trap that stepped.
        state.dr[6] = state.dr[6] & !(1 << 14) | like.dr[6] & 1 << 14;
        if self.parked {
            state.rip = self.frame(0);
            state.rflags = self.frame(2) & !rflags::TF;
            state.gpr[gpr::RSP] = self.frame(3);
            state.cpl = (self.frame(1) & 3) as u8;
            // The hidden parts are those of the descriptors.
            for (index, selector) in [(seg::CS, self.frame(1)), (seg::SS, self.frame(4))] {
                state.seg[index] = machine::user_segment(selector as u16);
            }
        } else if self.steps_by_trap && state.cpl == 3 {
            state.rflags &= !rflags::TF;
        }
        let xsave = self.vcpu.get_xsave().expect("KVM_GET_XSAVE");
        let area: Vec<u8> = xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect();
        state.fpu = normalised(&area);
        state
    }
}
