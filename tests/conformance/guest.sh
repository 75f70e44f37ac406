#!/bin/sh
# In the guest: runs every program of the suite. Where there is a native run's output, the output is compared with it.
# Each program ends with a line "== NAME exit CODE same|differs|alone".
mount -t tmpfs -o size=80% tmpfs /tmp
mkdir /tmp/work
cd /tmp/work || exit 1
for program in /suite/programs/*; do
    name=${program##*/}
    echo "== $name"
    if [ -e "/suite/native/$name" ]; then
        timeout -s KILL 600 "$program" </dev/null >/tmp/output 2>&1
        code=$?
        verdict=same
        cmp -s /tmp/output "/suite/native/$name" || verdict=differs
        [ $verdict = same ] || diff "/suite/native/$name" /tmp/output | head -n 40
    else
        verdict=alone
        timeout -s KILL 600 "$program" </dev/null 2>&1
        code=$?
    fi
    echo "== $name exit $code $verdict"
done
