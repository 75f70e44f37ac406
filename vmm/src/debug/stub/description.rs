//! The registers that gdb is shown: one table, from which the target description (gdb manual, appendix G) and the
//! numbering follow.

use std::sync::OnceLock;

/// One register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// General-purpose register, by its number in `CpuState::gpr`.
    Gpr(u8),
    /// RIP.
    Rip,
    /// RFLAGS.
    Flags,
    /// Selector of a segment register, by its number in `CpuState::seg`.
    Selector(u8),
    /// ST(n).
    St(u8),
    /// x87 control and status: fctrl, fstat, ftag, fiseg, fioff, foseg, fooff, fop.
    X87(u8),
    /// XMM register.
    Xmm(u8),
    /// MXCSR.
    Mxcsr,
    /// Upper half of a YMM register.
    YmmHigh(u8),
    /// Base of FS (4) or GS (5).
    SegmentBase(u8),
    /// A register of the system feature, by its number in [`SYSTEM`].
    System(u8),
}

/// General registers in gdb's order: name, number in the encoding.
const GENERAL: [(&str, u8); 16] = [
    ("rax", 0),
    ("rbx", 3),
    ("rcx", 1),
    ("rdx", 2),
    ("rsi", 6),
    ("rdi", 7),
    ("rbp", 5),
    ("rsp", 4),
    ("r8", 8),
    ("r9", 9),
    ("r10", 10),
    ("r11", 11),
    ("r12", 12),
    ("r13", 13),
    ("r14", 14),
    ("r15", 15),
];
/// Segment registers in gdb's order: name, number in the encoding.
const SEGMENTS: [(&str, u8); 6] = [("cs", 1), ("ss", 2), ("ds", 3), ("es", 0), ("fs", 4), ("gs", 5)];
const X87_CONTROL: [&str; 8] = ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"];

/// Registers that gdb has no feature for. The last two are not the processor's: where the session stands.
pub const SYSTEM: [&str; 29] = [
    "cr0",
    "cr2",
    "cr3",
    "cr4",
    "xcr0",
    "efer",
    "dr0",
    "dr1",
    "dr2",
    "dr3",
    "dr6",
    "dr7",
    "kernel_gs_base",
    "star",
    "lstar",
    "cstar",
    "sfmask",
    "tsc_aux",
    "sysenter_cs",
    "sysenter_esp",
    "sysenter_eip",
    "pat",
    "misc_enable",
    "gdt_base",
    "idt_base",
    "tr_base",
    "cpl",
    "icount",
    "virtual_ns",
];

impl Register {
    /// Bytes on the wire.
    pub fn size(self) -> usize {
        match self {
            Register::Gpr(_) | Register::Rip | Register::SegmentBase(_) | Register::System(_) => 8,
            Register::Flags | Register::Selector(_) | Register::X87(_) | Register::Mxcsr => 4,
            Register::St(_) => 10,
            Register::Xmm(_) | Register::YmmHigh(_) => 16,
        }
    }
}

struct Description {
    registers: Vec<Register>,
    xml: String,
}

fn description() -> &'static Description {
    static DESCRIPTION: OnceLock<Description> = OnceLock::new();
    DESCRIPTION.get_or_init(build)
}

/// All registers, by gdb's number.
pub fn registers() -> &'static [Register] {
    &description().registers
}

/// The target description.
pub fn xml() -> &'static str {
    &description().xml
}

fn build() -> Description {
    let mut d = Description { registers: Vec::new(), xml: String::new() };
    d.xml.push_str(concat!(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target version=\"1.0\">",
        "<architecture>i386:x86-64</architecture><feature name=\"org.gnu.gdb.i386.core\">",
        "<flags id=\"flags\" size=\"4\">"
    ));
    let flags = [
        ("CF", 0),
        ("PF", 2),
        ("AF", 4),
        ("ZF", 6),
        ("SF", 7),
        ("TF", 8),
        ("IF", 9),
        ("DF", 10),
        ("OF", 11),
        ("NT", 14),
        ("RF", 16),
        ("VM", 17),
        ("AC", 18),
        ("VIF", 19),
        ("VIP", 20),
        ("ID", 21),
    ];
    for (name, bit) in flags {
        d.xml.push_str(&format!("<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>"));
    }
    d.xml.push_str("</flags>");
    for (name, number) in GENERAL {
        let kind = if matches!(name, "rbp" | "rsp") { "data_ptr" } else { "int64" };
        d.add(name, Register::Gpr(number), kind, "general");
    }
    d.add("rip", Register::Rip, "code_ptr", "general");
    d.add("eflags", Register::Flags, "flags", "general");
    for (name, number) in SEGMENTS {
        d.add(name, Register::Selector(number), "int32", "general");
    }
    for number in 0..8 {
        d.add(&format!("st{number}"), Register::St(number), "i387_ext", "float");
    }
    for (number, name) in (0..).zip(X87_CONTROL) {
        d.add(name, Register::X87(number), "int", "float");
    }
    d.xml.push_str(concat!(
        "</feature><feature name=\"org.gnu.gdb.i386.sse\">",
        "<vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/><vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/>",
        "<vector id=\"v16i8\" type=\"int8\" count=\"16\"/><vector id=\"v8i16\" type=\"int16\" count=\"8\"/>",
        "<vector id=\"v4i32\" type=\"int32\" count=\"4\"/><vector id=\"v2i64\" type=\"int64\" count=\"2\"/>",
        "<union id=\"vec128\"><field name=\"v4_float\" type=\"v4f\"/><field name=\"v2_double\" type=\"v2d\"/>",
        "<field name=\"v16_int8\" type=\"v16i8\"/><field name=\"v8_int16\" type=\"v8i16\"/>",
        "<field name=\"v4_int32\" type=\"v4i32\"/><field name=\"v2_int64\" type=\"v2i64\"/>",
        "<field name=\"uint128\" type=\"uint128\"/></union>"
    ));
    for number in 0..16 {
        d.add(&format!("xmm{number}"), Register::Xmm(number), "vec128", "vector");
    }
    d.add("mxcsr", Register::Mxcsr, "int", "vector");
    d.xml.push_str("</feature><feature name=\"org.gnu.gdb.i386.avx\">");
    for number in 0..16 {
        d.add(&format!("ymm{number}h"), Register::YmmHigh(number), "uint128", "vector");
    }
    d.xml.push_str("</feature><feature name=\"org.gnu.gdb.i386.segments\">");
    d.add("fs_base", Register::SegmentBase(4), "int64", "general");
    d.add("gs_base", Register::SegmentBase(5), "int64", "general");
    d.xml.push_str("</feature><feature name=\"org.orrery.system\">");
    for (number, name) in (0..).zip(SYSTEM) {
        d.add(name, Register::System(number), "uint64", "system");
    }
    d.xml.push_str("</feature></target>");
    d
}

impl Description {
    fn add(&mut self, name: &str, register: Register, kind: &str, group: &str) {
        let (number, bits) = (self.registers.len(), register.size() * 8);
        self.xml.push_str(&format!(
            "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\" regnum=\"{number}\" group=\"{group}\"/>"
        ));
        self.registers.push(register);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_that_gdb_knows() {
        let registers = registers();
        assert_eq!(registers[16], Register::Rip);
        assert_eq!(registers[24], Register::St(0));
        assert_eq!(registers[40], Register::Xmm(0));
        assert_eq!(registers[73], Register::SegmentBase(4));
        assert_eq!(registers.len(), 75 + SYSTEM.len());
        assert_eq!(xml().matches("<reg ").count(), registers.len());
    }
}
