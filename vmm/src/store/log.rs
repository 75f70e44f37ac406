//! The list of a run's snapshots: `snapshots.jsonl` in its directory.
//!
//! The first line is the header, every other one a snapshot: its JSON object, a space, and the first 16 hexadecimal
//! digits of the object's BLAKE3. A line is written when everything that it refers to is on disk. A line that a crash
//! has cut is no snapshot.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{SnapshotError, io_error};
use super::pack::{Place, sync_directory};
use crate::chain::Hash;

/// Name of the file in a run's directory.
pub const SNAPSHOTS: &str = "snapshots.jsonl";
/// First line of the file.
pub const HEADER: &str = r#"{"format":"orrery-snapshots","version":1}"#;
/// Largest list that is read, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Most layers of a snapshot.
pub const LAYERS_MAX: usize = 64;

/// A blob: its hash, and where it was when it was referred to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobReference {
    /// Hash of its content.
    pub hash: Hash,
    /// A hint.
    #[serde(flatten)]
    pub place: Place,
}

/// A layer of a snapshot's page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerReference {
    /// The layer.
    #[serde(flatten)]
    pub blob: BlobReference,
    /// Number of its pages.
    pub pages: u64,
}

/// A line of console output that has no end yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartialLine {
    /// Icount of its first byte.
    pub icount: u64,
    /// Virtual time of its first byte.
    pub virtual_ns: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// A snapshot on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// The moment.
    pub icount: u64,
    /// Its virtual time, in nanoseconds.
    pub virtual_ns: u64,
    /// The seed that the random streams were keyed with last.
    pub seed: u64,
    /// Number of inputs that had entered.
    pub inputs_entered: u64,
    /// Hash of the complete state.
    pub state_hash: Hash,
    /// Digest of RAM.
    pub memory: [u64; 4],
    /// Everything but the contents of RAM and disks.
    pub state: BlobReference,
    /// Page table, lowest layer first.
    pub layers: Vec<LayerReference>,
    /// Console output before the moment whose line had not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console_line: Option<PartialLine>,
    /// Somebody asked for it: it is not thinned out.
    pub kept: bool,
}

/// A list of snapshots, being appended to.
pub struct SnapshotLog {
    path: PathBuf,
    file: File,
    len: u64,
}

fn line_of(record: &SnapshotRecord) -> String {
    let text = serde_json::to_string(record).expect("a snapshot's record is plain data");
    let check = blake3::hash(text.as_bytes()).to_hex();
    format!("{text} {}\n", &check[..16])
}

fn parse_line(line: &str) -> Result<SnapshotRecord, String> {
    let (text, check) = line.rsplit_once(' ').ok_or("the line has no checksum")?;
    if blake3::hash(text.as_bytes()).to_hex()[..16] != *check {
        return Err("the line's checksum does not match".into());
    }
    let record: SnapshotRecord = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if record.layers.len() > LAYERS_MAX {
        return Err(format!("the snapshot has {} layers", record.layers.len()));
    }
    Ok(record)
}

/// What a run's list holds, and what is wrong with it.
#[derive(Debug, Default)]
pub struct SnapshotList {
    /// Snapshots, ascending by icount.
    pub records: Vec<SnapshotRecord>,
    /// Lines that could not be used.
    pub damage: Vec<SnapshotError>,
    /// Bytes up to the end of the last whole line.
    whole_bytes: u64,
}

impl SnapshotList {
    /// The last snapshot at or before an icount.
    pub fn before(&self, icount: u64) -> Option<&SnapshotRecord> {
        self.records[..self.records.partition_point(|record| record.icount <= icount)].last()
    }
}

/// Reads a run's list. A missing file is an empty list, a damaged line costs that snapshot.
pub fn read(run: &Path) -> Result<SnapshotList, SnapshotError> {
    let path = run.join(SNAPSHOTS);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(SnapshotList::default()),
        Err(error) => return Err(io_error("open", &path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(io_error("read", &path))?;
    let mut list = SnapshotList::default();
    let damaged = |offset: usize, what: String| SnapshotError::Damaged {
        path: path.display().to_string(),
        offset: offset as u64,
        what,
    };
    let mut at = 0;
    for (number, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let start = at;
        at += line.len();
        // A line without its end was not acknowledged.
        let Some(line) = line.strip_suffix(b"\n") else { break };
        list.whole_bytes = at as u64;
        let text = String::from_utf8_lossy(line);
        if number == 0 {
            if text != HEADER {
                list.damage.push(damaged(0, format!("its first line is not {HEADER}")));
                break;
            }
            continue;
        }
        match parse_line(&text) {
            Ok(record) => list.records.push(record),
            Err(what) => list.damage.push(damaged(start, what)),
        }
    }
    list.records.sort_by_key(|record| record.icount);
    list.records.dedup_by_key(|record| record.icount);
    Ok(list)
}

/// Replaces a run's list: a crash leaves the old one or the new one.
pub fn replace(run: &Path, records: &[SnapshotRecord]) -> Result<(), SnapshotError> {
    let path = run.join(SNAPSHOTS);
    let temporary = run.join("snapshots.jsonl.new");
    let mut text = format!("{HEADER}\n");
    records.iter().for_each(|record| text.push_str(&line_of(record)));
    let mut file = File::create(&temporary).map_err(io_error("create", &temporary))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io_error("write", &temporary))?;
    fs::rename(&temporary, &path).map_err(io_error("rename", &temporary))?;
    sync_directory(run)
}

impl SnapshotLog {
    /// Opens a run's list for appending, making it if there is none. What a crash has cut is removed.
    pub fn open(run: &Path) -> Result<SnapshotLog, SnapshotError> {
        let path = run.join(SNAPSHOTS);
        let list = read(run)?;
        let fresh = !path.exists();
        let file = OpenOptions::new().append(true).create(true).open(&path).map_err(io_error("open", &path))?;
        file.set_len(list.whole_bytes).map_err(io_error("shorten", &path))?;
        let mut log = SnapshotLog { path, file, len: list.whole_bytes };
        if list.whole_bytes == 0 {
            log.append_text(&format!("{HEADER}\n"))?;
        }
        if fresh {
            sync_directory(run)?;
        }
        Ok(log)
    }

    /// Appends a snapshot; it is on disk when this returns.
    pub fn append(&mut self, record: &SnapshotRecord) -> Result<(), SnapshotError> {
        self.append_text(&line_of(record))
    }

    fn append_text(&mut self, text: &str) -> Result<(), SnapshotError> {
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            let _ = self.file.set_len(self.len);
            return Err(io_error("write", &self.path)(error));
        }
        self.len += text.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(icount: u64) -> SnapshotRecord {
        let blob = BlobReference { hash: Hash([3; 32]), place: Place { pack: 1, offset: 16 } };
        SnapshotRecord {
            icount,
            virtual_ns: 7,
            seed: u64::MAX,
            inputs_entered: 0,
            state_hash: Hash([1; 32]),
            memory: [u64::MAX; 4],
            state: blob,
            layers: vec![LayerReference { blob, pages: 9 }],
            console_line: None,
            kept: false,
        }
    }

    #[test]
    fn appended_snapshots_are_read_back_whatever_is_cut() {
        let run = tempfile::tempdir().unwrap();
        assert!(read(run.path()).unwrap().records.is_empty());
        let mut log = SnapshotLog::open(run.path()).unwrap();
        log.append(&record(5)).unwrap();
        log.append(&record(9)).unwrap();
        let list = read(run.path()).unwrap();
        assert_eq!(list.records, vec![record(5), record(9)]);
        assert_eq!(list.before(8), Some(&record(5)));
        assert_eq!(list.before(4), None);
        let path = run.path().join(SNAPSHOTS);
        let whole = fs::read(&path).unwrap();
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            let list = read(run.path()).unwrap();
            assert!(list.damage.is_empty(), "cut at {len}");
            let known = list.records.len();
            SnapshotLog::open(run.path()).unwrap().append(&record(11)).unwrap();
            assert_eq!(read(run.path()).unwrap().records.len(), known + 1, "cut at {len}");
        }
    }

    #[test]
    fn a_flipped_byte_costs_its_line() {
        let run = tempfile::tempdir().unwrap();
        replace(run.path(), &[record(5), record(9)]).unwrap();
        let path = run.path().join(SNAPSHOTS);
        let whole = fs::read(&path).unwrap();
        for at in HEADER.len() + 1..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).unwrap();
            let list = read(run.path()).unwrap();
            assert!(list.records.len() < 2, "at {at}");
            assert!(list.records.iter().all(|r| *r == record(5) || *r == record(9)), "at {at}");
        }
    }
}
