# The x86 tests of kvm-unit-tests, on the bare machine: multiboot ELF files that print on the serial port. They are
# taken as they are found in KVM_UNIT_TESTS/x86/NAME.flat (built for x86_64); this project does not build them. A test
# passes if it runs to its end and says FAIL nowhere.

tests=${KVM_UNIT_TESTS:?names the directory of kvm-unit-tests, with x86/*.flat in it}
boot=$work/kvm-unit-tests
mkdir -p "$boot"
need /usr/bin/ld binutils
bare_image=${BARE_IMAGE:-$(dirname "$orrery")/examples/bare_image}
[ -x "$bare_image" ] || fail "$bare_image is missing: cargo build --release -p orrery-guest-image --example bare_image"

# One processor, 512 MiB, none of QEMU's test devices. Timers are exact: a test of the APIC's wants them to be.
printf 'NR_CPUS=1\nMEMSIZE=512\nMEMLIMIT=512\nTEST_DEVICE=0\n' >"$boot/environment"

run_unit() { # name of the result, test, arguments
    name=$1
    file=$tests/x86/$2.flat
    shift
    [ -e "$file" ] || { note "$file is missing" && return; }
    gcc -c -x assembler-with-cpp -DPAYLOAD="\"$file\"" -DMODULE="\"$boot/environment\"" -DCOMMAND_LINE="\"$*\"" \
        -DMEMORY_KIB=524288 "$here/multiboot.S" -o "$boot/$name.o"
    ld -n -Ttext=0x4000000 -z noexecstack --no-warn-rwx-segments -o "$boot/$name.elf" "$boot/$name.o"
    "$bare_image" "$boot/$name.elf" "$boot/$name.img"
    "$orrery" run "$boot/$name.img" --seed 1 --memory 512 --timer-jitter 0 --no-input --until-virtual 120s --runs "$work/runs" \
        >"$boot/$name.raw" 2>"$boot/$name.log" || true
    tr -d '\r' <"$boot/$name.raw" >"$boot/$name.console"
    verdict=fail
    # The tests say how they ended. One that has nothing to test ends with code 38.
    if grep -qE -e '--- DONE: (0|38) ---' "$boot/$name.console" && ! grep -q '^FAIL' "$boot/$name.console"; then
        verdict=pass
    fi
    result kvm-unit-tests "$name" $verdict
}

for test in apic debug dummy emulator eventinj hypercall idt_test la57 lam memory msr pcid pks pku rdpru \
    realmode rmap_chain setjmp smap smptest syscall tsc tsc_adjust tscdeadline_latency tsx-ctrl umip xsave; do
    run_unit $test $test
done
