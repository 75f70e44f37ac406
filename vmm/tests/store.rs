//! Snapshots on disk: what is loaded goes on as what was saved, and damage is never a wrong state.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::path::Path;

use common::*;
use orrery_cpu::Icount;
use orrery_cpu::engine::EngineConfig;
use orrery_guest_image::Image;
use orrery_vmm::chain::Hash;
use orrery_vmm::store::{Capture, CaptureBase, SnapshotError, SnapshotRecord, Store, StoreWriter, Timeline, gc, log};
use orrery_vmm::{Limits, Machine};

fn machine(image: &Image) -> Machine {
    Machine::new(image, &small(), SEED, EngineConfig::default()).expect("the machine is built")
}

fn run_to(machine: &mut Machine, icount: u64) {
    machine.run(Limits::until(Icount(icount))).unwrap();
}

fn end(machine: &mut Machine) -> (Icount, Hash) {
    run_to(machine, 1 << 32);
    assert!(machine.ended().is_some());
    (machine.icount(), machine.state_hash())
}

/// Saves a machine at each of the moments.
fn save(runs: &Path, machine: &mut Machine, moments: &[u64]) -> Vec<SnapshotRecord> {
    let mut writer = StoreWriter::new(Store::open(runs).unwrap());
    let mut timeline = Timeline::default();
    let mut base: Option<CaptureBase> = None;
    let mut records = Vec::new();
    for moment in moments {
        run_to(machine, *moment);
        let (capture, next) = Capture::take(machine, base.as_ref()).unwrap();
        records.push(writer.write(&mut timeline, &capture, false).unwrap());
        base = Some(next);
    }
    records
}

fn load(runs: &Path, record: &SnapshotRecord, image: &Image) -> Result<Machine, SnapshotError> {
    Store::existing(runs).unwrap().expect("there is a store").load(record, image, EngineConfig::default())
}

const MOMENTS: [u64; 12] = [0, 1, 500, 501, 3000, 3001, 6000, 9000, 9100, 9200, 12_000, 15_000];

#[test]
fn a_loaded_machine_goes_on_as_the_one_that_was_saved() {
    let runs = tempfile::tempdir().unwrap();
    let image = busy(2000);
    let expected = end(&mut machine(&image));
    let records = save(runs.path(), &mut machine(&image), &MOMENTS);
    assert!(records.iter().all(|record| record.layers.len() <= 8));
    for record in &records {
        let mut loaded = load(runs.path(), record, &image).unwrap();
        assert_eq!(loaded.icount(), Icount(record.icount));
        assert_eq!(end(&mut loaded), expected, "from {}", record.icount);
    }
    // Going on from a snapshot, a new snapshot builds on it.
    let store = Store::open(runs.path()).unwrap();
    let mut loaded = store.load(&records[4], &image, EngineConfig::default()).unwrap();
    let mut timeline = Timeline::of(&store, &records[4]).unwrap();
    let base = CaptureBase::of(&mut loaded);
    run_to(&mut loaded, 7777);
    let (capture, _) = Capture::take(&mut loaded, Some(&base)).unwrap();
    let before = size_of(runs.path());
    let record = StoreWriter::new(store).write(&mut timeline, &capture, true).unwrap();
    assert!(size_of(runs.path()) - before < 200_000, "only what has changed is written");
    assert_eq!(end(&mut load(runs.path(), &record, &image).unwrap()), expected);
}

fn size_of(runs: &Path) -> u64 {
    packs(runs).iter().map(|path| fs::metadata(path).unwrap().len()).sum()
}

fn packs(runs: &Path) -> Vec<std::path::PathBuf> {
    let mut packs: Vec<_> = fs::read_dir(runs.join("store/packs")).unwrap().map(|e| e.unwrap().path()).collect();
    packs.sort();
    packs
}

#[test]
fn equal_contents_are_stored_once() {
    let runs = tempfile::tempdir().unwrap();
    let image = busy(2000);
    save(runs.path(), &mut machine(&image), &MOMENTS);
    let once = size_of(runs.path());
    let records = save(runs.path(), &mut machine(&image), &MOMENTS);
    assert!(size_of(runs.path()) - once < 1000, "{} and {once}", size_of(runs.path()));
    assert!(load(runs.path(), &records[7], &image).is_ok());
}

#[test]
fn damage_is_an_error_or_costs_nothing() {
    let runs = tempfile::tempdir().unwrap();
    let image = busy(300);
    let expected = end(&mut machine(&image));
    let records = save(runs.path(), &mut machine(&image), &[10, 1000]);
    let pack = packs(runs.path()).remove(0);
    let whole = fs::read(&pack).unwrap();
    let mut errors = 0;
    let mut check = |bytes: &[u8], what: String| {
        fs::write(&pack, bytes).unwrap();
        match load(runs.path(), &records[1], &image) {
            Ok(mut machine) => assert_eq!(end(&mut machine), expected, "{what}"),
            Err(error) => {
                assert!(!error.to_string().is_empty());
                errors += 1;
            }
        }
    };
    let step = (whole.len() / 150).max(1);
    for at in (0..whole.len()).step_by(step).chain(0..80) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        check(&bytes, format!("bit flipped at {at}"));
        check(&whole[..at], format!("cut at {at}"));
    }
    assert!(errors > 200, "{errors}");
    fs::remove_file(&pack).unwrap();
    assert!(load(runs.path(), &records[1], &image).is_err());
}

#[test]
fn removing_damage_keeps_what_can_be_loaded() {
    let runs = tempfile::tempdir().unwrap();
    let image = busy(300);
    let records = save(runs.path(), &mut machine(&image), &[10, 1000]);
    let run = runs.path().join("busy-7-001");
    fs::create_dir(&run).unwrap();
    let pack = packs(runs.path()).remove(0);
    let whole = fs::read(&pack).unwrap();
    let heads: Vec<usize> = (0..whole.len() - 4).filter(|at| &whole[*at..at + 4] == b"OREC").collect();
    assert!(heads.len() >= 5);
    // The magic, a length, a checksum, a hash and the content of each record.
    for at in heads.iter().flat_map(|head| [0, 16, 21, 40, 80].map(|offset| head + offset)) {
        packs(runs.path()).iter().for_each(|pack| fs::remove_file(pack).unwrap());
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        fs::write(&pack, &bytes).unwrap();
        log::replace(&run, &records).unwrap();
        let can_be_loaded = |records: &[SnapshotRecord]| -> Vec<u64> {
            records.iter().filter(|record| load(runs.path(), record, &image).is_ok()).map(|r| r.icount).collect()
        };
        let before = can_be_loaded(&records);
        let store = Store::exclusive(runs.path()).unwrap().unwrap();
        gc::gc(runs.path(), &store, &Default::default(), &mut |_| {}).unwrap();
        drop(store);
        let left = log::read(&run).unwrap().records;
        assert_eq!(can_be_loaded(&left), before, "bit flipped at {at}");
        assert_eq!(left.len(), before.len(), "bit flipped at {at}");
    }
}

#[test]
fn a_lost_page_is_found_elsewhere() {
    let runs = tempfile::tempdir().unwrap();
    let image = busy(300);
    let records = save(runs.path(), &mut machine(&image), &[1000]);
    let first = packs(runs.path()).remove(0);
    let hidden = runs.path().join("hidden");
    fs::rename(&first, &hidden).unwrap();
    save(runs.path(), &mut machine(&image), &[1000]);
    // The second pack took the first one's number: give both others.
    let second = packs(runs.path()).remove(0);
    let mut bytes = fs::read(&second).unwrap();
    bytes[12..16].copy_from_slice(&7u32.to_le_bytes());
    fs::write(runs.path().join("store/packs/00000007.pack"), bytes).unwrap();
    fs::remove_file(second).unwrap();
    assert!(load(runs.path(), &records[0], &image).is_ok());
}

#[test]
fn another_image_does_not_fit() {
    use orrery_guest_image::{Content, ImageParts};
    let runs = tempfile::tempdir().unwrap();
    let image = busy(300);
    let records = save(runs.path(), &mut machine(&image), &[1000]);
    let kernel = Content::from(image.kernel().to_vec());
    let disks = vec![Content::from(vec![0u8; 4096])];
    let other = Image::from_parts(ImageParts { kernel, disks, ..Default::default() }).unwrap();
    assert!(matches!(load(runs.path(), &records[0], &other), Err(SnapshotError::Inconsistent { .. })));
}

/// `cargo test --release -p orrery-vmm --test store -- --ignored --nocapture timing`: what snapshots cost.
#[test]
#[ignore = "measures"]
fn timing() {
    use std::time::Instant;
    let runs = tempfile::tempdir_in(".").unwrap();
    let image = Image::open(std::env::var("ORRERY_IMAGE").unwrap_or("../target/images/go.img".into())).unwrap();
    let config = orrery_vmm::MachineConfig { memory_mib: 512, ..Default::default() };
    let mut machine = Machine::new(&image, &config, SEED, EngineConfig::default()).unwrap();
    run_to(&mut machine, 700_000_000);
    let mut writer = StoreWriter::new(Store::open(runs.path()).unwrap());
    let mut timeline = Timeline::default();
    let mut base: Option<CaptureBase> = None;
    let mut records = Vec::new();
    for step in 0..12u64 {
        run_to(&mut machine, 700_000_000 + step * 10_000_000);
        let start = Instant::now();
        machine.state_hash();
        let hashed = start.elapsed();
        let (capture, next) = Capture::take(&mut machine, base.as_ref()).unwrap();
        let taken = start.elapsed();
        let record = writer.write(&mut timeline, &capture, false).unwrap();
        let layers: Vec<u64> = record.layers.iter().map(|layer| layer.pages).collect();
        println!(
            "save: hash {hashed:?} capture {:?} write {:?}, {} MiB captured, layers {layers:?}, store {} KiB",
            taken - hashed,
            start.elapsed() - taken,
            capture.bytes() >> 20,
            size_of(runs.path()) >> 10,
        );
        base = Some(next);
        records.push(record);
    }
    for record in &records {
        let start = Instant::now();
        let mut loaded = load(runs.path(), record, &image).unwrap();
        let loaded_in = start.elapsed();
        run_to(&mut loaded, record.icount + 1000);
        println!("load: {loaded_in:?}, running {:?}", start.elapsed());
    }
}
