//! Processor exceptions (Intel SDM volume 3, chapter 6).

/// An exception to be delivered through the IDT, with what it pushes and records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Exception {
    DivideError,
    /// #DB; the bits to set in DR6.
    Debug {
        dr6: u64,
    },
    Breakpoint,
    Overflow,
    BoundRange,
    InvalidOpcode,
    DeviceNotAvailable,
    DoubleFault,
    InvalidTss {
        error: u32,
    },
    SegmentNotPresent {
        error: u32,
    },
    StackFault {
        error: u32,
    },
    GeneralProtection {
        error: u32,
    },
    /// #PF; `address` goes to CR2.
    PageFault {
        address: u64,
        error: u32,
    },
    /// #MF
    FloatingPoint,
    AlignmentCheck,
    /// #XM
    Simd,
}

impl Exception {
    /// #GP(0)
    pub const GP0: Exception = Exception::GeneralProtection { error: 0 };

    /// The vector in the IDT.
    pub fn vector(self) -> u8 {
        match self {
            Exception::DivideError => 0,
            Exception::Debug { .. } => 1,
            Exception::Breakpoint => 3,
            Exception::Overflow => 4,
            Exception::BoundRange => 5,
            Exception::InvalidOpcode => 6,
            Exception::DeviceNotAvailable => 7,
            Exception::DoubleFault => 8,
            Exception::InvalidTss { .. } => 10,
            Exception::SegmentNotPresent { .. } => 11,
            Exception::StackFault { .. } => 12,
            Exception::GeneralProtection { .. } => 13,
            Exception::PageFault { .. } => 14,
            Exception::FloatingPoint => 16,
            Exception::AlignmentCheck => 17,
            Exception::Simd => 19,
        }
    }

    /// The error code pushed on the handler's stack, for the exceptions that have one.
    pub fn error_code(self) -> Option<u32> {
        match self {
            Exception::DoubleFault | Exception::AlignmentCheck => Some(0),
            Exception::InvalidTss { error }
            | Exception::SegmentNotPresent { error }
            | Exception::StackFault { error }
            | Exception::GeneralProtection { error }
            | Exception::PageFault { error, .. } => Some(error),
            _ => None,
        }
    }
}
