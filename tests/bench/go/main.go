// Command bench is the Go half of the benchmark.
//
// It runs lines of work one after the other and says on standard output when each begins and ends. It measures
// nothing itself: a guest's clock shows virtual time, so whoever reads the markers keeps the time.
//
//	@@ start               the program is running
//	@@ begin go-fib        the line's work starts
//	@@ end go-fib RESULT   it is done; RESULT depends on the work alone and must be equal everywhere
//	@@ done                all lines are done
//
// Arguments are the names of the lines to run; without any, all are, and "nothing" runs none.
package main

import (
	"fmt"
	"os"
	"runtime"
)

// line is a piece of work with a checkable result.
type line struct {
	name string
	work func() uint64
}

var lines = []line{
	{"go-fib", recursion},
	{"go-sha256", hashing},
	{"go-json", encoding},
	{"go-sort", sorting},
	{"go-map", mapping},
	{"go-channels-1", func() uint64 { return pipeline(1) }},
	{"go-channels-4", func() uint64 { return pipeline(4) }},
	{"go-nbody", orbits},
	{"go-matmul", matrices},
}

func main() {
	fmt.Println("@@ start")
	chosen, err := choose(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	for _, line := range chosen {
		// No line pays for the garbage of the one before.
		runtime.GC()
		fmt.Println("@@ begin", line.name)
		result := line.work()
		fmt.Printf("@@ end %s %016x\n", line.name, result)
	}
	fmt.Println("@@ done")
}

// choose returns the lines with the given names, or all.
func choose(names []string) ([]line, error) {
	if len(names) == 0 {
		return lines, nil
	}
	var chosen []line
next:
	for _, name := range names {
		if name == "nothing" {
			continue
		}
		for _, line := range lines {
			if line.name == name {
				chosen = append(chosen, line)
				continue next
			}
		}
		return nil, fmt.Errorf("there is no line %q", name)
	}
	return chosen, nil
}

// generator is xorshift64*: the same numbers everywhere, and no lock.
type generator uint64

func (g *generator) next() uint64 {
	x := uint64(*g)
	x ^= x >> 12
	x ^= x << 25
	x ^= x >> 27
	*g = generator(x)
	return x * 0x2545f4914f6cdd1d
}

// mix folds a value into a result.
func mix(result, value uint64) uint64 {
	return (result ^ value) * 0x100000001b3
}
