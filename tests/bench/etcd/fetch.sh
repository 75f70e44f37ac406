#!/bin/sh
# Puts Debian's etcd-server package at the given path: the newest that lies beside it, or else a download.
set -eu
output=$1
directory=$(dirname "$output")
mkdir -p "$directory"

newest() {
    find "$directory" -maxdepth 1 -name 'etcd-server_*_amd64.deb' | sort -V | tail -n 1
}

package=$(newest)
if [ -z "$package" ]; then
    (cd "$directory" && apt-get -o APT::Sandbox::User="$(id -un)" download etcd-server)
    package=$(newest)
fi
ln -sf "$(basename "$package")" "$output"
touch "$output"
echo "etcd: $package"
