# tests/tcg of QEMU for i386 and x86_64: programs whose output is compared with a native run on this host. The source
# is QEMU_SOURCE, or that of the Debian source package qemu. A test passes if exit code and output are the native ones.

source=${QEMU_SOURCE:-$work/qemu}
if [ -z "${QEMU_SOURCE:-}" ] && [ ! -d "$source" ]; then
    (cd "$work" && apt-get -q -o APT::Sandbox::User="$(id -un)" source --download-only qemu) >"$work/qemu.build" 2>&1 ||
        fail "apt-get source qemu failed (it takes a deb-src line in the apt sources); or set QEMU_SOURCE"
    dpkg-source -x "$work"/qemu_*.dsc "$source" >>"$work/qemu.build" 2>&1 || fail "see $work/qemu.build"
fi
need /usr/lib/gcc/x86_64-linux-gnu/12/32/libgcc.a gcc-multilib
need /usr/bin/python3 python3

# Programs whose output tells times, addresses or the order of threads: their exit code alone counts.
own_output="signals test-mmap testthread vsyscall"
# What needs instructions that the CPU model does not have.
absent="test-3dnow test-i386-adcox"

build_tcg() { # architecture, flags of gcc
    built=$work/qemu-$1
    mkdir -p "$built"
    : >"$built/Makefile"
    # The instructions of test-avx are drawn from a table. Without VAES, which the model does not have, and the
    # reciprocal approximations, which every vendor computes in its own way.
    sed 's/"VAES+AVX"/"NONE"/' "$source/tests/tcg/i386/test-avx.py" >"$built/test-avx.py"
    grep -vE '"V?R(CP|SQRT)[PS]S ' "$source/tests/tcg/i386/x86.csv" >"$built/x86.csv"
    [ "$1" != x86_64 ] || python3 "$built/test-avx.py" "$built/x86.csv" "$built/test-avx.h"
    make -s -k -C "$built" -f "$source/tests/tcg/Makefile.target" TARGET="$1-linux-user" TARGET_NAME="$1" \
        SRC_PATH="$source" BUILD_STATIC=y SPEED=slow CC="gcc $2" PYTHON=python3 -o test-avx.h all \
        >"$built/build.log" 2>&1 || note "not everything was built; see $built/build.log"
}

run_tcg() { # architecture
    root=$work/qemu-$1-root
    make_root "$root"
    natives=$work/qemu-$1-native
    mkdir -p "$natives"
    for program in $(find "$work/qemu-$1" -maxdepth 1 -type f -perm -1 | sort); do
        name=${program##*/}
        case " $absent " in *" $name "*) continue ;; esac
        cp "$program" "$root/suite/programs/$name"
        strip "$root/suite/programs/$name"
        case " $own_output " in *" $name "*) continue ;; esac
        (cd "$natives" && "$root/suite/programs/$name" </dev/null >"$root/suite/native/$name" 2>&1) ||
            note "$name fails natively"
    done
    run_root "qemu-$1" "$root"
    awk -v architecture="$1" '
        /^== [^ ]+$/ { name = $2; next }
        /^== .* exit / { print architecture "/" name, ($4 == 0 && $5 != "differs" ? "pass" : "fail"); name = "" }
        END { if (name != "") print architecture "/" name, "fail" }
    ' "$work/qemu-$1.console" >>"$work/qemu.results"
}

build_tcg x86_64 ""
run_tcg x86_64
build_tcg i386 -m32
run_tcg i386
