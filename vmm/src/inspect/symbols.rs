//! Addresses to names and names to addresses; whole backtraces.

use std::sync::Arc;

use orrery_cpu::state::gpr;
use serde::Serialize;

use super::kernel::KERNEL_HALF;
use super::memory::AddressSpace;
use super::object::{Object, SourceLine, demangle};
use super::orc::{Orc, OrcStep};
use super::tasks::Task;
use super::unwind::{FRAMES_MAX, How, Registers, UserUnwinder, follows_call};
use super::{InspectError, Inspector, Mapping};

/// Bytes of a kernel stack that are looked through, at most.
const KERNEL_STACK_BYTES: u64 = 16 << 10;

/// Most guesses in a row: behind so many there is more noise than stack.
const GUESSES_MAX: usize = 8;

/// What an address belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Symbol {
    /// Name of the function or variable, as people write it.
    pub name: String,
    /// Bytes from its start.
    pub offset: u64,
    /// Its first address.
    pub address: u64,
    /// Where it is: a kernel module's name or a program's path; None for the kernel itself.
    pub object: Option<String>,
}

impl std::fmt::Display for Symbol {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.name)?;
        if self.offset != 0 {
            write!(f, "+{:#x}", self.offset)?;
        }
        match &self.object {
            Some(object) => write!(f, " [{object}]"),
            None => Ok(()),
        }
    }
}

/// Where a name is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Virtual address.
    pub address: u64,
    /// Where it is: a kernel module's name or a program's path; None for the kernel itself.
    pub object: Option<String>,
    /// The process in whose memory the address is; None for the kernel.
    pub pid: Option<i32>,
}

/// One frame of a backtrace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Frame {
    /// The instruction, or the one after the call.
    pub address: u64,
    /// The stack pointer there.
    pub stack_pointer: u64,
    /// It is user code.
    pub user: bool,
    /// How it was found.
    pub how: How,
    /// Its function.
    pub symbol: Option<Symbol>,
    /// The program or library that it is in, if it is user code.
    pub object: Option<String>,
    /// Its source line.
    pub line: Option<SourceLine>,
}

impl Inspector<'_> {
    /// The function or variable at an address, as the running task sees it.
    pub fn symbolize(&self, address: u64) -> Option<Symbol> {
        if address >= KERNEL_HALF {
            return self.symbolize_kernel(address);
        }
        self.symbolize_in(&self.current_task().ok()?, address)
    }

    /// The function or variable at an address, as a task sees it.
    pub fn symbolize_in(&self, task: &Task, address: u64) -> Option<Symbol> {
        if address >= KERNEL_HALF {
            return self.symbolize_kernel(address);
        }
        let (object, path, own) = self.locate(task, address)?;
        let (name, range) = object.symbol(own)?;
        let offset = own - range.start;
        Some(Symbol { name: demangle(name), offset, address: address - offset, object: Some(path) })
    }

    /// The source line at an address, as a task sees it.
    pub fn line_in(&self, task: &Task, address: u64) -> Option<SourceLine> {
        let (object, _, own) = self.locate(task, address)?;
        object.line(own)
    }

    /// The object at a user address, its path, and its own address for it.
    fn locate(&self, task: &Task, address: u64) -> Option<(Arc<Object>, String, u64)> {
        let mappings = self.mappings(task);
        let after = mappings.partition_point(|mapping| mapping.start <= address);
        mappings.get(after.checked_sub(1)?).filter(|mapping| address < mapping.end)?;
        // Variables without a value in the file are in anonymous memory behind it, or on its last page.
        let mapping = mappings[..after].iter().rev().find(|mapping| mapping.file.is_some())?;
        let path = mapping.file.as_ref()?.path.clone();
        if let Some((object, bias)) = self.loaded(task, &mappings, mapping) {
            let own = address.wrapping_sub(bias);
            return object.has_address(own).then_some((object, path, own));
        }
        // A file of which a part alone is mapped.
        let inside = (address < mapping.end).then(|| address - mapping.start)?;
        let object = self.object(task, mapping)?;
        let own = object.address_of_offset(inside.wrapping_add(mapping.offset))?;
        Some((object, path, own))
    }

    /// The object of which this is a mapping, and what is to be added to its own addresses.
    fn loaded(&self, task: &Task, mappings: &[Mapping], mapping: &Mapping) -> Option<(Arc<Object>, u64)> {
        let object = self.object(task, mapping)?;
        let same = mappings.iter().filter(|other| other.file == mapping.file);
        let bias = object.bias(same.map(|mapping| (mapping.offset, mapping.start)))?;
        Some((object, bias))
    }

    fn symbolize_kernel(&self, address: u64) -> Option<Symbol> {
        let kernel = self.kernel().ok()?;
        let (table, object) = if kernel.image.contains(&address) {
            (&kernel.symbols, None)
        } else {
            let module =
                self.modules().iter().find(|module| module.ranges.iter().any(|range| range.contains(&address)))?;
            (&module.symbols, Some(module.name.clone()))
        };
        let (entry, _) = table.covering(address)?;
        let name = table.name(entry).to_owned();
        Some(Symbol { name, offset: address - entry.address, address: entry.address, object })
    }

    /// Where a name is: in the kernel, its modules, and the programs and libraries of every process. `NAME` or
    /// `OBJECT:NAME`, where OBJECT is `kernel`, a module's name, or the end of a program's path.
    pub fn lookup(&self, name: &str) -> Vec<Place> {
        let (object, name) = match name.rsplit_once(':') {
            // Two colons belong to the name.
            Some((object, name)) if !object.ends_with(':') && !object.is_empty() => (Some(object), name),
            _ => (None, name),
        };
        let mut places = Vec::new();
        let wanted = |candidate: &str| object.is_none_or(|object| candidate == object);
        if let Ok(kernel) = self.kernel()
            && wanted("kernel")
        {
            let text = kernel.symbols.addresses(name).filter(|address| *address >= KERNEL_HALF);
            places.extend(text.map(|address| Place { address, object: None, pid: None }));
        }
        for module in self.modules().iter().filter(|module| wanted(&module.name)) {
            let object = Some(module.name.clone());
            let found = module.symbols.addresses(name);
            places.extend(found.map(|address| Place { address, object: object.clone(), pid: None }));
        }
        let mut seen = std::collections::BTreeSet::new();
        for task in self.processes().unwrap_or_default() {
            if task.mm == 0 || !seen.insert(task.mm) {
                continue;
            }
            let mappings = self.mappings(&task);
            let mut known = std::collections::BTreeSet::new();
            for mapping in mappings.iter() {
                let Some(file) = &mapping.file else { continue };
                if object.is_some_and(|object| file.path != object && !file.path.ends_with(&format!("/{object}"))) {
                    continue;
                }
                if !known.insert(&file.path) {
                    continue;
                }
                let Some((program, bias)) = self.loaded(&task, &mappings, mapping) else { continue };
                for own in program.lookup(name).into_iter().filter(|own| program.has_address(*own)) {
                    let address = own.wrapping_add(bias);
                    places.push(Place { address, object: Some(file.path.clone()), pid: Some(task.pid) });
                }
            }
        }
        places
    }

    /// The stack of the running task, from the vCPU's registers on.
    pub fn backtrace(&self) -> Vec<Frame> {
        self.backtrace_with(self.current_task().ok().as_ref())
    }

    /// The same, for callers that know the running task.
    pub(super) fn backtrace_with(&self, task: Option<&Task>) -> Vec<Frame> {
        self.backtrace_from(task, Registers::of(self.cpu), self.cpu.cpl != 3)
    }

    /// The stack of a task: from where it was put aside if it does not run now.
    pub fn backtrace_of(&self, task: &Task) -> Result<Vec<Frame>, InspectError> {
        if task.current {
            return Ok(self.backtrace_from(Some(task), Registers::of(self.cpu), self.cpu.cpl != 3));
        }
        let kernel = self.kernel()?;
        let layout = kernel.layout()?;
        // `struct inactive_task_frame` (arch/x86/include/asm/switch_to.h).
        let sp = self.space.u64(task.address.wrapping_add(layout.task_sp))?;
        let word = |number: u64| self.space.u64(sp.wrapping_add(8 * number));
        let mut registers = Registers { rip: word(6)?, gpr: [None; 16] };
        for (number, register) in [gpr::R15, gpr::R14, gpr::R13, gpr::R12, gpr::RBX, gpr::RBP].into_iter().enumerate() {
            registers.gpr[register] = Some(word(number as u64)?);
        }
        registers.gpr[gpr::RSP] = Some(sp.wrapping_add(56));
        Ok(self.backtrace_from(Some(task), registers, true))
    }

    /// The registers with which a task last left user mode; None for tasks of the kernel.
    pub fn user_registers(&self, task: &Task) -> Option<Registers> {
        if task.current && self.cpu.cpl == 3 {
            return Some(Registers::of(self.cpu));
        }
        Registers::from_pt_regs(&self.space, self.pt_regs(task)?)
    }

    /// Address of the registers at the top of a task's kernel stack, which has 16 KiB.
    fn pt_regs(&self, task: &Task) -> Option<u64> {
        if task.mm == 0 || task.kernel_thread {
            return None;
        }
        let layout = self.kernel().ok()?.layout().ok()?;
        Some(task.stack.wrapping_add(KERNEL_STACK_BYTES).wrapping_sub(layout.pt_regs_size))
    }

    fn backtrace_from(&self, task: Option<&Task>, registers: Registers, kernel_mode: bool) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut user = Some(registers).filter(|_| !kernel_mode);
        if kernel_mode {
            user = self.kernel_frames(task, registers, &mut frames);
        }
        if let (Some(task), Some(registers)) = (task, user) {
            self.user_frames(task, registers, &mut frames);
        }
        frames
    }

    /// Adds the kernel's frames; returns the registers of user mode, if that is where the kernel was entered from.
    fn kernel_frames(&self, task: Option<&Task>, start: Registers, frames: &mut Vec<Frame>) -> Option<Registers> {
        let top = || task.and_then(|task| self.pt_regs(task));
        let of_user = |place: u64| Registers::from_pt_regs(&self.space, place);
        let kernel = self.kernel().ok();
        let orc = kernel.map(|kernel| Orc { space: &self.space, kernel, modules: self.modules() });
        let (mut registers, mut returning, mut how) = (start, false, How::Exact);
        while frames.len() < FRAMES_MAX {
            frames.push(self.kernel_frame(&registers, returning, how));
            match orc.as_ref().and_then(|orc| orc.step(&registers, returning)) {
                Some(OrcStep::User(place)) => return of_user(place),
                Some(OrcStep::End) => return top().and_then(of_user),
                Some(OrcStep::Caller(caller, called)) if caller.rip >= KERNEL_HALF => {
                    (registers, returning, how) = (caller, called, How::Tables);
                }
                _ => {
                    let Some(caller) = self.scan_kernel_stack(task, &registers) else { break };
                    (registers, returning, how) = (caller, true, How::Guess);
                }
            }
        }
        top().and_then(of_user)
    }

    fn kernel_frame(&self, registers: &Registers, returning: bool, how: How) -> Frame {
        Frame {
            address: registers.rip,
            stack_pointer: registers.gpr[gpr::RSP].unwrap_or(0),
            user: false,
            how,
            symbol: self.symbolize_call(registers.rip, returning, |address| self.symbolize_kernel(address)),
            object: None,
            line: None,
        }
    }

    /// The symbol of a return address is that of the call before it; its offset is kept.
    fn symbolize_call(&self, address: u64, returning: bool, find: impl Fn(u64) -> Option<Symbol>) -> Option<Symbol> {
        let back = u64::from(returning);
        let symbol = find(address.wrapping_sub(back))?;
        Some(Symbol { offset: symbol.offset + back, ..symbol })
    }

    /// The next word on a kernel stack that looks like a return address.
    fn scan_kernel_stack(&self, task: Option<&Task>, registers: &Registers) -> Option<Registers> {
        let kernel = self.kernel().ok()?;
        let sp = registers.gpr[gpr::RSP]?;
        let end = match task {
            Some(task) if sp.wrapping_sub(task.stack) < KERNEL_STACK_BYTES => {
                task.stack.wrapping_add(KERNEL_STACK_BYTES)
            }
            _ => (sp | (KERNEL_STACK_BYTES - 1)).wrapping_add(1),
        };
        let mut at = sp.wrapping_add(7) & !7;
        while at < end {
            let rip = self.space.u64(at).ok()?;
            at = at.wrapping_add(8);
            let module = || self.modules().iter().any(|module| module.ranges.iter().any(|range| range.contains(&rip)));
            if (kernel.text.contains(&rip) || module()) && follows_call(&self.space, rip) {
                let mut caller = Registers { rip, gpr: [None; 16] };
                caller.gpr[gpr::RSP] = Some(at);
                caller.gpr[gpr::RBP] = registers.gpr[gpr::RBP];
                return Some(caller);
            }
        }
        None
    }

    fn user_frames(&self, task: &Task, start: Registers, frames: &mut Vec<Frame>) {
        let mappings = self.mappings(task);
        let object = |mapping: &super::Mapping| self.object(task, mapping);
        let space: AddressSpace = self.space_of(task);
        let mut guesses = 0;
        let unwinder = UserUnwinder { space, mappings: &mappings, object: &object };
        let (mut registers, mut returning, mut how) = (start, false, How::Exact);
        while frames.len() < FRAMES_MAX {
            let symbol = self.symbolize_call(registers.rip, returning, |address| self.symbolize_in(task, address));
            // A signal's frame is entered by an interrupt, not by a call.
            let interrupted = symbol.as_ref().is_some_and(|symbol| symbol.name.contains("restore_rt"));
            frames.push(Frame {
                address: registers.rip,
                stack_pointer: registers.gpr[gpr::RSP].unwrap_or(0),
                user: true,
                how,
                object: unwinder.file(registers.rip.wrapping_sub(u64::from(returning))),
                line: self.line_in(task, registers.rip.wrapping_sub(u64::from(returning))),
                symbol,
            });
            let Some(step) = unwinder.step(&registers, returning && !interrupted) else { break };
            guesses = if step.how == How::Guess { guesses + 1 } else { 0 };
            if guesses > GUESSES_MAX {
                break;
            }
            (registers, how) = (step.caller, step.how);
            returning = !interrupted;
        }
    }
}
