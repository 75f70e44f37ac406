//! `orrery store`.

use std::time::Duration;

use super::args::{StoreArgs, StoreCheckArgs, StoreCommand, StoreGcArgs};
use super::exit::{self, Failure};
use super::place::spinner;
use super::snapshot::store_failure;
use crate::store::Store;
use crate::store::check::{CheckReport, check};
use crate::store::gc::{GcOptions, GcReport, gc};

pub(super) fn store(arguments: &StoreArgs) -> Result<u8, Failure> {
    match &arguments.command {
        StoreCommand::Check(arguments) => check_store(arguments),
        StoreCommand::Gc(arguments) => collect(arguments),
    }
}

fn check_store(arguments: &StoreCheckArgs) -> Result<u8, Failure> {
    let bar = spinner();
    let report = match Store::existing(&arguments.kept.runs).map_err(store_failure)? {
        Some(store) => check(&arguments.kept.runs, &store, &mut |bytes| {
            bar.set_message(format!("{} MiB verified", bytes >> 20));
            bar.tick();
        })
        .map_err(store_failure)?,
        None => CheckReport::default(),
    };
    bar.finish_and_clear();
    if arguments.json {
        say!("{}", serde_json::to_string(&report).expect("a report is plain data"));
    } else {
        say!(
            "{} snapshots, {} pages in {} packs, {:.1} MiB",
            report.snapshots,
            report.pages,
            report.packs,
            report.bytes as f64 / f64::from(1 << 20)
        );
        report.damage.iter().for_each(|damage| say!("damage: {damage}"));
        report.lost.iter().for_each(|moment| say!("lost: the snapshot of {moment}"));
        if !report.damage.is_empty() {
            say!("`orrery store gc` removes what is damaged; every moment can still be reached from an earlier one");
        }
    }
    Ok(if report.damage.is_empty() { 0 } else { exit::DAMAGED })
}

fn collect(arguments: &StoreGcArgs) -> Result<u8, Failure> {
    let options = GcOptions {
        bytes_max: arguments.max_size.map(|mib| mib << 20),
        age_max: arguments.older_than.map(|days| Duration::from_secs(days * 24 * 60 * 60)),
        dry_run: arguments.dry_run,
    };
    let bar = spinner();
    let store = match arguments.dry_run {
        true => Store::existing(&arguments.kept.runs),
        false => Store::exclusive(&arguments.kept.runs),
    };
    let report = match store.map_err(store_failure)? {
        Some(store) => gc(&arguments.kept.runs, &store, &options, &mut |bytes| {
            bar.set_message(format!("{} MiB looked at", bytes >> 20));
            bar.tick();
        })
        .map_err(store_failure)?,
        None => GcReport::default(),
    };
    bar.finish_and_clear();
    if arguments.json {
        say!("{}", serde_json::to_string(&report).expect("a report is plain data"));
        return Ok(0);
    }
    let would = if arguments.dry_run { "would remove" } else { "removed" };
    report.removed.iter().for_each(|moment| say!("{would} the snapshot of {moment}"));
    report.damaged.iter().for_each(|moment| say!("{would} the damaged snapshot of {moment}"));
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    say!(
        "{} snapshots stay; {:.1} MiB, before {:.1} MiB",
        report.kept,
        mib(report.bytes_after),
        mib(report.bytes_before)
    );
    Ok(0)
}
