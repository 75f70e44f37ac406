#!/bin/sh
# The root of the hello image: a static busybox under all its names, and the demo script.
set -eu
root=$1
here=$(dirname "$0")
busybox=$(command -v busybox) || { echo "$0: busybox is missing; apt-get install busybox-static" >&2; exit 1; }
rm -rf "$root"
mkdir -p "$root/bin" "$root/etc"
install -m 755 "$busybox" "$root/bin/busybox"
"$busybox" --list | while read -r applet; do
    [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
done
echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"
install -m 755 "$here/hello.sh" "$root/bin/hello.sh"
