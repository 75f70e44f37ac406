//! What the debugger reads: programs with their symbols and line tables, the kernel's types and symbol table, and a
//! guest's memory that claims to hold a kernel.

use std::sync::Arc;

use orrery_cpu::CpuState;
use orrery_vmm::inspect::btf::Btf;
use orrery_vmm::inspect::object::{Object, demangle};
use orrery_vmm::inspect::{InspectCache, Inspector, kallsyms};
use orrery_vmm::ram;
use vm_memory::{Bytes as _, GuestAddress};

use crate::bytes::Bytes;

/// An ELF file.
pub fn object(data: &[u8]) {
    demangle(&String::from_utf8_lossy(&data[..data.len().min(200)]));
    let Some(object) = Object::parse(data) else { return };
    let probes =
        data.chunks_exact(8).step_by(3).take(32).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    for address in probes.chain([0, 1, 0x1000, 0x40_1000, u64::MAX]) {
        object.symbol(address);
        object.line(address);
        object.address_of_offset(address);
        object.has_address(address);
    }
    for name in ["main", "_start", ""] {
        object.lookup(name);
    }
}

/// The kernel's types.
pub fn types(data: &[u8]) {
    let mut file = data.to_vec();
    for header in [false, true] {
        if header && file.len() >= 24 {
            // Magic and version right, and lengths that fit.
            let rest = (file.len() - 24) as u32;
            let types = u32::from(file[23]) * 4 % (rest + 1);
            file[..8].copy_from_slice(&[0x9F, 0xEB, 1, 0, 24, 0, 0, 0]);
            for (n, word) in [0, types, types, rest - types].into_iter().enumerate() {
                file[8 + 4 * n..12 + 4 * n].copy_from_slice(&word.to_le_bytes());
            }
        }
        Btf::extent(&file);
        if let Ok(types) = Btf::parse(&file) {
            for name in ["task_struct", "a", ""] {
                let _ = types.size_of(name);
                for path in ["pid", "a.b", ".", ""] {
                    let _ = types.member(name, path);
                }
            }
        }
    }
}

/// The kernel's symbol table in its memory.
pub fn kernel_symbols(data: &[u8]) {
    let mut memory = data.to_vec();
    if data.first().is_some_and(|byte| byte & 1 == 1) {
        // What the search looks for first: the tokens of the ten digits.
        memory.extend_from_slice(b"\x000\x001\x002\x003\x004\x005\x006\x007\x008\x009\0");
        memory.extend_from_slice(data);
    }
    if let Some(table) = kallsyms::find(&memory, 0xFFFF_FFFF_8100_0000) {
        for address in [0, 0xFFFF_FFFF_8100_0000, u64::MAX] {
            table.covering(address);
        }
        assert!(table.entries().iter().all(|entry| table.name(entry).len() < 1 << 20));
    }
}

/// A guest whose memory and registers are the input's.
pub fn inspector(data: &[u8]) {
    thread_local! {
        static MEMORY: orrery_devices::GuestMemory = ram::create(16 << 20).expect("16 MiB of memory");
    }
    let mut bytes = Bytes::new(data);
    MEMORY.with(|memory| {
        let mut cpu = CpuState::long_mode_boot(0, 0, 0, 0x1000, 0, 0);
        cpu.rip = bytes.u64();
        cpu.gpr[4] = bytes.u64();
        cpu.gpr[5] = bytes.u64();
        cpu.seg[5].base = bytes.u64();
        cpu.cpl = bytes.u8() & 3;
        let put = |at: u64, bytes: &[u8]| drop(memory.write_slice(bytes, GuestAddress(at)));
        // Tables that map the kernel's half somewhere, and loops in them.
        for at in [0x1000u64, 0x1FF8, 0x2FF0, 0x2FF8, 0x3040, 0x4000] {
            let entry = (u64::from(bytes.u8()) % 16) << 12 | u64::from(bytes.u8()) | 1;
            put(at, &entry.to_le_bytes());
        }
        let rest = bytes.rest();
        let half = rest.len() / 2;
        put(0x5000, &rest[..half]);
        put(0x20_0000, &rest[half..]);
        let inspector = Inspector::over(&cpu, memory, Vec::new(), &Arc::new(InspectCache::default()));
        inspector.backtrace();
        inspector.symbolize(cpu.rip);
        let _ = inspector.kernel_banner();
        let _ = inspector.processes();
        inspector.lookup("main");
        for space in [inspector.current_space(), inspector.kernel_space(), inspector.physical()] {
            space.read_up_to(cpu.gpr[4], 64);
            space.mapped_ranges(0, 1 << 30);
            space.mapped_ranges(0xFFFF_FFFF_0000_0000, u64::MAX);
            let _ = space.string(cpu.rip, 100);
        }
        put(0x5000, &vec![0; half]);
        put(0x20_0000, &vec![0; rest.len() - half]);
    });
}
