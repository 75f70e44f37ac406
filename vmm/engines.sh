#!/bin/sh
# The long test of engines: `make test-engines`. Each image with each seed runs to its end in every engine; hash chain,
# state and console must be those of the soft engine, and the virtual machine must have been used. SEEDS=n takes another
# number of seeds than 20, SEED=n another first one, IMAGES='...' other images.
# Usage: engines.sh ORRERY IMAGE-DIRECTORY
set -eu
orrery=$1
images=$2
first=${SEED:-1}
last=$((first + ${SEEDS:-20} - 1))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
compared=0
differing=0

# Runs an image and prints what must be equal; adds to `visits` how often the virtual machine was entered.
run() { # name, seed, engine
    code=0
    "$orrery" run "$images/$1.img" --seed "$2" --engine "$3" --runs "$work/runs" --no-input --quiet --json \
        --epoch 268435456 --no-snapshots --engine-statistics >"$work/report" 2>"$work/statistics" || code=$?
    entered=$(sed -n 's/^ *\([0-9]*\) stretches in the virtual machine$/\1/p' "$work/statistics")
    visits="$visits $3 ${entered:-0}"
    sed -E 's/.*"icount":([0-9]+).*"state_hash":"([0-9a-f]+)","chain":"([0-9a-f]+)".*/\1 instructions, state \2, chain \3/' \
        "$work/report"
    sha256sum <"$work/runs/$1-$2-001/console.log"
    rm -rf "$work/runs"
    [ "$code" -eq 0 ] || echo "$3: exit code $code"
    grep "went on in software" "$work/statistics" || true
    case $3 in kvm | random) [ "${entered:-0}" -gt 0 ] || echo "$3: never in the virtual machine" ;; esac
}

for name in ${IMAGES:-hello go jvm etcd}; do
    for seed in $(seq "$first" "$last"); do
        differ=""
        visits=""
        for engine in soft kvm auto random; do
            run "$name" "$seed" "$engine" >"$work/$engine"
            compared=$((compared + 1))
            if ! cmp -s "$work/soft" "$work/$engine"; then
                differ="$differ $engine"
                differing=$((differing + 1))
            fi
        done
        echo "$name, seed $seed: $(head -n 1 "$work/soft"); ${differ:+DIFFERENT:}${differ:-equal}; visits:$visits"
        for engine in $differ; do sed "s/^/    $engine: /" "$work/$engine"; done
    done
done
echo "$compared runs compared, $differing differ"
[ "$differing" -eq 0 ]
