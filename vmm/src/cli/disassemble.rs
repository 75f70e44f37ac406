//! `orrery disassemble`.

use std::collections::BTreeMap;

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter, SymbolResolver, SymbolResult};
use serde::Serialize;

use super::args::DisassembleArgs;
use super::exit::{self, Failure};
use super::memory::{resolve, space};
use super::place;
use super::ps::{failure, printable};
use crate::inspect::{Inspector, SourceLine, Symbol, Task};

/// Longest instruction, in bytes.
const INSTRUCTION_MAX: usize = 15;

#[derive(Serialize)]
struct Line {
    address: u64,
    bytes: String,
    text: String,
    symbol: Option<Symbol>,
    line: Option<SourceLine>,
}

/// Names for the addresses in instructions.
struct Names<'i, 'm> {
    inspector: &'i Inspector<'m>,
    task: Option<&'i Task>,
}

impl Names<'_, '_> {
    fn symbol(&self, address: u64) -> Option<Symbol> {
        match self.task {
            Some(task) => self.inspector.symbolize_in(task, address),
            None => self.inspector.symbolize(address),
        }
    }
}

/// The names of every address that a stretch of code mentions: the formatter wants a resolver of its own.
struct Mentioned(BTreeMap<u64, (u64, String)>);

impl Mentioned {
    fn in_code(names: &Names, instructions: &[Instruction]) -> Mentioned {
        let mut mentioned = BTreeMap::new();
        for instruction in instructions {
            let mut addresses = vec![instruction.near_branch_target()];
            if instruction.is_ip_rel_memory_operand() {
                addresses.push(instruction.ip_rel_memory_address());
            } else {
                addresses.push(instruction.memory_displacement64());
            }
            addresses.extend((0..instruction.op_count()).filter_map(|operand| instruction.try_immediate(operand).ok()));
            for address in addresses.into_iter().filter(|address| *address > 0xFFFF) {
                if let Some(symbol) = names.symbol(address) {
                    mentioned.insert(address, (symbol.address, printable(&symbol.name)));
                }
            }
        }
        Mentioned(mentioned)
    }
}

impl SymbolResolver for Mentioned {
    fn symbol(&mut self, _: &Instruction, _: u32, _: Option<u32>, address: u64, _: u32) -> Option<SymbolResult<'_>> {
        let (start, name) = self.0.get(&address)?;
        Some(SymbolResult::with_str(*start, name))
    }
}

pub(super) fn disassemble(arguments: DisassembleArgs) -> Result<u8, Failure> {
    let (_place, moment) = place::open(&arguments.at)?;
    let machine = &moment.machine;
    let inspector = Inspector::new(machine);
    let task = match arguments.pid {
        Some(pid) => Some(inspector.task(pid).map_err(failure)?),
        None => inspector.current_task().ok(),
    };
    let space = space(&inspector, arguments.pid, false)?;
    let start = match &arguments.address {
        Some(address) => resolve(&inspector, address)?,
        None => machine.cpu().rip,
    };
    let names = Names { inspector: &inspector, task: task.as_ref() };
    let bytes = space.read_up_to(start, arguments.count as usize * INSTRUCTION_MAX);
    if bytes.is_empty() {
        let error = space.read(start, &mut [0]).expect_err("nothing could be read");
        return Err(Failure::new(exit::INSPECT, error));
    }
    let bits = bitness(machine.cpu());
    let decoder = Decoder::with_ip(bits, &bytes, start, DecoderOptions::NONE);
    let instructions: Vec<Instruction> = decoder.into_iter().take(arguments.count as usize).collect();
    let mut formatter = IntelFormatter::with_options(Some(Box::new(Mentioned::in_code(&names, &instructions))), None);
    formatter.options_mut().set_space_after_operand_separator(true);
    let mut lines = Vec::new();
    for instruction in &instructions {
        let mut text = String::new();
        formatter.format(instruction, &mut text);
        let address = instruction.ip();
        let at = (address.wrapping_sub(start)) as usize;
        lines.push(Line {
            address,
            bytes: bytes[at..at + instruction.len()].iter().map(|byte| format!("{byte:02x}")).collect(),
            text,
            symbol: names.symbol(address),
            line: task.as_ref().and_then(|task| inspector.line_in(task, address)),
        });
    }
    if arguments.json {
        super::say(serde_json::to_string(&lines).expect("lines are plain data"));
        return Ok(0);
    }
    let (mut function, mut source) = (None, None);
    for line in &lines {
        if let Some(symbol) = &line.symbol
            && function != Some(symbol.address)
        {
            function = Some(symbol.address);
            say!("{}:", printable(&symbol.to_string()));
        }
        if line.line.is_some() && line.line != source {
            source = line.line.clone();
            say!("  ; {}", source.as_ref().map_or(String::new(), |line| printable(&line.to_string())));
        }
        let mark = if line.address == machine.cpu().rip { "=>" } else { "  " };
        say!("{mark} {:016x}  {:<30} {}", line.address, line.bytes, line.text);
    }
    Ok(0)
}

/// 16, 32 or 64, as the vCPU would decode.
fn bitness(cpu: &orrery_cpu::CpuState) -> u32 {
    match &cpu.seg[orrery_cpu::state::seg::CS] {
        _ if cpu.is_64bit() => 64,
        segment if segment.default_big() => 32,
        _ => 16,
    }
}
