//! When to go into the virtual machine. Nothing that is decided here can change a state or a hash.

use super::super::EngineKind;
use super::super::core::Core;

/// What is known of how the two ways of working do.
#[derive(Default)]
pub struct Policy {
    random: u64,
}

impl Core {
    /// The engine that was asked for, or the one that promises more, is the VM.
    pub fn policy_wants(&mut self) -> bool {
        match self.config.engine {
            EngineKind::Soft => false,
            EngineKind::Kvm | EngineKind::Auto => true,
            EngineKind::Random => {
                self.policy.random =
                    self.policy.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                self.policy.random >> 62 == 0
            }
        }
    }
}
