#!/bin/sh
# Conformance suites by others, run as guests and compared with the table in docs/conformance.md.
#
#     sh tests/conformance/run.sh [linux] [qemu] [kvm-unit-tests]
#
# Without arguments: linux and qemu, and kvm-unit-tests if KVM_UNIT_TESTS names a directory of it. Everything is
# built and kept in target/conformance. ORRERY is the command to test.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
. "$here/common.sh"

[ $# -gt 0 ] || set -- linux qemu ${KVM_UNIT_TESTS:+kvm-unit-tests}
for suite; do
    [ -e "$here/$suite.sh" ] || fail "there is no suite $suite; there are linux, qemu and kvm-unit-tests"
done
for suite; do
    note "$suite"
    : >"$work/$suite.results"
    (. "$here/$suite.sh") || fail "the suite $suite could not be run"
done

status=0
for suite; do
    awk -f "$here/compare.awk" -v suite="$suite" "$project/docs/conformance.md" "$work/$suite.results" || status=1
done
exit $status
