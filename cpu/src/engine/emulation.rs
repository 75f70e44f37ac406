//! What the emulation of system instructions sees of the engine.

use super::block::Class;
use super::core::Core;
use crate::Icount;
use crate::bus::Bus;
use crate::exception::Exception;
use crate::model::ModelFeatures;
use crate::state::CpuState;
use crate::system::{Flush, Privilege, System};

impl Core {
    fn class_for(&self, privilege: Privilege) -> Class {
        match privilege {
            Privilege::Current => self.current_class(),
            Privilege::Supervisor => Class::Kernel,
        }
    }

    /// Notes that the guest may write to the page from now on, and keeps its past first. Later writes need no notes,
    /// until the pages are taken.
    #[inline]
    pub fn mark_dirty(&mut self, page: u64) {
        if self.t.pages.mark_dirty(page) {
            self.memory.keep(page);
        }
    }

    /// Pages that may have been written since the last call; later writes are seen again.
    pub fn take_dirty(&mut self) -> Vec<u64> {
        let dirty = self.t.pages.take_dirty();
        self.direct_forget_marks();
        self.flush_writes();
        dirty
    }

    /// How many pages [`Core::take_dirty`] would give.
    pub fn dirty_count(&self) -> usize {
        self.t.pages.dirty_count()
    }
}

impl System for Core {
    fn read(
        &mut self,
        _state: &mut CpuState,
        linear: u64,
        data: &mut [u8],
        privilege: Privilege,
    ) -> Result<(), Exception> {
        let class = self.class_for(privilege);
        self.read_linear(linear, data, class)
    }

    fn write(
        &mut self,
        _state: &mut CpuState,
        linear: u64,
        data: &[u8],
        privilege: Privilege,
    ) -> Result<(), Exception> {
        let class = self.class_for(privilege);
        self.write_linear(linear, data, class)
    }

    fn page_pointer(
        &mut self,
        _state: &mut CpuState,
        linear: u64,
        len: usize,
        write: bool,
        privilege: Privilege,
    ) -> Result<Option<*mut u8>, Exception> {
        let class = self.class_for(privilege);
        self.bulk(linear, len, write, class)
    }

    fn flush(&mut self, what: Flush) {
        match what {
            Flush::All => self.flush_tlbs(true),
            Flush::AddressSpace { .. } => self.switch_address_space(),
            Flush::NonGlobal | Flush::Pcid(_) | Flush::PcidPage(..) => {
                self.flush_tlbs(false);
            }
            Flush::Page(linear) => self.flush_page(linear),
        }
    }

    fn bus(&mut self) -> &mut dyn Bus {
        Core::bus(self)
    }

    fn now(&self) -> Icount {
        Core::now(self)
    }

    fn features(&self) -> &ModelFeatures {
        &self.features
    }

    fn patience(&self) -> u32 {
        self.config.patience.max(1)
    }
}
