//! What host registers hold while a block is emitted: scratch registers, homes, residents.

use super::*;

/// What a scratch register is known to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Holds {
    /// A guest register that lives in the vCPU block.
    Guest(u8),
    /// The host address of a group's range.
    Group(usize),
}

/// What RAX and RCX are known to hold between instructions.
#[derive(Clone, Copy, Default)]
pub(super) struct ScratchRegisters {
    pub(super) rax: Option<Holds>,
    pub(super) rcx: Option<Holds>,
}

impl ScratchRegisters {
    pub(super) fn of(&mut self, register: u8) -> Option<&mut Option<Holds>> {
        match register {
            host::RAX => Some(&mut self.rax),
            host::RCX => Some(&mut self.rcx),
            _ => None,
        }
    }

    pub(super) fn forget(&mut self, register: u8) {
        self.set(register, None);
    }

    pub(super) fn set(&mut self, register: u8, holds: Option<Holds>) {
        if let Some(known) = self.of(register) {
            *known = holds;
        }
    }

    /// The guest register has another value now.
    pub(super) fn changed(&mut self, guest: u8) {
        for known in [&mut self.rax, &mut self.rcx] {
            if *known == Some(Holds::Guest(guest)) {
                *known = None;
            }
        }
    }

    /// A register that holds the guest register.
    pub(super) fn find(&self, guest: u8) -> Option<u8> {
        let wanted = Some(Holds::Guest(guest));
        if self.rax == wanted {
            Some(host::RAX)
        } else if self.rcx == wanted {
            Some(host::RCX)
        } else {
            None
        }
    }
}

impl Translator {
    /// Gives the block's residents their homes.
    pub(super) fn settle_in(&mut self) {
        self.emit_settle_in();
        for resident in self.residents.into_iter().flatten() {
            if let Some(owner) = resident.owner() {
                self.home[owner] = None;
            }
            self.home[resident.guest as usize] = Some(resident.host);
        }
        self.inhabited = self.cold.len()..usize::MAX;
    }

    pub(super) fn emit_settle_in(&mut self) {
        for (number, resident) in self.residents.into_iter().flatten().enumerate() {
            if resident.host != host::DISTANCE {
                self.a.store_field(resident.host, field::evicted(number));
            }
            self.a.load_field(resident.host, field::homeless(resident.guest));
        }
    }

    /// Before the block ends: all registers go back to where they always are.
    pub(super) fn move_out(&mut self) {
        let moving = self.residents.iter().flatten().fold(0, |mask, resident| mask | 1 << resident.guest);
        if self.source_reads(moving) {
            if self.flags == Flags::Source {
                self.save_flags();
            }
            self.source = None;
        }
        self.emit_move_out();
        self.home = HOME;
        self.inhabited.end = self.cold.len();
    }

    /// Leaves the flags alone.
    pub(super) fn emit_move_out(&mut self) {
        for (number, resident) in self.residents.into_iter().flatten().enumerate() {
            self.a.store_field(resident.host, field::homeless(resident.guest));
            let owner = if resident.host == host::DISTANCE { field::WINDOW_DISTANCE } else { field::evicted(number) };
            self.a.load_field(resident.host, owner);
        }
    }

    /// The residents that are in at this point.
    pub(in crate::engine) fn residents_here(&self) -> Residents {
        if self.inhabited.end == usize::MAX { self.residents } else { Residents::default() }
    }

    /// Host registers that residents live in at this point, as a bit mask.
    pub(super) fn inhabited_here(&self) -> u32 {
        self.residents_here().iter().flatten().fold(0, |mask, resident| mask | 1 << resident.host)
    }

    /// Loads a guest register, whole, into a host register.
    pub(in crate::engine) fn fetch(&mut self, dst: u8, guest: u8) {
        match self.home[guest as usize] {
            Some(home) => self.a.mov(dst, home),
            None => self.a.load_field(dst, field::homeless(guest)),
        }
    }

    /// Gives a guest register the value of a host register.
    pub(super) fn put(&mut self, guest: u8, from: u8) {
        match self.home[guest as usize] {
            Some(home) => self.a.mov(home, from),
            None => self.a.store_field(from, field::homeless(guest)),
        }
    }

    /// A host register that holds the guest register: its home, or `scratch` after loading it.
    pub(in crate::engine) fn held(&mut self, guest: u8, scratch: u8) -> u8 {
        if let Some(home) = self.home[guest as usize] {
            return home;
        }
        match self.scratch.find(guest) {
            Some(register) if register == scratch => {}
            Some(register) => self.a.mov(scratch, register),
            None => self.a.load_field(scratch, field::homeless(guest)),
        }
        self.scratch.set(scratch, Some(Holds::Guest(guest)));
        scratch
    }
}
