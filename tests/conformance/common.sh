# What the suites share; sourced by run.sh.

project=$(cd "$here/../.." && pwd)
orrery=${ORRERY:-$project/target/release/orrery}
case $orrery in /*) ;; *) orrery=$PWD/$orrery ;; esac
work=$project/target/conformance
mkdir -p "$work/runs"

note() {
    echo "conformance: $*" >&2
}

fail() {
    note "$*"
    exit 1
}

need() { # file, Debian package
    [ -e "$1" ] || fail "$1 is missing; as root: apt-get install $2"
}

# Debian's stock kernel for servers: unlike the cloud kernel it lets programs make 16-bit segments.
kernel() {
    package=$(find "$work" -maxdepth 1 -name 'linux-image-6.1.*_amd64.deb' | sort -V | tail -n 1)
    if [ -z "$package" ]; then
        name=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-6\.1\.[^ ]*\)$/\1/p' | head -n 1)
        [ -n "$name" ] || fail "no linux-image-6.1 in this system's package lists; put its .deb into $work"
        (cd "$work" && apt-get -q -o APT::Sandbox::User="$(id -un)" download "$name") >&2
        package=$(find "$work" -maxdepth 1 -name 'linux-image-6.1.*_amd64.deb' | sort -V | tail -n 1)
    fi
    echo "$package"
}

# An empty root with busybox and the guest's script in it.
make_root() { # root
    need /bin/busybox busybox-static
    rm -rf "$1"
    mkdir -p "$1/bin" "$1/etc" "$1/tmp" "$1/root" "$1/suite/programs" "$1/suite/native"
    cp /bin/busybox "$1/bin/busybox"
    busybox --list | while read -r applet; do
        [ "$applet" = busybox ] || ln -s busybox "$1/bin/$applet"
    done
    install -m 755 "$here/guest.sh" "$1/guest.sh"
}

# The shared libraries of programs, to where they are on this system.
copy_libraries() { # root, programs
    root=$1
    shift
    ldd "$@" 2>/dev/null | grep -oE '/[^ :]+\.so[^ :]*' | sort -u | while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
}

# Boots a root and runs every program of the suite in it; the console goes to $work/NAME.console.
run_root() { # name, root
    image=$work/$1.img
    "$orrery" image build --kernel "$(kernel)" --root "$2" --cmdline "loglevel=3 vsyscall=xonly" -o "$image" -- \
        /guest.sh >/dev/null
    "$orrery" run "$image" --seed 1 --memory 1024 --no-input --runs "$work/runs" >"$work/$1.raw" 2>"$work/$1.log" ||
        note "$1: $(tail -n 1 "$work/$1.log")"
    tr -d '\r' <"$work/$1.raw" >"$work/$1.console"
}

result() { # suite, test, pass or fail
    echo "$2 $3" >>"$work/$1.results"
}
