// Command bench starts etcd and gives it a fixed load over loopback.
//
//	bench ETCD [etcd-put-get [ROUNDS]]
//
// ETCD is the path of the server, ROUNDS how many rounds each client does: a put and a get each. The clients speak JSON over HTTP, which etcd's gateway passes to its gRPC service, so
// a request goes through two protocols and several goroutines. The data lie in memory (/dev/shm): what a disk costs is
// not the question here.
//
// It prints the markers of all programs of the benchmark: "@@ start" when etcd answers, "@@ begin etcd-put-get",
// "@@ end etcd-put-get RESULT", "@@ done". The result is made from all values that were read and from the revision of
// the store at the end.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	clients = 4
	// Rounds of each client if the command line does not say.
	defaultRounds = 250
	// Keys of each client, written again and again.
	keys = 50
	line = "etcd-put-get"
	// Longest wait for the first answer.
	patience = 60 * time.Second
)

func main() {
	arguments := os.Args[1:]
	rounds, notANumber := defaultRounds, error(nil)
	if len(arguments) == 3 {
		rounds, notANumber = strconv.Atoi(arguments[2])
	}
	if len(arguments) < 1 || len(arguments) > 3 || len(arguments) > 1 && arguments[1] != line || notANumber != nil {
		fmt.Fprintf(os.Stderr, "usage: bench ETCD [%s [ROUNDS]]\n", line)
		os.Exit(2)
	}
	if err := run(arguments[0], rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(program string, rounds int) error {
	directory, err := os.MkdirTemp("/dev/shm", "etcd")
	if err != nil {
		return err
	}
	defer os.RemoveAll(directory)
	server, err := start(program, directory)
	if err != nil {
		return err
	}
	defer func() {
		server.Process.Kill()
		server.Wait()
	}()
	store := newStore()
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		_, err := store.put("ready", "yes")
		if err == nil {
			break
		}
		if time.Since(began) > patience {
			return fmt.Errorf("etcd does not answer: %w", err)
		}
	}
	fmt.Println("@@ start")
	fmt.Println("@@ begin", line)
	result, err := load(store, rounds)
	if err != nil {
		return err
	}
	fmt.Printf("@@ end %s %016x\n", line, result)
	fmt.Println("@@ done")
	return nil
}

// start runs an etcd of one member whose files are in the given directory.
func start(program, directory string) (*exec.Cmd, error) {
	const peers = "http://127.0.0.1:23800"
	server := exec.Command(program,
		"--name=bench", "--data-dir="+filepath.Join(directory, "data"),
		"--listen-client-urls="+address, "--advertise-client-urls="+address,
		"--listen-peer-urls="+peers, "--initial-advertise-peer-urls="+peers, "--initial-cluster=bench="+peers,
		"--logger=zap", "--log-level=error")
	server.Stderr = os.Stderr
	server.Env = []string{"PATH=/usr/bin:/bin"}
	// It must not outlive this program, whose main goroutine keeps the thread that starts it.
	runtime.LockOSThread()
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return server, server.Start()
}

// load lets all clients work and makes their results into one.
func load(store *store, rounds int) (uint64, error) {
	var working sync.WaitGroup
	results, failures := make([]uint64, clients), make([]error, clients)
	for client := 0; client < clients; client++ {
		client := client
		working.Add(1)
		go func() {
			defer working.Done()
			results[client], failures[client] = work(store, client, rounds)
		}()
	}
	working.Wait()
	var result uint64
	for client := range results {
		if failures[client] != nil {
			return 0, failures[client]
		}
		result = mix(result, results[client])
	}
	revision, err := store.put("done", "yes")
	if err != nil {
		return 0, err
	}
	// "ready", "done", and one more for each put; the first revision is 1.
	if expected := uint64(1 + 2 + clients*rounds); revision != expected {
		return 0, fmt.Errorf("the store is at revision %d after %d puts", revision, expected-1)
	}
	return mix(result, revision), nil
}

// work puts values under the keys of one client and reads back what it put some rounds before.
func work(store *store, client, rounds int) (uint64, error) {
	var result uint64
	values := make(map[string]string)
	for round := 0; round < rounds; round++ {
		key := fmt.Sprintf("client-%d/key-%d", client, round%keys)
		values[key] = fmt.Sprintf("%08d-%0100d", client, round*round)
		if _, err := store.put(key, values[key]); err != nil {
			return 0, err
		}
		wanted := fmt.Sprintf("client-%d/key-%d", client, round/2%keys)
		value, err := store.get(wanted)
		if err != nil {
			return 0, err
		}
		if value != values[wanted] {
			return 0, fmt.Errorf("%s is %q, not %q", wanted, value, values[wanted])
		}
		for _, letter := range []byte(value) {
			result = mix(result, uint64(letter))
		}
	}
	return result, nil
}

// mix folds a value into a result.
func mix(result, value uint64) uint64 {
	return (result ^ value) * 0x100000001b3
}
