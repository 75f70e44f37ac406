#!/bin/sh
# The long test of snapshots: `make test-snapshots`. For each image: a run with snapshots, and the same without; 50
# random moments, each gone on from to the end in a process of its own; 20 seeds at one moment, twice each. Then 200
# kills. COUNT=n and SEEDS=n make it shorter.
set -eu
orrery=$1
images=$2
count=${COUNT:-50}
seeds=${SEEDS:-20}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
field() { sed -n "s/.*\"$1\":\"\{0,1\}\([^,\"}]*\).*/\1/p" | tail -n 1; }
fail() { echo "FAILED: $*"; exit 1; }

for name in ${IMAGES:-hello go jvm}; do
    runs=$work/$name
    image=$images/$name.img
    plain=$("$orrery" run "$image" --seed 1 --no-input --quiet --json --runs "$runs" --no-snapshots)
    taken=$("$orrery" run "$image" --seed 1 --no-input --quiet --json --runs "$runs" --snapshot-every 100000000)
    hash=$(echo "$plain" | field state_hash)
    [ "$(echo "$taken" | field state_hash)" = "$hash" ] || fail "$name: snapshots changed the run"
    end=$(echo "$plain" | field icount)
    for moment in $(awk -v n="$count" -v end="$end" 'BEGIN { srand(7); for (i = 0; i < n; i++) printf "%d\n", rand() * end }'); do
        "$orrery" snapshot "$name-1-002@$moment" --runs "$runs" > /dev/null
        again=$("$orrery" branch "$name-1-002@$moment" --quiet --json --runs "$runs" --no-snapshots)
        [ "$(echo "$again" | field state_hash)" = "$hash" ] || fail "$name@$moment: another end"
    done
    echo "$name: $count moments, $count equal ends ($hash at $end)"
    middle=$((end * 4 / 5))
    for pass in 1 2; do
        "$orrery" branch "$name-1-002@$middle" --seed 100 --count "$seeds" --jobs 2 --quiet --json --no-snapshots \
            --runs "$runs" \
            | sed 's/.*"run":"[^"]*\/\([a-z]*-[0-9]*\)-[0-9]*".*"state_hash":"\([^"]*\)".*/\1 \2/' \
            | sort > "$work/$name.$pass"
    done
    cmp "$work/$name.1" "$work/$name.2" || fail "$name: a seed has two futures"
    futures=$(awk '{ print $2 }' "$work/$name.1" | sort -u | wc -l)
    [ "$futures" = "$seeds" ] || fail "$name: $seeds seeds and $futures futures"
    echo "$name: $seeds seeds at $middle, $futures futures, each of them twice"
    "$orrery" store check --runs "$runs"
    "$orrery" store gc --runs "$runs"
    "$orrery" store check --runs "$runs"
    rm -rf "$runs"
done
