#!/bin/sh
# Runs an image with seed 1 twice and with seed 2 once: equal seeds must give equal states, and other seeds others.
# Usage: demo.sh ORRERY IMAGE
set -eu
orrery=$1
image=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Runs once; leaves the console in $work/$1.console and the state hash in $work/$1.hash.
run() {
    code=0
    "$orrery" run "$image" --seed "$2" --memory 1024 --runs "$work/runs" --json </dev/null >"$work/$1.out" || code=$?
    [ "$code" -eq 0 ] || { echo "$image, seed $2: exit code $code" >&2; tail -n 5 "$work/$1.out" >&2; exit 1; }
    sed '$d' "$work/$1.out" >"$work/$1.console"
    tail -n 1 "$work/$1.out" | sed -E 's/.*"state_hash":"([0-9a-f]+)".*/\1/' >"$work/$1.hash"
    printf '%-28s seed %s  state %s\n' "$(basename "$image")" "$2" "$(cat "$work/$1.hash")"
}

echo "== $(basename "$image"): an unmodified Debian kernel boots"
run first 1
sed 's/^/   | /' "$work/first.console"
run again 1
run other 2
cmp "$work/first.hash" "$work/again.hash" || { echo "equal seeds, different states" >&2; exit 1; }
cmp "$work/first.console" "$work/again.console" || { echo "equal seeds, different output" >&2; exit 1; }
if cmp -s "$work/first.hash" "$work/other.hash"; then
    echo "another seed, the same state" >&2
    exit 1
fi
echo "seed 1 and seed 2 differ in:"
diff "$work/first.console" "$work/other.console" | head -n 40 || true
echo
