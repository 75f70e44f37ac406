#!/bin/sh
# The root of the go image: one static program.
set -eu
root=$1
here=$(dirname "$0")
command -v go >/dev/null || { echo "$0: go is missing; apt-get install golang-go" >&2; exit 1; }
rm -rf "$root"
mkdir -p "$root/bin" "$(dirname "$root")/go-cache"
program=$(realpath "$root")/bin/demo
GOCACHE=$(realpath "$(dirname "$root")/go-cache")
export GOCACHE
cd "$here"
CGO_ENABLED=0 GOOS=linux GOARCH=amd64 GOFLAGS= go build -trimpath -buildvcs=false -ldflags='-s -w -buildid=' -o "$program" .
