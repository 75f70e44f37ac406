#!/usr/bin/env python3
"""Debugs whole guests with Debian's gdb, forwards and backwards; `make test-debug` calls it.

Each test is a function below. What it needs (images, runs) is made once in the work directory.
"""

import argparse
import fcntl
import json
import os
import pty
import random
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import termios
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# Seeds tried until one loses an update.
SEEDS_MAX = 40


class Failed(Exception):
    """A test found something wrong."""


def check(condition, message):
    if not condition:
        raise Failed(message)


class Bench:
    """Where things are, and how tools are called."""

    def __init__(self, arguments):
        self.orrery = os.path.abspath(arguments.orrery)
        self.images = os.path.abspath(arguments.images)
        self.kernel = os.path.abspath(arguments.kernel)
        self.work = os.path.abspath(arguments.work)
        self.count = arguments.count
        os.makedirs(self.work, exist_ok=True)

    def tool(self, *words, **options):
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False, **options)
        check(done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def is_fresh(self, made, *sources):
        """It is there, and neither what it was made of nor the orrery command is newer."""
        if not os.path.exists(made):
            return False
        return all(os.path.getmtime(source) <= os.path.getmtime(made) for source in [self.orrery, *sources])

    def record(self, name, image, seed, *flags):
        """A run of an image, made once; gives its directory of runs and its summary."""
        runs = os.path.join(self.work, f"runs-{name}-{seed}")
        summary = os.path.join(runs, "summary.json")
        if not self.is_fresh(summary, image):
            shutil.rmtree(runs, ignore_errors=True)
            words = [self.orrery, "run", image, "--seed", str(seed), "--runs", runs, "--no-input", "--json"]
            done = subprocess.run(words + list(flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
            last = done.stdout.decode(errors="replace").strip().splitlines()[-1]
            json.loads(last)
            with open(summary, "w", encoding="utf-8") as file:
                file.write(last)
        with open(summary, encoding="utf-8") as file:
            return runs, json.load(file)

    def gdb(self, runs, moment, commands, *flags):
        """What gdb prints while it debugs a moment of a run."""
        words = [self.orrery, "debug", moment, "--runs", runs, "--gdb", "--", "-batch", "-nx", "-ex", "set pagination off"]
        for command in commands:
            words += ["-ex", command]
        done = subprocess.run(words + list(flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              stdin=subprocess.DEVNULL, check=False)
        return done.stdout

    def race(self, name):
        """An image of one of the racing programs, and the program."""
        root = os.path.join(self.work, f"{name}-root")
        program, image = os.path.join(root, name), os.path.join(self.work, f"{name}.img")
        source = os.path.join(HERE, "race.c" if name == "race" else "gorace/main.go")
        if not self.is_fresh(image, source):
            os.makedirs(root, exist_ok=True)
            if name == "race":
                self.tool("gcc", "-g", "-O1", "-static", "-pthread", "-fno-pie", "-no-pie", "-o", program,
                          source)
            else:
                environment = dict(os.environ, CGO_ENABLED="0")
                self.tool("go", "build", "-trimpath", "-o", program, ".", cwd=os.path.join(HERE, "gorace"),
                          env=environment)
            self.tool(self.orrery, "image", "build", "--kernel", self.kernel, "--root", root, "-o", image, "--",
                      "/" + name)
        return image, program

    def losing(self, name):
        """A run of a racing program that loses an update: runs, seed, program."""
        image, program = self.race(name)
        for seed in range(1, SEEDS_MAX + 1):
            runs, summary = self.record(name, image, seed)
            if summary["ended"].get("code") == 1:
                return runs, seed, program
        raise Failed(f"none of {SEEDS_MAX} seeds loses an update")

    def demo(self, name="go"):
        """A run of a demo image, with its hash at every thousandth part."""
        image = os.path.join(self.images, f"{name}.img")
        return self.record(name, image, 1, "--epoch", str(2_000_003))


def number(words, name):
    """The number behind a name at the beginning of a line."""
    found = re.findall(rf"^{re.escape(name)} (-?\d+)", words, re.MULTILINE)
    check(found, f"no line begins with {name!r}:\n{words}")
    return int(found[-1])


def symbol(bench, runs, moment, name):
    """The address of a symbol at a moment."""
    words = bench.gdb(runs, moment, [f"monitor symbol {name}"])
    found = re.search(rf"^(0x[0-9a-f]+) {re.escape(name)}", words, re.MULTILINE)
    check(found, f"{name} is not known at {moment}:\n{words}")
    return found.group(1)


def test_kernel_and_program(bench):
    """Breakpoints in the kernel and in a Go program; a thousand steps back and forth."""
    runs, summary = bench.demo()
    end = summary["icount"]
    middle = end * 3 // 4
    openat = symbol(bench, runs, f"go@{middle}", "do_sys_openat2")
    words = bench.gdb(runs, f"go@{middle}", [
        f"break *{openat}", "reverse-continue", 'printf "kernel %lu\\n", $icount',
        "printf \"is %d\\n\", $rip == " + openat, "delete",
        "monitor hash", 'printf "start %lu\\n", $icount',
        "reverse-stepi 1000", 'printf "back %lu\\n", $icount', "stepi 1000", 'printf "forth %lu\\n", $icount',
        "monitor hash",
    ])
    check(number(words, "is") == 1, f"not at the breakpoint:\n{words}")
    kernel = number(words, "kernel")
    check(kernel < middle, "going back went forward")
    hashes = re.findall(r"^[0-9a-f]{64}$", words, re.MULTILINE)
    check(number(words, "back") <= number(words, "start") - 999, f"not a thousand steps:\n{words[-2000:]}")
    check(len(hashes) == 2 and number(words, "forth") == number(words, "start"), f"{hashes}\n{words[-2000:]}")
    check(hashes[0] == hashes[1], "another state after a thousand steps back and forth")
    # The Go program: its functions are known while it runs.
    found = bench.tool(bench.orrery, "when", "go", "--runs", runs, "--pc", "main.lostUpdates", "--json").splitlines()
    check(len(found) == 2, f"main.lostUpdates runs twice, not {len(found)} times")
    first, second = (json.loads(line) for line in found)
    words = bench.gdb(runs, f"go@{first['icount'] - 100000}", [
        f"break *{first['rip']}", "continue", 'printf "go %lu\\n", $icount', "stepi", "stepi", "reverse-stepi",
        'printf "stepped %lu\\n", $icount', "continue", 'printf "again %lu\\n", $icount',
        "reverse-continue", 'printf "back %lu\\n", $icount', "monitor backtrace",
    ])
    check(number(words, "go") == first["icount"], f"not where it was executed:\n{words}")
    check(number(words, "stepped") == first["icount"] + 1, words)
    check(number(words, "again") == second["icount"], words)
    check(number(words, "back") == first["icount"], words)
    check("main.lostUpdates" in words, f"no backtrace:\n{words}")


def test_random_moments(bench):
    """Random moments have the hashes of the straight run."""
    runs, _ = bench.demo()
    directory = os.path.join(runs, "go-1-001")
    with open(os.path.join(directory, "chain.jsonl"), encoding="utf-8") as file:
        links = [json.loads(line) for line in file.read().splitlines()[1:]]
    chosen = random.Random(7)
    targets = [chosen.choice(links) for _ in range(bench.count)]
    commands = []
    for link in targets:
        commands += [f"monitor goto {link['icount']}", "monitor hash"]
    started = time.monotonic()
    hashes = re.findall(r"^[0-9a-f]{64}$", bench.gdb(runs, "go@0", commands), re.MULTILINE)
    taken = time.monotonic() - started
    check(len(hashes) == len(targets), f"{len(hashes)} hashes for {len(targets)} targets")
    wrong = [link["icount"] for link, found in zip(targets, hashes) if link["state"] != found]
    check(not wrong, f"other states at {wrong[:5]}")
    print(f"  {len(targets)} moments, {taken / len(targets) * 1000:.0f} ms each")


def debug_race(bench, name, function):
    runs, seed, program = bench.losing(name)
    moment = f"{name}-{seed}-001@end"
    counter = "counter" if name == "race" else "'main.counter'"
    words = bench.gdb(runs, moment, [
        f"symbol-file {program}", f"break {function}", "reverse-continue", 'printf "failed %lu\\n", $icount',
        "delete", f"watch {counter}",
        "reverse-continue", 'printf "second %lu\\n", $icount', "info symbol $rip",
        'printf "base2 %lu\\n", $fs_base',
        "reverse-continue", 'printf "first %lu\\n", $icount', "info symbol $rip",
        'printf "base1 %lu\\n", $fs_base',
    ])
    first, second, failed = number(words, "first"), number(words, "second"), number(words, "failed")
    check(first < second < failed, f"out of order:\n{words}")
    # C threads have a thread pointer each; goroutines may share a thread, but then not at a lost update.
    check(number(words, "base1") != number(words, "base2"), f"one thread wrote twice:\n{words}")
    check(len(re.findall(r"increment", words)) >= 2, f"not the writers:\n{words}")
    # The command finds the same write.
    place = "counter:8" if name == "race" else "main.counter:8"
    found = bench.tool(bench.orrery, "last-write", f"{name}-{seed}-001@{failed}", place, "--runs", runs, "--json")
    check(json.loads(found)["icount"] == second, f"last-write disagrees: {found}")
    print(f"  seed {seed}: written at {first} and {second}, failed at {failed}")


def test_race_in_c(bench):
    """From the failing line back to the two writes of a lost update, in C."""
    debug_race(bench, "race", "lost")


def test_race_in_go(bench):
    """The same in Go."""
    debug_race(bench, "gorace", "main.lost")


def test_editor(bench):
    """What Visual Studio Code's C/C++ extension sends gdb for the launch example of docs/debugging.md."""
    runs, seed, program = bench.losing("race")
    server = subprocess.Popen([bench.orrery, "debug", f"race-{seed}-001@end", "--runs", runs, "--listen", "127.0.0.1:0",
                               "--once"], stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r"127\.0\.0\.1:(\d+)", server.stderr.readline()).group(1))
        gdb = subprocess.Popen(["gdb", "--interpreter=mi", "-nx"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               cwd=HERE)
        said = []

        def until(pattern):
            for line in gdb.stdout:
                said.append(line)
                if re.match(pattern, line):
                    return line
            raise Failed(f"gdb never said {pattern}:\n{''.join(said)}")

        def ask(command, answer="done"):
            gdb.stdin.write(f"1000{command}\n")
            gdb.stdin.flush()
            return until(rf"1000\^({answer}|error)")

        for command in ["-gdb-set mi-async on", '-interpreter-exec console "set architecture i386:x86-64"',
                        f"-environment-cd {HERE}", f"-file-exec-and-symbols {program}"]:
            check("^done" in ask(command), f"{command}:\n{''.join(said)}")
        check("^connected" in ask(f"-target-select remote 127.0.0.1:{port}", "connected"), "".join(said))
        # The extension shows its buttons for going backwards if gdb names this feature.
        check('"reverse"' in ask("-list-target-features"), f"no reverse:\n{''.join(said)}")
        check("^done" in ask("-break-insert -f lost"), "".join(said))
        check("^running" in ask("-exec-continue --reverse", "running"), "".join(said))
        check('reason="breakpoint-hit"' in until(r"\*stopped"), "".join(said))
        for command in ["-thread-info", "-stack-list-frames 0 20", "-stack-list-variables 1", "-data-list-register-names",
                        "-data-list-register-values --skip-unavailable x", "-var-create - * counter",
                        "-data-evaluate-expression sum", "-break-delete"]:
            check("^done" in ask(command), f"{command}:\n{''.join(said)}")
        check('func="increment"' in ask("-stack-list-frames 0 20"), "".join(said))
        check("^done" in ask("-break-watch counter"), "".join(said))
        check("^running" in ask("-exec-continue --reverse", "running"), "".join(said))
        check('reason="watchpoint-trigger"' in until(r"\*stopped"), "".join(said))
        for command in ["-exec-step", "-exec-step --reverse", "-exec-next --reverse", "-exec-step-instruction --reverse"]:
            check("^running" in ask(command, "running"), "".join(said))
            until(r"\*stopped")
        ask("-gdb-exit", "exit")
        gdb.wait(timeout=60)
        check(server.wait(timeout=60) == 0, "the server did not end with its connection")
    finally:
        server.terminate()
        server.wait()


def test_shell(bench):
    """A shell in the guest, with pipes and in a terminal; a file; the run stays as it is."""
    runs, summary = bench.demo("hello")
    moment = ["hello@" + str(summary["icount"] * 99 // 100), "--runs", runs]
    done = subprocess.run([bench.orrery, "shell", *moment], input="echo $((6 * 7)); exit 5\n", stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, check=False)
    check((done.returncode, done.stdout) == (5, "42\n"), f"{done.returncode} {done.stdout}{done.stderr}")
    words = bench.tool(bench.orrery, "cat", *moment, "/proc/version")
    check(words.startswith("Linux version"), words)
    process, terminal = pty.fork()
    if process == 0:
        os.execv(bench.orrery, [bench.orrery, "shell", *moment])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    shown = b""

    def until(wanted):
        nonlocal shown
        patience = time.monotonic() + 120
        while not re.search(wanted, shown):
            check(time.monotonic() < patience, f"the terminal never shows {wanted}: {shown}")
            if select.select([terminal], [], [], 1)[0]:
                try:
                    shown += os.read(terminal, 4096)
                except OSError as error:
                    raise Failed(f"the shell ended before it showed {wanted}: {shown}") from error

    until(rb"[#$] ")
    # Typed, so the terminal shows it too; Ctrl-C reaches the guest's program, not ours.
    os.write(terminal, b"sleep 1000\r")
    until(rb"sleep 1000\r\n")
    time.sleep(0.5)
    os.write(terminal, b"\x03")
    until(rb"\^C[\s\S]*[#$] ")
    os.write(terminal, b"echo is-$((6 * 7))-`tty`; exit 3\r")
    until(rb"is-42-/dev/pts/0")
    _, status = os.waitpid(process, 0)
    check(os.waitstatus_to_exitcode(status) == 3, f"ended with {status}: {shown}")


def test_bad_input(bench):
    """Targets beyond the end, unmapped addresses, missing and changed images, dead connections: a clear error each."""
    runs, summary = bench.demo()
    directory = os.path.join(runs, "go-1-001")
    before = {name: open(os.path.join(directory, name), "rb").read() for name in os.listdir(directory)}

    def fails(code, text, *words):
        done = subprocess.run([bench.orrery, *words, "--runs", runs], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, check=False, stdin=subprocess.DEVNULL)
        check(done.returncode == code and text in done.stderr, f"{words}: {done.returncode} {done.stderr}")

    end = summary["icount"]
    fails(233, "lies behind the end of the run", "replay", "go", "--to", str(end + 1))
    fails(233, "lies behind the end", "debug", f"go@{end + 1}", "--gdb")
    fails(236, "nothing is mapped at", "last-write", "go@1000000", "0x7fffdeadb000:8")
    fails(236, "no symbol", "last-write", "go@1000000", "no_such_symbol")
    fails(233, "there is no run", "replay", "nothing", "--to", "5")
    fails(220, "", "replay", "go", "--to", "x")
    fails(220, "RUN@A..B", "trace", "go@5")
    fails(221, "cannot be opened", "replay", "go", "--to", "5", "--image", "/nonexistent.img")
    other = os.path.join(bench.images, "hello.img")
    fails(221, "is not the image of the run", "replay", "go", "--to", "5", "--image", other)
    fails(236, "never shows", "replay", "go", "--to-console", "no such line")
    fails(231, "cannot listen", "debug", "go@5", "--listen", "256.0.0.1:1")
    server = subprocess.Popen([bench.orrery, "debug", "go@1000000", "--runs", runs, "--listen", "127.0.0.1:0"],
                              stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r"127\.0\.0\.1:(\d+)", server.stderr.readline()).group(1))
        for words in [b"", b"$g#00", b"\xff" * 100, b"$m0,fffffffffffff#00"]:
            with socket.create_connection(("127.0.0.1", port)) as peer:
                peer.sendall(words)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.sendall(b"+$?#3f")
            check(peer.recv(1) == b"+", "the server no longer answers")
        check(server.poll() is None, "the server has ended")
    finally:
        server.terminate()
        server.wait()
    after = {name: open(os.path.join(directory, name), "rb").read() for name in os.listdir(directory)}
    check(before == after, "the run was changed")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orrery", default="target/release/orrery")
    parser.add_argument("--images", default="target/images")
    parser.add_argument("--kernel", default="target/packages/kernel.deb")
    parser.add_argument("--work", default="target/test-debug")
    parser.add_argument("--count", type=int, default=1000, help="random moments")
    parser.add_argument("tests", nargs="*", help="names of tests; all of them if none are given")
    arguments = parser.parse_args()
    if shutil.which("gdb") is None:
        print("SKIPPED: gdb is not installed (apt-get install gdb)")
        return 0
    bench = Bench(arguments)
    tests = {name[5:]: test for name, test in globals().items() if name.startswith("test_")}
    failed = 0
    for name in arguments.tests or tests:
        started = time.monotonic()
        try:
            tests[name](bench)
            print(f"ok {name} ({time.monotonic() - started:.0f} s)", flush=True)
        except Failed as error:
            failed += 1
            print(f"FAILED {name}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
