#!/bin/sh
# run.sh TARGET SECONDS [libFuzzer's flags or files]: builds the fuzz targets and runs one, or each in turn if TARGET is
# empty. docs/fuzzing.md explains the flags.
set -eu
target=$1
seconds=$2
shift 2
cd "$(dirname "$0")"
cargo build --release
bin=${CARGO_TARGET_DIR:-target}/x86_64-unknown-linux-gnu/release
work=${FUZZ_WORK:-work}
status=0
for name in ${target:-code paging devices formats}; do
    mkdir -p "$work/corpus/$name" "$work/findings/$name"
    seeds=
    [ -d "corpus/$name" ] && seeds=corpus/$name
    echo "fuzzing $name for $seconds seconds; findings go to $(pwd)/$work/findings/$name"
    # Inputs of any length at once: they are made of short records. No timer, and no handler for the signals that
    # people send: they would run on the guest's stack.
    # shellcheck disable=SC2086
    FUZZ_HISTORY="$work/findings/$name/history" "$bin/$name" "$work/corpus/$name" $seeds \
        -timeout=0 -handle_int=0 -handle_term=0 -handle_usr1=0 -handle_usr2=0 \
        -max_len=1024 -len_control=0 -report_slow_units=60 \
        -artifact_prefix="$work/findings/$name/" -max_total_time="$seconds" -print_final_stats=1 \
        "$@" || status=1
done
exit $status
