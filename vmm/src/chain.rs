//! The hash chain of a run: one link per epoch, each over the link before it and the complete state.

use orrery_cpu::{CpuState, Icount};
use serde::{Deserialize, Serialize};

/// Default length of an epoch, in instructions. Hashing beside a guest that writes much costs it a tenth of its speed if
/// epochs are four times as short.
pub const EPOCH_INSTRUCTIONS: u64 = 1 << 30;

/// A BLAKE3 hash, shown as 64 hexadecimal digits.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 32]);

impl std::fmt::Display for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// Text that is not 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a hash of 64 hexadecimal digits")]
pub struct HashTextError {
    text: String,
}

impl std::str::FromStr for Hash {
    type Err = HashTextError;
    fn from_str(text: &str) -> Result<Hash, HashTextError> {
        let wrong = || HashTextError { text: text.to_owned() };
        if text.len() != 64 || !text.is_ascii() {
            return Err(wrong());
        }
        let mut hash = Hash::default();
        for (byte, digits) in hash.0.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(hash)
    }
}

impl Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Hash, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One link of the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// The moment: a multiple of the epoch's length, or the last moment of the run.
    pub icount: u64,
    /// Hash of the complete state at that moment.
    pub state: Hash,
    /// BLAKE3 over the previous link (zeros before the first) and `state`.
    pub link: Hash,
}

/// Builds the links of a chain.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    last: Hash,
}

impl Chain {
    /// The chain whose last link is this one.
    pub fn after(last: Option<&Link>) -> Chain {
        Chain { last: last.map(|link| link.link).unwrap_or_default() }
    }

    /// Appends the state at a moment.
    pub fn append(&mut self, icount: Icount, state: Hash) -> Link {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"orrery link 1");
        hasher.update(&self.last.0);
        hasher.update(&state.0);
        self.last = Hash(*hasher.finalize().as_bytes());
        Link { icount: icount.0, state, link: self.last }
    }
}

/// Feeds the vCPU's state to a hasher, field by field in the order of declaration, little-endian.
pub fn hash_cpu(hasher: &mut blake3::Hasher, state: &CpuState) {
    // Destructured in full, so that a new field cannot be forgotten here.
    let CpuState {
        gpr,
        rip,
        rflags,
        seg,
        ldtr,
        tr,
        gdtr,
        idtr,
        cr0,
        cr2,
        cr3,
        cr4,
        dr,
        xcr0,
        efer,
        star,
        lstar,
        cstar,
        sfmask,
        kernel_gs_base,
        tsc_aux,
        sysenter_cs,
        sysenter_esp,
        sysenter_eip,
        pat,
        misc_enable,
        mtrr_def_type,
        mtrr_variable,
        mtrr_fixed,
        tsc_offset,
        tsc_adjust,
        spec_ctrl,
        cpl,
        interrupt_shadow,
        nmi_blocked,
        halted,
        fpu,
    } = state;
    let mut word = |value: u64| {
        hasher.update(&value.to_le_bytes());
    };
    gpr.iter().for_each(|v| word(*v));
    word(*rip);
    word(*rflags);
    for segment in seg.iter().chain([ldtr, tr]) {
        word(segment.base);
        word(u64::from(segment.limit) | u64::from(segment.selector) << 32 | u64::from(segment.attributes) << 48);
    }
    for table in [gdtr, idtr] {
        word(table.base);
        word(u64::from(table.limit));
    }
    [cr0, cr2, cr3, cr4].into_iter().for_each(|v| word(*v));
    dr.iter().for_each(|v| word(*v));
    let msrs = [
        xcr0,
        efer,
        star,
        lstar,
        cstar,
        sfmask,
        kernel_gs_base,
        tsc_aux,
        sysenter_cs,
        sysenter_esp,
        sysenter_eip,
        pat,
        misc_enable,
        mtrr_def_type,
    ];
    msrs.into_iter().for_each(|v| word(*v));
    mtrr_variable.iter().chain(mtrr_fixed).for_each(|v| word(*v));
    word(*tsc_offset);
    word(*tsc_adjust);
    word(*spec_ctrl);
    word(
        u64::from(*cpl) | u64::from(*interrupt_shadow) << 8 | u64::from(*nmi_blocked) << 16 | u64::from(*halted) << 24,
    );
    hasher.update(&fpu.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_survive_text() {
        let hash = Hash(*blake3::hash(b"x").as_bytes());
        assert_eq!(hash.to_string().parse::<Hash>().unwrap(), hash);
        assert!("zz".parse::<Hash>().is_err());
        assert!("é".repeat(32).parse::<Hash>().is_err());
    }

    #[test]
    fn links_depend_on_the_past() {
        let (mut a, mut b) = (Chain::default(), Chain::default());
        a.append(Icount(1), Hash([1; 32]));
        b.append(Icount(1), Hash([2; 32]));
        assert_ne!(a.append(Icount(2), Hash([3; 32])).link, b.append(Icount(2), Hash([3; 32])).link);
    }
}
