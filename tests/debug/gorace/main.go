// Command gorace lets two goroutines add to one counter without a lock. Each also counts for itself, so that a lost
// update shows soon after it has happened: there the program stops.
package main

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
)

const rounds = 3_000_000

var (
	counter int64
	tally   [2]int64
	noise   [2]uint64
)

//go:noinline
func lost(sum int64) {
	fmt.Println("lost update:", sum, "counted, the counter says", counter)
	os.Exit(1)
}

//go:noinline
func increment(worker int) {
	value := counter
	// The window.
	noise[worker] = noise[worker]*6364136223846793005 + 1
	noise[worker] ^= noise[worker] >> 29
	counter = value + 1
	tally[worker]++
	// The other goroutine may stand between its two updates: one is no loss.
	sum := atomic.LoadInt64(&tally[0]) + atomic.LoadInt64(&tally[1])
	if sum > atomic.LoadInt64(&counter)+1 {
		lost(sum)
	}
}

func count(worker int) {
	for i := 0; i < rounds; i++ {
		// Something else to do, so that the window is small.
		for j := 0; j < 4; j++ {
			noise[worker] = noise[worker]*6364136223846793005 + 1
		}
		increment(worker)
	}
}

func main() {
	runtime.GOMAXPROCS(2)
	var running sync.WaitGroup
	for worker := 0; worker < 2; worker++ {
		running.Add(1)
		go func(worker int) {
			defer running.Done()
			count(worker)
		}(worker)
	}
	running.Wait()
	fmt.Println("no update lost:", counter)
}
