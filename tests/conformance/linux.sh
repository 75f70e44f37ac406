# tools/testing/selftests/x86 of the Linux kernel, 64-bit and 32-bit: programs that check themselves. The source is
# LINUX_SOURCE, or that of the Debian package linux-source-6.1. A test passes if it exits with 0 and says FAIL nowhere.

source=${LINUX_SOURCE:-$work/linux-source-6.1}
if [ -z "${LINUX_SOURCE:-}" ] && [ ! -d "$source" ]; then
    need /usr/src/linux-source-6.1.tar.xz linux-source-6.1
    tar -C "$work" -xf /usr/src/linux-source-6.1.tar.xz linux-source-6.1/tools/testing linux-source-6.1/tools/include \
        linux-source-6.1/arch/x86/include
fi
need /usr/lib/gcc/x86_64-linux-gnu/12/32/libgcc.a gcc-multilib

built=$work/linux-programs
mkdir -p "$built"
make -s -k -C "$source/tools/testing/selftests/x86" OUTPUT="$built" KHDR_INCLUDES= all >"$work/linux.build" 2>&1 ||
    fail "the build failed; see $work/linux.build"
root=$work/linux-root
make_root "$root"
cp "$built"/*_32 "$built"/*_64 "$root/suite/programs/"
strip "$root"/suite/programs/*
copy_libraries "$root" "$root"/suite/programs/*
run_root linux "$root"

awk '
    /^== [^ ]+$/ { name = $2; failed = 0; next }
    /^== .* exit / { print name, ($4 == 0 && !failed ? "pass" : "fail"); name = ""; next }
    /\[FAIL\]/ { failed = 1 }
    END { if (name != "") print name, "fail" }
' "$work/linux.console" >"$work/linux.results"
