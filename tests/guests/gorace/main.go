// Command gorace lets goroutines lose each other's updates, and shows every choice that Go's runtime makes at
// random. All of it must follow from the seed.
package main

import (
	"fmt"
	"runtime"
	"sync"
)

var counter int

//go:noinline
func increment() {
	value := counter
	for i := 0; i < 16; i++ {
		pause++
	}
	counter = value + 1
}

var pause int

func main() {
	runtime.GOMAXPROCS(4)
	var running sync.WaitGroup
	for worker := 0; worker < 4; worker++ {
		running.Add(1)
		go func() {
			defer running.Done()
			for i := 0; i < 2_000_000; i++ {
				increment()
			}
		}()
	}
	running.Wait()
	fmt.Println("gorace: counter", counter)

	order := ""
	set := map[int]bool{}
	for i := 0; i < 12; i++ {
		set[i] = true
	}
	for key := range set {
		order += fmt.Sprint(key, " ")
	}
	fmt.Println("gorace: map order", order)

	ready := []chan int{make(chan int, 40), make(chan int, 40)}
	for i := 0; i < 40; i++ {
		ready[0] <- 0
		ready[1] <- 1
	}
	choices := ""
	for i := 0; i < 40; i++ {
		select {
		case value := <-ready[0]:
			choices += fmt.Sprint(value)
		case value := <-ready[1]:
			choices += fmt.Sprint(value)
		}
	}
	fmt.Println("gorace: choices", choices)
}
