//! What this host's KVM costs, for `orrery doctor`.

use super::super::assembler::Assembler;
use super::super::region::Region;
use super::tables::Arena;
use super::vm::{Exit, Vm};
use super::{KvmError, emit_exit};
use crate::memory::{GuestMemory, PhysMemory};
use kvm_ioctls::{Cap, Kvm};
use vm_memory::GuestAddress;

/// Times of one round trip each, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct KvmCosts {
    /// Out of translated code, and back in.
    pub exit_ns: u64,
    /// A page that is not mapped yet: out, and back in.
    pub fault_ns: u64,
    /// x87 and vector registers out, and back in.
    pub registers_ns: u64,
}

/// Whether a virtual machine can be had at all.
pub fn available() -> Result<(), KvmError> {
    let kvm = Kvm::new().map_err(|error| KvmError::Call { call: "opening /dev/kvm", error: error.to_string() })?;
    if !kvm.check_extension(Cap::SyncRegs) {
        return Err(KvmError::Lacks("KVM_CAP_SYNC_REGS"));
    }
    match kvm.create_vm() {
        Ok(_) => Ok(()),
        Err(error) => Err(KvmError::Call { call: "KVM_CREATE_VM", error: error.to_string() }),
    }
}

/// Makes a virtual machine and measures it.
pub fn measure() -> Result<KvmCosts, KvmError> {
    const CODE_BYTES: usize = 2 << 20;
    /// Offset of code that faults.
    const FAULTS: usize = 64;
    let no_memory = |error: &dyn std::fmt::Display| KvmError::Memory(error.to_string());
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 16)]).map_err(|error| no_memory(&error))?;
    let memory = PhysMemory::new(memory);
    let code = Region::new(CODE_BYTES, None).map_err(|error| no_memory(&error))?;
    let mut a = Assembler::default();
    a.start(0);
    emit_exit(&mut a);
    a.bytes.resize(FAULTS, 0x90);
    a.put(&[0x8B, 0x01]); // mov eax, [rcx]
    // SAFETY: the region is larger than this code, and nothing else refers to it.
    unsafe { std::ptr::copy_nonoverlapping(a.bytes.as_ptr(), code.at(0), a.bytes.len()) };
    let tables = Arena::new(CODE_BYTES as u64, 0)?;
    let place = (code.at(0) as u64, code.at(CODE_BYTES) as u64);
    let mut vm = Vm::new(&memory, &tables, place, None)?;
    let linear = tables.code_linear();

    let exit_ns = median(|| {
        vm.regs().rip = linear;
        vm.regs().rflags = 0x202;
        match vm.run(&tables)? {
            Exit::Site(_) => Ok(()),
            other => Err(KvmError::Exit(format!("{other:?}"))),
        }
    })?;
    let fault_ns = median(|| {
        vm.regs().rip = linear + FAULTS as u64;
        vm.regs().rcx = 0x40_0000;
        match vm.run(&tables)? {
            Exit::Exception { page_fault: Some(fault) } if fault.linear == 0x40_0000 => Ok(()),
            other => Err(KvmError::Exit(format!("{other:?}"))),
        }
    })?;
    let registers_ns = median(|| {
        let image = vm.fpu()?;
        vm.set_fpu(&image)
    })?;
    Ok(KvmCosts { exit_ns, fault_ns, registers_ns })
}

/// Median time of many calls, in nanoseconds.
fn median(mut call: impl FnMut() -> Result<(), KvmError>) -> Result<u64, KvmError> {
    const CALLS: usize = 201;
    let mut times = Vec::with_capacity(CALLS);
    for _ in 0..CALLS {
        #[allow(clippy::disallowed_methods, clippy::disallowed_types)] // it is the host that is measured
        let start = std::time::Instant::now();
        call()?;
        times.push(start.elapsed().as_nanos() as u64);
    }
    times.sort_unstable();
    Ok(times[CALLS / 2])
}
