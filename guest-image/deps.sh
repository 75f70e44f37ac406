#!/bin/sh
# Sees to the Debian packages that building the demo images takes: installs what is missing if it may, and otherwise
# says what to type. Does nothing where everything is there. `deps.sh bench`: what the benchmark takes beyond that.
set -eu

missing=""
need() { # file, package
    [ -e "$1" ] || missing="$missing $2"
}
need /bin/busybox busybox-static
need /sbin/mke2fs e2fsprogs
need /usr/lib/go-1.19/bin/go golang-go
[ -x "$(command -v jlink || true)" ] || missing="$missing openjdk-17-jdk-headless"
# The tests of the debugger are skipped without gdb.
command -v python3 >/dev/null || missing="$missing python3"
[ "$(id -u)" -ne 0 ] || command -v gdb >/dev/null || missing="$missing gdb"
command -v gcc >/dev/null || missing="$missing gcc libc6-dev"
[ "${1-}" != bench ] || need /usr/bin/qemu-system-x86_64 qemu-system-x86
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    # shellcheck disable=SC2086
    exec apt-get install -y -q --no-install-recommends $missing
fi
echo "${1:-building the demo images} needs Debian packages that are not installed; as root:" >&2
echo "    apt-get install --no-install-recommends$missing" >&2
exit 1
