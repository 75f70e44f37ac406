//! The SHA instructions with a memory operand (Intel SDM volume 2). With registers the host executes them; of memory,
//! some processors want it aligned, and others, like the model, do not care.

use super::masked::{read_vector, vector_number, write_vector};
use super::operand::address;
use super::{Executed, Privilege, System, UD, alignment, retire};
use crate::state::CpuState;
use iced_x86::{Instruction, Mnemonic};

/// Four doublewords, the lowest first.
type Words = [u32; 4];

fn words(bytes: &[u8]) -> Words {
    std::array::from_fn(|n| u32::from_le_bytes([bytes[4 * n], bytes[4 * n + 1], bytes[4 * n + 2], bytes[4 * n + 3]]))
}

fn choose(x: u32, y: u32, z: u32) -> u32 {
    x & y ^ !x & z
}

fn majority(x: u32, y: u32, z: u32) -> u32 {
    x & y ^ x & z ^ y & z
}

fn sha1_rounds(state: Words, message: Words, function: u8) -> Words {
    let [mut d, mut c, mut b, mut a] = state;
    let mut e = 0u32;
    for word in message.into_iter().rev() {
        let (mixed, constant) = match function & 3 {
            0 => (choose(b, c, d), 0x5A82_7999u32),
            1 => (b ^ c ^ d, 0x6ED9_EBA1),
            2 => (majority(b, c, d), 0x8F1B_BCDC),
            _ => (b ^ c ^ d, 0xCA62_C1D6),
        };
        let next = mixed.wrapping_add(a.rotate_left(5)).wrapping_add(word).wrapping_add(e).wrapping_add(constant);
        (a, b, c, d, e) = (next, a, b.rotate_left(30), c, d);
    }
    [d, c, b, a]
}

fn sha1_message_2(target: Words, source: Words) -> Words {
    let w16 = (target[3] ^ source[2]).rotate_left(1);
    let w17 = (target[2] ^ source[1]).rotate_left(1);
    let w18 = (target[1] ^ source[0]).rotate_left(1);
    [(target[0] ^ w16).rotate_left(1), w18, w17, w16]
}

fn sha256_rounds(target: Words, source: Words, keys: Words) -> Words {
    let [mut f, mut e, mut b, mut a] = source;
    let [mut h, mut g, mut d, mut c] = target;
    for key in &keys[..2] {
        let sigma1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let sigma0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let first = choose(e, f, g).wrapping_add(sigma1).wrapping_add(*key).wrapping_add(h);
        let second = majority(a, b, c).wrapping_add(sigma0);
        (a, b, c, d, e, f, g, h) = (first.wrapping_add(second), a, b, c, first.wrapping_add(d), e, f, g);
    }
    [f, e, b, a]
}

fn small_sigma_0(x: u32) -> u32 {
    x.rotate_right(7) ^ x.rotate_right(18) ^ x >> 3
}

fn small_sigma_1(x: u32) -> u32 {
    x.rotate_right(17) ^ x.rotate_right(19) ^ x >> 10
}

fn sha256_message_2(target: Words, source: Words) -> Words {
    let w16 = target[0].wrapping_add(small_sigma_1(source[2]));
    let w17 = target[1].wrapping_add(small_sigma_1(source[3]));
    let w18 = target[2].wrapping_add(small_sigma_1(w16));
    [w16, w17, w18, target[3].wrapping_add(small_sigma_1(w17))]
}

/// SHA1*, SHA256* of a memory operand, aligned or not.
pub(super) fn execute(state: &mut CpuState, instr: &Instruction, sys: &mut dyn System) -> Executed {
    let at = address(state, instr, 16, false)?;
    alignment::check(state, at, 16)?;
    let mut bytes = [0; 16];
    sys.read(state, at, &mut bytes, Privilege::Current)?;
    let source = words(&bytes);
    let number = vector_number(instr.op0_register());
    let mut vector = read_vector(state, number);
    let target = words(&vector);
    let [t0, t1, t2, t3] = target;
    let result = match instr.mnemonic() {
        Mnemonic::Sha1rnds4 => sha1_rounds(target, source, instr.immediate8()),
        Mnemonic::Sha1nexte => [source[0], source[1], source[2], source[3].wrapping_add(t3.rotate_left(30))],
        Mnemonic::Sha1msg1 => [source[2] ^ t0, source[3] ^ t1, t0 ^ t2, t1 ^ t3],
        Mnemonic::Sha1msg2 => sha1_message_2(target, source),
        Mnemonic::Sha256rnds2 => sha256_rounds(target, source, words(&read_vector(state, 0))),
        Mnemonic::Sha256msg1 => {
            let next = [t1, t2, t3, source[0]];
            std::array::from_fn(|n| target[n].wrapping_add(small_sigma_0(next[n])))
        }
        Mnemonic::Sha256msg2 => sha256_message_2(target, source),
        _ => return Err(UD),
    };
    for (chunk, word) in vector.chunks_exact_mut(4).zip(result) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    write_vector(state, number, &vector);
    retire(state, instr)
}
