//! Moving a machine to another engine in mid-run.

use orrery_cpu::engine::{Engine, EngineConfig, EngineError};

use super::Machine;

impl Machine {
    /// Goes on in a new engine that works in this way and has translated nothing yet. The guest cannot notice;
    /// who observes the machine must ask again.
    pub fn change_engine(&mut self, config: EngineConfig) -> Result<(), EngineError> {
        self.settle_hash();
        // The old engine alone knows what it has let the guest write.
        self.collect_dirty();
        let mut engine = Engine::new(self.board.memory.clone(), super::devices::model_features(&self.config), config)?;
        *engine.state_mut() = self.engine.state().clone();
        engine.set_icount(self.engine.icount());
        engine.state_replaced();
        *self.engine = engine;
        self.keep_engine();
        Ok(())
    }
}
