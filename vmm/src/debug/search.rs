//! Questions about a run: who wrote this last, when was this executed, what happened between two moments.

use orrery_cpu::engine::{Accessor, Hit, Observation};
use serde::Serialize;

use super::session::{Session, Watcher};
use super::watch::{Wanted, WatchKind, Watched, What};
use super::{DebugError, memory, place};

/// Most bytes that one question about memory covers.
pub const BYTES_MAX: u64 = 4096;

/// The last write to some bytes before a moment.
#[derive(Clone, Debug, Serialize)]
pub struct LastWrite {
    /// Instructions retired before the one that wrote: `RUN@ICOUNT` stands right before it.
    pub icount: u64,
    /// Virtual time there, in nanoseconds.
    pub virtual_ns: u64,
    /// Address of the instruction; for a device, of the one that came next.
    pub rip: u64,
    /// Its symbol, if it is known.
    pub symbol: Option<String>,
    /// The instruction as text.
    pub instruction: String,
    /// "processor", "page-walk" or "device".
    pub by: &'static str,
    /// The process that ran: its id and name.
    pub process: Option<(i32, String)>,
    /// Guest-physical address of the write.
    pub gpa: u64,
    /// Linear address of the write, if it had one.
    pub linear: Option<u64>,
    /// Bytes that the instruction wrote there.
    pub size: u64,
    /// What the asked-for bytes were before, in hexadecimal, in the order of memory.
    pub before: String,
    /// What they were after.
    pub after: String,
}

/// Finds the last write before the present to the memory that `address` is mapped to now, through whichever address
/// it was written. None if nothing has written it since power-on: then it was loaded with the image, or is zero. The
/// session stands before the write afterwards.
pub fn last_write(
    session: &mut Session,
    address: u64,
    size: u64,
    watcher: Watcher,
) -> Result<Option<LastWrite>, DebugError> {
    let size = size.clamp(1, BYTES_MAX);
    let now = session.position().icount;
    let (ram, cpu) = (&session.machine().board().memory, session.machine().cpu());
    let mut pieces = Vec::new();
    for (at, len) in memory::pages(address, size) {
        let gpa = memory::translate(ram, cpu, at).ok_or(DebugError::NotMapped { address: at, icount: now })?;
        pieces.push((gpa, len));
    }
    let watched = |&(address, size): &(u64, u64)| Watched::Physical { address, size, kind: WatchKind::Write };
    let wanted = Wanted { watched: pieces.iter().map(watched).collect(), ..Wanted::default() };
    let Some(event) = session.last_before(&wanted, watcher)? else { return Ok(None) };
    let What::Access { rip, linear, gpa, size, accessor, .. } = event.what else { return Ok(None) };
    let bytes = |session: &Session| -> String {
        use vm_memory::{Bytes, GuestAddress};
        let mut text = String::new();
        for (gpa, len) in &pieces {
            let mut data = vec![0u8; *len as usize];
            if session.machine().board().memory.read_slice(&mut data, GuestAddress(*gpa)).is_ok() {
                text.extend(data.iter().map(|byte| format!("{byte:02x}")));
            }
        }
        text
    };
    session.go_to(event.icount + 1, watcher)?;
    let after = bytes(session);
    session.go_to(event.icount, watcher)?;
    let before = bytes(session);
    let inspector = session.inspector();
    Ok(Some(LastWrite {
        icount: event.icount,
        virtual_ns: session.machine().time().0,
        rip,
        symbol: inspector.symbolize(rip).map(|symbol| symbol.to_string()),
        instruction: place::disassemble(session.machine(), rip).0,
        by: match accessor {
            Accessor::Processor => "processor",
            Accessor::PageWalk => "page-walk",
            Accessor::Device => "device",
        },
        process: inspector.current_process().ok().map(|task| (task.tid, task.name)),
        gpa,
        linear,
        size,
        before,
        after,
    }))
}

/// One execution of an instruction.
#[derive(Clone, Debug, Serialize)]
pub struct Execution {
    /// Instructions retired before it.
    pub icount: u64,
    /// Its address.
    pub rip: u64,
}

/// Calls `each` for every execution of the instructions at `addresses` from the present to `until`, in order, until
/// it says false.
pub fn executions(
    session: &mut Session,
    addresses: &[u64],
    until: u64,
    watcher: Watcher,
    mut each: impl FnMut(Execution) -> bool,
) -> Result<(), DebugError> {
    let observation = Observation { executions: addresses.to_vec(), ..Observation::default() };
    session.gather(until, &observation, watcher, |_, hit| match hit {
        Hit::Execution { icount, rip } => each(Execution { icount: icount.0, rip }),
        _ => true,
    })
}

/// What a traced instruction does to the flow of control.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flow {
    /// On to the next one, or a branch.
    Plain,
    /// A call.
    Call,
    /// A return from one.
    Return,
    /// Into the kernel by an instruction.
    SystemCall,
    /// Back from the kernel, or from an interrupt or exception.
    SystemReturn,
    /// An interrupt or exception came before this instruction.
    Interrupted,
}

/// One instruction of a trace.
#[derive(Clone, Debug, Serialize)]
pub struct Traced {
    /// Instructions retired before it.
    pub icount: u64,
    /// Its address.
    pub rip: u64,
    /// The function it is in, if it is known.
    pub symbol: Option<String>,
    /// The instruction as text.
    pub instruction: String,
    /// What it does to the flow of control.
    pub flow: Flow,
    /// Where control goes after it.
    pub target: u64,
    /// The function there, for calls and returns.
    pub target_symbol: Option<String>,
    /// Privilege level after it.
    pub cpl: u8,
}

/// Symbols that a trace remembers.
const SYMBOLS_MAX: usize = 1 << 16;

/// Calls `each` for every instruction from the present to `until`, in order, until it says false. Needs memory for
/// the names of functions alone.
pub fn trace(
    session: &mut Session,
    until: u64,
    watcher: Watcher,
    mut each: impl FnMut(Traced) -> bool,
) -> Result<(), DebugError> {
    let cache = session.cache();
    let observation = Observation { every_execution: true, ..Observation::default() };
    let mut symbols: std::collections::BTreeMap<(u64, u64), Option<String>> = Default::default();
    let mut expected = session.machine().cpu().rip;
    session.gather(until, &observation, watcher, |machine, hit| {
        let Hit::Execution { icount, rip } = hit else { return true };
        let cpu = machine.cpu();
        let mut symbol = |address: u64| -> Option<String> {
            let root = if address >> 63 == 0 { cpu.cr3 } else { 0 };
            if symbols.len() >= SYMBOLS_MAX {
                symbols.clear();
            }
            let inspect = || {
                let inspector = crate::inspect::Inspector::with_cache(machine, &cache);
                inspector.symbolize(address).map(|symbol| symbol.to_string())
            };
            symbols.entry((root, address)).or_insert_with(inspect).clone()
        };
        let (instruction, _) = place::disassemble(machine, rip);
        let flow = if rip != expected { Flow::Interrupted } else { flow_of(&instruction) };
        let transfers = matches!(flow, Flow::Call | Flow::Return | Flow::SystemCall | Flow::SystemReturn);
        let traced = Traced {
            icount: icount.0,
            rip,
            symbol: symbol(rip),
            instruction,
            flow,
            target: cpu.rip,
            target_symbol: transfers.then(|| symbol(cpu.rip)).flatten(),
            cpl: cpu.cpl,
        };
        expected = cpu.rip;
        each(traced)
    })
}

fn flow_of(instruction: &str) -> Flow {
    match instruction.split_whitespace().next().unwrap_or_default() {
        "call" => Flow::Call,
        "ret" | "retf" => Flow::Return,
        "syscall" | "sysenter" | "int" | "int3" | "into" => Flow::SystemCall,
        "sysret" | "sysretq" | "sysexit" | "sysexitq" | "iret" | "iretd" | "iretq" => Flow::SystemReturn,
        _ => Flow::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flow_is_told_by_the_mnemonic() {
        assert_eq!(flow_of("call 0x1000"), Flow::Call);
        assert_eq!(flow_of("ret"), Flow::Return);
        assert_eq!(flow_of("iretq"), Flow::SystemReturn);
        assert_eq!(flow_of("syscall"), Flow::SystemCall);
        assert_eq!(flow_of("calls"), Flow::Plain);
        assert_eq!(flow_of(""), Flow::Plain);
    }
}
