//! The engine of a command that runs guests: what its flags say, with the translations that earlier commands left.

use orrery_cpu::engine::EngineConfig;

use super::args::EngineArgs;
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
    pub fn new(arguments: &EngineArgs, image: &[u8; 32]) -> WarmEngine {
        let cache = (!arguments.no_translation_cache).then(|| TranslationCache::open(image));
        let archive = cache.as_ref().map(TranslationCache::archive);
        WarmEngine { config: EngineConfig { archive, ..arguments.config() }, cache }
    }
}

impl Drop for WarmEngine {
    fn drop(&mut self) {
        if let Some(cache) = &self.cache {
            cache.keep();
        }
    }
}
