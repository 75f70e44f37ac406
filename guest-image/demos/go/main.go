// Everything in a Go program that differs from one run to the next: map iteration, select, the goroutine
// scheduler, data races, random numbers and the clock. Under Orrery it differs from seed to seed only.
package main

import (
	crand "crypto/rand"
	"fmt"
	"math/rand"
	"runtime"
	"strings"
	"sync"
	"time"
)

func main() {
	runtime.GOMAXPROCS(4)
	fmt.Printf("go: %s, GOMAXPROCS=%d\n", runtime.Version(), runtime.GOMAXPROCS(0))
	fmt.Println("time:", time.Now().UTC().Format(time.RFC3339Nano))
	fmt.Println("map order:", mapOrder())
	fmt.Println("select choices:", selectChoices(64))
	fmt.Println("worker log:", workerLog(4, 12))
	for round := 0; round < 2; round++ {
		const workers, increments = 4, 200000
		got := lostUpdates(workers, increments)
		fmt.Printf("racing counter: %d of %d, %d updates lost\n", got, workers*increments, workers*increments-got)
	}
	rand.Seed(time.Now().UnixNano())
	fmt.Println("math/rand:", rand.Perm(12))
	var token [16]byte
	if _, err := crand.Read(token[:]); err != nil {
		panic(err)
	}
	fmt.Printf("crypto/rand: %x\n", token)
	fmt.Println("time:", time.Now().UTC().Format(time.RFC3339Nano))
}

// mapOrder is the order in which the runtime iterates over a map: random by design.
func mapOrder() string {
	planets := map[string]int{"Mercury": 0, "Venus": 0, "Earth": 3, "Mars": 2, "Jupiter": 95, "Saturn": 146,
		"Uranus": 28, "Neptune": 16}
	var names []string
	for name := range planets {
		names = append(names, name)
	}
	return strings.Join(names, " ")
}

// selectChoices is which of three ready channels the runtime picks, again and again.
func selectChoices(count int) string {
	channels := [3]chan struct{}{}
	for i := range channels {
		channels[i] = make(chan struct{}, count)
		for j := 0; j < count; j++ {
			channels[i] <- struct{}{}
		}
	}
	var picks strings.Builder
	for i := 0; i < count; i++ {
		select {
		case <-channels[0]:
			picks.WriteByte('a')
		case <-channels[1]:
			picks.WriteByte('b')
		case <-channels[2]:
			picks.WriteByte('c')
		}
	}
	return picks.String()
}

// workerLog is the order in which workers reach a shared log, each computing between its entries.
func workerLog(workers, steps int) string {
	var (
		mutex sync.Mutex
		log   strings.Builder
		group sync.WaitGroup
	)
	for worker := 0; worker < workers; worker++ {
		group.Add(1)
		go func(name byte) {
			defer group.Done()
			sum := uint64(name)
			for step := 0; step < steps; step++ {
				for i := 0; i < 400000; i++ {
					sum = sum*6364136223846793005 + 1442695040888963407
				}
				mutex.Lock()
				log.WriteByte(name)
				mutex.Unlock()
				if sum == 0 {
					runtime.Gosched()
				}
			}
		}(byte('A' + worker))
	}
	group.Wait()
	return log.String()
}

// shared is what the workers of lostUpdates fight over. Adding to it without a lock is the bug on show.
var shared int

// step reads, dawdles and writes: whoever is interrupted meanwhile writes back an old value, and the updates that
// others made are lost.
//
//go:noinline
func step() {
	value := shared
	for i := 0; i < 20; i++ {
		value += i & 1
	}
	shared = value - 9
}

// lostUpdates is the final value of a counter that several goroutines increment without synchronisation.
func lostUpdates(workers, increments int) int {
	shared = 0
	var group sync.WaitGroup
	for worker := 0; worker < workers; worker++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for i := 0; i < increments; i++ {
				step()
			}
		}()
	}
	group.Wait()
	return shared
}
