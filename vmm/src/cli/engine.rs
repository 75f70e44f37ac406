//! The engine of a command that runs guests: what its flags say, with the translations that earlier commands left.

use std::sync::{Arc, OnceLock};

use orrery_cpu::engine::{EngineConfig, EngineKind, KvmError, kvm_available};

use super::args::{EngineArgs, EngineChoice};
use super::exit::{self, Failure};
use crate::translation_cache::TranslationCache;

/// An engine's configuration, and the translation cache behind it. When a command is done with it, what was translated
/// meanwhile is kept for the next one, and it is said, once, if KVM has failed.
pub(super) struct WarmEngine {
    /// For any number of machines of the image.
    pub config: EngineConfig,
    cache: Option<TranslationCache>,
    /// Why one of the machines has gone on without a virtual machine.
    kvm_failure: Arc<OnceLock<KvmError>>,
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
        let kvm_failure = Arc::<OnceLock<KvmError>>::default();
        let noted = Some(Arc::clone(&kvm_failure));
        let config = EngineConfig { archive, engine, kvm_failure: noted, ..arguments.config() };
        Ok(WarmEngine { config, cache, kvm_failure })
    }
}

impl Drop for WarmEngine {
    fn drop(&mut self) {
        if let Some(cache) = &self.cache {
            cache.keep();
        }
        if let Some(error) = self.kvm_failure.get() {
            eprintln!("orrery: the virtual machine for user code failed, and all went on in software: {error}");
        }
    }
}
