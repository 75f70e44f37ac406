//! The kernel's types: where the members of its structures are. Linux carries them in its read-only data as BTF
//! (Documentation/bpf/btf.rst), so that offsets are right for any kernel and any configuration.

use std::collections::BTreeMap;

/// Most bytes of type information that are believed.
pub const BTF_MAX: usize = 64 << 20;
/// Bytes of the header, as far as it is read.
const HEADER_BYTES: usize = 24;
const MAGIC: u16 = 0xEB9F;
/// Most types looked through between a name and what it stands for.
const CHAIN_MAX: usize = 32;
/// Most nested structures without a name.
const DEPTH_MAX: usize = 16;

/// Type information that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// No type information there.
    #[error("the kernel's type information does not begin with its magic number")]
    Magic,
    /// It ends too early or contradicts itself.
    #[error("the kernel's type information is damaged at byte {at:#x}")]
    Damaged {
        /// Offset.
        at: usize,
    },
    /// A structure is not described.
    #[error("the kernel has no type {name}")]
    NoType {
        /// Its name.
        name: String,
    },
    /// A structure lacks a member.
    #[error("the kernel's {name} has no member {member}")]
    NoMember {
        /// The structure.
        name: String,
        /// The member that was looked for.
        member: String,
    },
}

/// A member of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bits from the start of the structure.
    pub bit_offset: u32,
    /// Bits of a bit field; 0 if it is none.
    pub bit_size: u32,
    /// The member's type.
    pub type_id: u32,
    /// Bytes of the member's type.
    pub size: u64,
}

impl Member {
    /// Bytes from the start of the structure.
    pub fn offset(&self) -> u64 {
        u64::from(self.bit_offset / 8)
    }
}

mod kind {
    pub const INT: u32 = 1;
    pub const PTR: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FWD: u32 = 7;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const FUNC: u32 = 12;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const FLOAT: u32 = 16;
    pub const DECL_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
}

/// The types of a kernel.
#[derive(Clone, Debug)]
pub struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    /// Where each type begins in `types`, by id; id 0 is void.
    index: Vec<u32>,
    /// Structures and unions by name: the first of each.
    structures: BTreeMap<Box<[u8]>, u32>,
}

/// One type's fixed part.
#[derive(Clone, Copy)]
struct Head {
    name: u32,
    kind: u32,
    len: usize,
    flag: bool,
    /// Bytes of the type, or the id of the type that it refers to.
    size_or_type: u32,
    /// Where what follows begins.
    body: usize,
}

impl Btf {
    /// Bytes of the whole, as its header says, if this is a header.
    pub fn extent(bytes: &[u8]) -> Option<usize> {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize);
        if bytes.get(..3)? != [MAGIC.to_le_bytes()[0], MAGIC.to_le_bytes()[1], 1] || word(4)? < HEADER_BYTES {
            return None;
        }
        let types = word(8)?.checked_add(word(12)?)?;
        let strings = word(16)?.checked_add(word(20)?)?;
        let extent = word(4)?.checked_add(types.max(strings))?;
        (extent <= BTF_MAX && word(12)? > 0 && word(20)? > 0).then_some(extent)
    }

    /// Reads type information that begins with its header.
    pub fn parse(bytes: &[u8]) -> Result<Btf, BtfError> {
        Btf::extent(bytes).ok_or(BtfError::Magic)?;
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
        let part = |offset: usize, len: usize| {
            let start = word(4) + offset;
            bytes.get(start..start + len).ok_or(BtfError::Damaged { at: start }).map(<[u8]>::to_vec)
        };
        let mut btf = Btf {
            types: part(word(8), word(12))?,
            strings: part(word(16), word(20))?,
            index: vec![0],
            structures: BTreeMap::new(),
        };
        let mut at = 0;
        while at < btf.types.len() {
            let head = btf.head(at).ok_or(BtfError::Damaged { at })?;
            let body = match head.kind {
                kind::INT | kind::VAR | kind::DECL_TAG => 4,
                kind::ARRAY => 12,
                kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * head.len,
                kind::ENUM | kind::FUNC_PROTO => 8 * head.len,
                kind::PTR
                | kind::FWD
                | kind::TYPEDEF
                | kind::VOLATILE
                | kind::CONST
                | kind::RESTRICT
                | kind::FUNC
                | kind::FLOAT
                | kind::TYPE_TAG => 0,
                _ => return Err(BtfError::Damaged { at }),
            };
            if matches!(head.kind, kind::STRUCT | kind::UNION) && head.name != 0 {
                let name = btf.string(head.name).into();
                btf.structures.entry(name).or_insert(btf.index.len() as u32);
            }
            btf.index.push(at as u32);
            at = head.body + body;
        }
        if at != btf.types.len() {
            return Err(BtfError::Damaged { at });
        }
        Ok(btf)
    }

    fn word(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.types.get(at..at.checked_add(4)?)?.try_into().ok()?))
    }

    fn head(&self, at: usize) -> Option<Head> {
        let info = self.word(at + 4)?;
        Some(Head {
            name: self.word(at)?,
            kind: info >> 24 & 0x1F,
            len: (info & 0xFFFF) as usize,
            flag: info >> 31 != 0,
            size_or_type: self.word(at + 8)?,
            body: at + 12,
        })
    }

    fn by_id(&self, id: u32) -> Option<Head> {
        self.index.get(id as usize).filter(|_| id != 0).and_then(|at| self.head(*at as usize))
    }

    fn string(&self, offset: u32) -> &[u8] {
        let rest = self.strings.get(offset as usize..).unwrap_or_default();
        rest.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// What a type is behind its typedefs and qualifiers.
    fn resolve(&self, id: u32) -> Option<(u32, Head)> {
        let mut id = id;
        for _ in 0..CHAIN_MAX {
            let head = self.by_id(id)?;
            match head.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = head.size_or_type;
                }
                _ => return Some((id, head)),
            }
        }
        None
    }

    /// Bytes of a type; 0 if it has no size.
    fn size(&self, id: u32) -> u64 {
        let mut factor = 1u64;
        let mut id = id;
        for _ in 0..CHAIN_MAX {
            let Some((_, head)) = self.resolve(id) else { return 0 };
            match head.kind {
                kind::ARRAY => {
                    let (Some(element), Some(count)) = (self.word(head.body), self.word(head.body + 8)) else {
                        return 0;
                    };
                    factor = factor.saturating_mul(u64::from(count));
                    id = element;
                }
                kind::PTR => return factor.saturating_mul(8),
                kind::INT | kind::STRUCT | kind::UNION | kind::ENUM | kind::ENUM64 | kind::FLOAT => {
                    return factor.saturating_mul(u64::from(head.size_or_type));
                }
                _ => return 0,
            }
        }
        0
    }

    /// The structure or union of a name.
    fn structure(&self, name: &str) -> Result<u32, BtfError> {
        self.structures.get(name.as_bytes()).copied().ok_or_else(|| BtfError::NoType { name: name.to_owned() })
    }

    /// Bytes of a structure.
    pub fn size_of(&self, name: &str) -> Result<u64, BtfError> {
        self.structure(name).map(|id| self.size(id))
    }

    /// A member of a structure, by its path: `member`, or `member.inner`. Members of nested structures without a name
    /// are found by their own names.
    pub fn member(&self, name: &str, path: &str) -> Result<Member, BtfError> {
        let missing = || BtfError::NoMember { name: name.to_owned(), member: path.to_owned() };
        let mut id = self.structure(name)?;
        let mut bits = 0u32;
        let mut found = None;
        for part in path.split('.') {
            let member = self.find_member(id, part.as_bytes(), DEPTH_MAX).ok_or_else(missing)?;
            bits = bits.checked_add(member.bit_offset).ok_or_else(missing)?;
            id = self.resolve(member.type_id).map_or(0, |(id, _)| id);
            found = Some(Member { bit_offset: bits, ..member });
        }
        found.ok_or_else(missing)
    }

    fn find_member(&self, structure: u32, name: &[u8], depth: usize) -> Option<Member> {
        let head = self.by_id(structure)?;
        if !matches!(head.kind, kind::STRUCT | kind::UNION) {
            return None;
        }
        for number in 0..head.len {
            let at = head.body + 12 * number;
            let (member_name, type_id, place) = (self.word(at)?, self.word(at + 4)?, self.word(at + 8)?);
            let (bit_offset, bit_size) = if head.flag { (place & 0xFF_FFFF, place >> 24) } else { (place, 0) };
            if self.string(member_name) == name && !name.is_empty() {
                return Some(Member { bit_offset, bit_size, type_id, size: self.size(type_id) });
            }
            if member_name == 0
                && depth > 0
                && let Some((inner, _)) = self.resolve(type_id)
                && let Some(member) = self.find_member(inner, name, depth - 1)
            {
                return Some(Member { bit_offset: bit_offset.checked_add(member.bit_offset)?, ..member });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `struct inner { int a, b; }`, `struct outer { struct { u64 x; }; volatile struct inner in[2]; int f:3; }`.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0inner\0outer\0a\0b\0x\0in\0f\0long\0";
        let name = |text: &str| {
            let needle = [b"\0", text.as_bytes(), b"\0"].concat();
            memchr::memmem::find(strings, &needle).unwrap() as u32 + 1
        };
        let info = |kind: u32, len: u32, flag: bool| kind << 24 | len | u32::from(flag) << 31;
        let words: Vec<u32> = [
            vec![name("int"), info(kind::INT, 0, false), 4, 32], // 1
            vec![name("inner"), info(kind::STRUCT, 2, false), 8, name("a"), 1, 0, name("b"), 1, 32], // 2
            vec![0, info(kind::VOLATILE, 0, false), 2],          // 3
            vec![0, info(kind::ARRAY, 0, false), 0, 3, 1, 2],    // 4
            vec![name("long"), info(kind::INT, 0, false), 8, 64], // 5
            vec![0, info(kind::STRUCT, 1, false), 8, name("x"), 5, 0], // 6
            vec![
                name("outer"),
                info(kind::STRUCT, 3, true),
                32,
                0,
                6,
                0,
                name("in"),
                4,
                64,
                name("f"),
                1,
                3 << 24 | 192,
            ], // 7
        ]
        .concat();
        let types: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut bytes = vec![0x9F, 0xEB, 1, 0];
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(types);
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn members_are_found() {
        let btf = Btf::parse(&sample()).unwrap();
        let member = |path| btf.member("outer", path).map(|member| (member.bit_offset, member.size, member.bit_size));
        assert_eq!(member("x"), Ok((0, 8, 0)));
        assert_eq!(member("in"), Ok((64, 16, 0)));
        assert_eq!(member("f"), Ok((192, 4, 3)));
        assert_eq!(btf.member("inner", "b").map(|member| member.offset()), Ok(4));
        assert_eq!(btf.size_of("outer"), Ok(32));
        assert!(matches!(btf.member("outer", "y"), Err(BtfError::NoMember { .. })));
        assert!(matches!(btf.member("nothing", "y"), Err(BtfError::NoType { .. })));
    }

    #[test]
    fn damage_is_an_error() {
        assert_eq!(Btf::parse(b"no").err(), Some(BtfError::Magic));
        let whole = sample();
        for cut in 24..whole.len() {
            assert!(Btf::parse(&whole[..cut]).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_loop(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let mut bytes = sample();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(btf) = Btf::parse(&bytes) {
                for path in ["x", "in", "f", "in.a"] {
                    let _ = btf.member("outer", path);
                }
            }
        }
    }
}
