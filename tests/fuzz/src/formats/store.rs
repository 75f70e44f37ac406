//! The snapshot store, damaged: packs, lists of snapshots, page tables; exported runs; archives of translations.
//!
//! Where a checksum stands in the way it is put right half of the time, as whoever forges a file would. Without that,
//! what is damaged must never become a state that was not saved.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

use orrery_cpu::Icount;
use orrery_cpu::engine::{Archive, EngineConfig};
use orrery_guest_image::{Content, Image, ImageParts};
use orrery_vmm::chain::Hash;
use orrery_vmm::run::archive;
use orrery_vmm::run::manifest::Manifest;
use orrery_vmm::store::pack::{Packs, Place, Scratch};
use orrery_vmm::store::{Capture, SnapshotRecord, Store, StoreWriter, Timeline, check, gc, layer, log};
use orrery_vmm::{Limits, Machine, MachineConfig, Seed};

use crate::bytes::Bytes;

/// Bytes of a pack's and of a record's header, and of what the record's checksum covers of it.
const PACK_HEADER: usize = 16;
const RECORD_HEADER: usize = 36;

/// A store with two snapshots of a small guest, as it was written.
struct Saved {
    /// A directory of runs, of this process alone.
    runs: PathBuf,
    image: Image,
    records: Vec<SnapshotRecord>,
    /// The machines' states beside RAM.
    states: Vec<Vec<u8>>,
    pack: Vec<u8>,
    list: Vec<u8>,
}

thread_local! {
    static SAVED: RefCell<Option<Saved>> = const { RefCell::new(None) };
}

const RUN: &str = "fuzz-1-001";
const PACK: &str = "store/packs/00000001.pack";

fn engine() -> EngineConfig {
    EngineConfig { code_cache_bytes: 1 << 20, ..EngineConfig::default() }
}

fn save() -> Saved {
    // mov edi, 0x300000; lea: inc dword [rdi]; add edi, 0x1000; jmp lea
    let code = [0xBF, 0, 0, 0x30, 0, 0xFF, 0x07, 0x81, 0xC7, 0, 0x10, 0, 0, 0xEB, 0xF6];
    let kernel = Content::from(crate::elf::executable(0x20_0000, &code));
    let image = Image::from_parts(ImageParts { kernel, ..ImageParts::default() }).expect("the guest is a kernel");
    let runs = std::env::temp_dir().join(format!("orrery-fuzz-{}", std::process::id()));
    let _ = fs::remove_dir_all(&runs);
    let run = runs.join(RUN);
    fs::create_dir_all(&run).expect("a directory");
    let config = MachineConfig { memory_mib: 16, ..MachineConfig::default() };
    let mut machine = Machine::new(&image, &config, Seed(1), engine()).expect("a machine");
    let mut writer = StoreWriter::new(Store::open(&runs).expect("a store"));
    let mut list = log::SnapshotLog::open(&run).expect("a list");
    let (mut timeline, mut base, mut records, mut states) = (Timeline::default(), None, Vec::new(), Vec::new());
    for moment in [10, 60] {
        machine.run(Limits::until(Icount(moment))).expect("no inputs are replayed");
        let (capture, next) = Capture::take(&mut machine, base.as_ref()).expect("a moment");
        let record = writer.write(&mut timeline, &capture, false).expect("room for a snapshot");
        list.append(&record).expect("room for a line");
        base = Some(next);
        records.push(record);
        states.push(machine.state().encode());
    }
    let read = |name: &str| fs::read(runs.join(name)).expect("it was just written");
    let (pack, list) = (read(PACK), read(&format!("{RUN}/{}", log::SNAPSHOTS)));
    Saved { image, records, states, pack, list, runs }
}

/// Changes bytes where the input says.
fn damage(bytes: &mut Bytes, file: &mut Vec<u8>) {
    let at = usize::from(bytes.u16()) % file.len().max(1);
    match bytes.u8() {
        0..=15 => file.truncate(at),
        16..=31 => drop(file.drain(at..(at + 1 + bytes.below(40)).min(file.len()))),
        32..=47 => {
            let piece: Vec<u8> = file[at..].iter().take(1 + bytes.below(600)).copied().collect();
            let to = usize::from(bytes.u16()) % (file.len() + 1);
            drop(file.splice(to..to, piece));
        }
        48..=95 => file[at..].iter_mut().take(8).for_each(|byte| *byte = bytes.u8()),
        _ => {
            if let Some(byte) = file.get_mut(at) {
                *byte = bytes.u8();
            }
        }
    }
}

/// Puts the checksums of a pack's records right, as far as the records follow each other.
fn mend_pack(pack: &mut [u8]) {
    let mut at = PACK_HEADER;
    while let Some(header) = pack.get(at..at + RECORD_HEADER) {
        let number = |n: usize| u32::from_le_bytes(header[n..n + 4].try_into().expect("four bytes"));
        let body = (number(8) as usize).saturating_mul(32).saturating_add(number(16) as usize);
        let start = at + RECORD_HEADER;
        let Some(content) = pack.get(start..start.saturating_add(body)) else { return };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&header[4..20]).update(content);
        let checksum = hasher.finalize();
        pack[at + 20..at + RECORD_HEADER].copy_from_slice(&checksum.as_bytes()[..16]);
        at = start + body;
    }
}

/// Puts the checksums of a list's lines right.
fn mend_list(list: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(list);
    let mut lines = text.split_inclusive('\n');
    let mut mended = lines.next().unwrap_or_default().to_string();
    for line in lines {
        let object = line.rsplit_once(' ').map_or(line, |(object, _)| object);
        mended += &format!("{object} {}\n", &blake3::hash(object.as_bytes()).to_hex()[..16]);
    }
    mended.into_bytes()
}

/// A store whose pack and list are damaged. What is loaded is what was saved, or nothing.
pub fn damaged(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    SAVED.with_borrow_mut(|slot| {
        let saved = slot.get_or_insert_with(save);
        let (mut pack, mut list) = (saved.pack.clone(), saved.list.clone());
        let forged = bytes.u8() & 1 != 0;
        while !bytes.is_empty() {
            let file = if bytes.u8() & 3 == 0 { &mut list } else { &mut pack };
            damage(&mut bytes, file);
        }
        if forged {
            mend_pack(&mut pack);
            list = mend_list(&list);
        }
        let write = |name: &str, content: &[u8]| fs::write(saved.runs.join(name), content).expect("room for a file");
        let packs = saved.runs.join("store/packs");
        let _ = fs::remove_dir_all(&packs);
        fs::create_dir_all(&packs).expect("a directory");
        write(PACK, &pack);
        write(&format!("{RUN}/{}", log::SNAPSHOTS), &list);
        let before = load_all(saved, forged);
        let store = Store::exclusive(&saved.runs).expect("nobody else is there").expect("there is a store");
        check::check(&saved.runs, &store, &mut |_| {}).expect("its files can be read");
        gc::gc(&saved.runs, &store, &gc::GcOptions::default(), &mut |_| {}).expect("its files can be written");
        drop(store);
        let after = load_all(saved, forged);
        assert!(forged || before.iter().all(|moment| after.contains(moment)), "{before:?} became {after:?}");
    });
}

/// Loads every snapshot of the list; gives the moments of those that could be.
fn load_all(saved: &Saved, forged: bool) -> Vec<u64> {
    let list = log::read(&saved.runs.join(RUN)).expect("the list can be read");
    let store = Store::existing(&saved.runs).expect("nobody else is there").expect("there is a store");
    let mut loaded = Vec::new();
    for record in &list.records {
        let Ok(mut machine) = store.load(record, &saved.image, engine()) else { continue };
        let original = saved.records.iter().position(|original| original.icount == record.icount);
        if !forged {
            let original = original.expect("no other moment was saved");
            assert_eq!(machine.state_hash(), saved.records[original].state_hash);
            assert!(machine.state().encode() == saved.states[original], "another state than was saved");
        }
        loaded.push(record.icount);
        // A forged state may be in front of a string instruction that takes years.
        let until = Icount(record.icount.saturating_add(50));
        let limits = Limits { pause_when_long: true, ..Limits::until(until) };
        machine.run(limits).expect("no inputs are replayed");
    }
    loaded
}

/// Records of a pack, a page table and a list of snapshots out of nothing.
pub fn parts(data: &[u8]) {
    let packs = Packs::new(PathBuf::from("/nonexistent"));
    if let Ok(entries) = layer::decode(data, &packs, Place::default()) {
        assert!(layer::encode(&entries) == data, "a page table changes when it is written again");
        let (below, above) = entries.split_at(entries.len() / 2);
        assert!(layer::merge(below, above) == entries && layer::merge(&entries, above) == entries);
    }
    let runs = std::env::temp_dir().join(format!("orrery-fuzz-parts-{}", std::process::id()));
    fs::create_dir_all(&runs).expect("a directory");
    let mut pack = b"ORRYPACK".to_vec();
    pack.extend(orrery_vmm::store::pack::PACK_VERSION.to_le_bytes());
    pack.extend(1u32.to_le_bytes());
    pack.extend_from_slice(data);
    mend_pack(&mut pack);
    fs::write(runs.join("00000001.pack"), &pack).expect("room for a file");
    let packs = Packs::new(runs.clone());
    let mut scratch = Scratch::new();
    let mut place = Place { pack: 1, offset: PACK_HEADER as u64 };
    while let Ok(Some(head)) = packs.head(place) {
        if packs.verify(place, &mut scratch).is_ok() {
            assert_eq!(scratch.raw.len(), head.raw_bytes);
        }
        place.offset += head.bytes();
    }
    let mut text = format!("{}\n", log::HEADER).into_bytes();
    text.extend_from_slice(data);
    fs::write(runs.join(log::SNAPSHOTS), mend_list(&text)).expect("room for a file");
    let list = log::read(&runs).expect("the list can be read");
    log::replace(&runs, &list.records).expect("room for a list");
    assert_eq!(log::read(&runs).expect("what was written").records, list.records);
}

/// An exported run: sections as the input says, with the hash over all of it right.
pub fn exported(data: &[u8]) {
    let runs = std::env::temp_dir().join(format!("orrery-fuzz-import-{}", std::process::id()));
    let _ = fs::remove_dir_all(&runs);
    fs::create_dir_all(&runs).expect("a directory");
    let file = runs.join("run.orrery");
    let mut bytes = Bytes::new(data);
    let mut content = b"ORRYRUN1".to_vec();
    for kind in 1..=4 + bytes.u8() % 3 {
        let kind = if bytes.u8() == 0 { bytes.u8() } else { kind };
        let section = match kind {
            1 if bytes.u8() & 3 != 0 => manifest(&mut bytes).to_json().into_bytes(),
            4 if bytes.u8() & 3 != 0 => format!("{}\n", orrery_vmm::inputs::HEADER).into_bytes(),
            _ => {
                let len = usize::from(bytes.u8());
                bytes.take(len).to_vec()
            }
        };
        let len = if bytes.u8() == 0xFF { bytes.u64() } else { section.len() as u64 };
        content.push(kind);
        content.extend(len.to_le_bytes());
        content.extend(section);
    }
    content.extend(blake3::hash(&content).as_bytes());
    fs::write(&file, &content).expect("room for a file");
    let Ok(imported) = archive::import(&file, &runs, None) else { return };
    let again = runs.join("again.orrery");
    archive::export(&runs.join(&imported.id), None, &again).expect("what was imported");
    let twice = archive::import(&again, &runs, None).expect("what was exported");
    let without = |mut manifest: Manifest| {
        manifest.id = String::new();
        manifest.to_json()
    };
    assert_eq!(without(twice), without(imported));
    assert!(!runs.join("image").exists() && is_alone(&runs), "something else was left behind");
}

/// Nothing is there but runs, archives and images.
fn is_alone(runs: &Path) -> bool {
    let entries = fs::read_dir(runs).expect("a directory").flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap_or_default()).all(|name| !name.starts_with('.'))
}

fn manifest(bytes: &mut Bytes) -> Manifest {
    let text = |bytes: &mut Bytes| {
        let len = bytes.below(40);
        String::from_utf8_lossy(bytes.take(len)).into_owned()
    };
    Manifest {
        format: orrery_vmm::run::manifest::FORMAT.into(),
        version: orrery_vmm::run::manifest::VERSION,
        id: text(bytes),
        orrery_version: text(bytes),
        image: orrery_vmm::run::manifest::ImageReference { path: text(bytes), hash: Hash(bytes.array()) },
        machine: MachineConfig { memory_mib: bytes.u64(), ..MachineConfig::default() },
        seed: bytes.u64(),
        branches: Vec::new(),
        replayed_inputs: (bytes.u8() & 1 != 0).then(|| text(bytes)),
        epoch_instructions: bytes.u64(),
        host_cpu_vendor: text(bytes),
        outcome: None,
        checksum: String::new(),
    }
}

/// Translations kept from run to run. What they hold is host code, which is not for a fuzzer to choose.
pub fn translations(data: &[u8]) {
    if let Some(archive) = Archive::new(data.to_vec()) {
        assert!(archive.bytes() == data && archive.sizes() == (data.len(), 0));
    }
}
