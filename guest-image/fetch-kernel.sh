#!/bin/sh
# Puts Debian's stock cloud kernel package at the given path: the newest that lies beside it, or else a download.
set -eu
output=$1
directory=$(dirname "$output")
mkdir -p "$directory"

newest() {
    find "$directory" -maxdepth 1 -name 'linux-image-6.1.*-cloud-amd64_*_amd64.deb' | sort -V | tail -n 1
}

package=$(newest)
if [ -z "$package" ]; then
    # The metapackage names the concrete package, which changes with every security update.
    name=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-6\.1\.[^ ]*\)$/\1/p' | head -n 1)
    if [ -z "$name" ]; then
        echo "$0: this system's package lists have no linux-image-6.1 cloud kernel (Debian 12); run apt-get update," >&2
        echo "or put the package into $directory yourself" >&2
        exit 1
    fi
    (cd "$directory" && apt-get -o APT::Sandbox::User="$(id -un)" download "$name")
    package=$(newest)
fi
ln -sf "$(basename "$package")" "$output"
touch "$output"
echo "kernel: $package"
