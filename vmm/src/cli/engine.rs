//! The engine of a command that runs guests: what its flags say, with the translations that earlier commands left.

use orrery_cpu::engine::{EngineConfig, EngineKind, kvm_available};

use super::args::{EngineArgs, EngineChoice};
use super::exit::{self, Failure};
use crate::translation_cache::TranslationCache;

/// An engine's configuration, and the translation cache behind it. When a command is done with it, what was translated
/// meanwhile is kept for the next one.
pub(super) struct WarmEngine {
    /// For any number of machines of the image.
    pub config: EngineConfig,
    cache: Option<TranslationCache>,
}

impl WarmEngine {
    /// For machines of the image with this hash.
    pub fn new(arguments: &EngineArgs, image: &[u8; 32]) -> Result<WarmEngine, Failure> {
        let mut engine = EngineKind::from(arguments.engine);
        if arguments.engine != EngineChoice::Soft
            && let Err(error) = kvm_available()
        {
            if arguments.engine != EngineChoice::Auto {
                let message = format!(
                    "no virtual machine from KVM: {error}; load a kvm module, get permission for /dev/kvm (group kvm), or use --engine soft"
                );
                return Err(Failure { code: exit::HOST, message });
            }
            eprintln!("orrery: runs in software: {error}");
            engine = EngineKind::Soft;
        }
        let cache = (!arguments.no_translation_cache).then(|| TranslationCache::open(image));
        let archive = cache.as_ref().map(TranslationCache::archive);
        Ok(WarmEngine { config: EngineConfig { archive, engine, ..arguments.config() }, cache })
    }
}

impl Drop for WarmEngine {
    fn drop(&mut self) {
        if let Some(cache) = &self.cache {
            cache.keep();
        }
    }
}
