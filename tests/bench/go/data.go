package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"runtime"
	"sort"
	"strconv"
	"sync"
)

// order is a document as web services exchange them.
type order struct {
	ID       uint64            `json:"id"`
	Customer string            `json:"customer"`
	Paid     bool              `json:"paid"`
	Total    float64           `json:"total"`
	Items    []item            `json:"items"`
	Labels   map[string]string `json:"labels"`
}

type item struct {
	Name  string `json:"name"`
	Count int    `json:"count"`
	Price int64  `json:"price"`
}

// encoding writes and reads JSON: reflection, allocation, bytes looked at one by one.
func encoding() uint64 {
	pick := generator(11)
	orders := make([]order, 200)
	for i := range orders {
		o := &orders[i]
		o.ID = pick.next()
		o.Customer = fmt.Sprintf("customer \"%d\" \u00e9", pick.next()%1000)
		o.Paid = pick.next()%2 == 0
		o.Total = float64(pick.next()%1_000_000) / 100
		for k := 0; k < 5; k++ {
			o.Items = append(o.Items, item{"item-" + strconv.Itoa(k), int(pick.next() % 10), int64(pick.next() % 5000)})
		}
		o.Labels = map[string]string{"region": "r" + strconv.Itoa(i%7), "channel": "web", "note": "<none>"}
	}
	var result uint64
	for round := 0; round < 110; round++ {
		text, err := json.Marshal(orders)
		if err != nil {
			panic(err)
		}
		orders = nil
		if err := json.NewDecoder(bytes.NewReader(text)).Decode(&orders); err != nil {
			panic(err)
		}
		orders[round%len(orders)].Total++
		result = mix(result, uint64(len(text)))
	}
	return mix(result, uint64(orders[3].Total*100))
}

// record is sorted by two keys.
type record struct {
	group int
	key   uint64
	text  string
}

// sorting is comparisons behind function values, and branches that no predictor knows.
func sorting() uint64 {
	pick := generator(13)
	numbers := make([]int, 1_000_000)
	for i := range numbers {
		numbers[i] = int(pick.next() >> 1)
	}
	sort.Ints(numbers)
	records := make([]record, 400_000)
	for i := range records {
		key := pick.next()
		records[i] = record{int(key % 97), key, strconv.FormatUint(key, 36)}
	}
	sort.Slice(records, func(i, j int) bool {
		if records[i].group != records[j].group {
			return records[i].group < records[j].group
		}
		return records[i].text < records[j].text
	})
	var result uint64
	for i := 0; i < len(records); i += 1000 {
		result = mix(mix(result, uint64(numbers[2*i])), records[i].key)
	}
	return result
}

// mapping inserts into, reads and shrinks hash tables with integer and string keys.
func mapping() uint64 {
	pick := generator(17)
	counts := make(map[uint64]uint64)
	for i := 0; i < 2_500_000; i++ {
		key := pick.next() % 400_000
		counts[key] += uint64(i)
		if i%5 == 0 {
			delete(counts, pick.next()%400_000)
		}
	}
	words := make(map[string]int)
	for i := 0; i < 800_000; i++ {
		words["key-"+strconv.FormatUint(pick.next()%50_000, 10)]++
	}
	// The order of iteration is random, so only sums may enter the result.
	var sum uint64
	for key, count := range counts {
		sum += mix(key, count)
	}
	for word, count := range words {
		sum += mix(uint64(len(word)), uint64(count))
	}
	return sum
}

// pipeline moves numbers through stages of goroutines, with unbuffered and buffered channels, on so many threads.
func pipeline(threads int) uint64 {
	before := runtime.GOMAXPROCS(threads)
	defer runtime.GOMAXPROCS(before)
	const numbers, workers = 1_500_000, 8
	source := make(chan uint64)
	squares := make(chan uint64, 64)
	go func() {
		pick := generator(19)
		for i := 0; i < numbers; i++ {
			source <- pick.next()
		}
		close(source)
	}()
	var working sync.WaitGroup
	var lock sync.Mutex
	var seen uint64
	for i := 0; i < workers; i++ {
		working.Add(1)
		go func() {
			defer working.Done()
			for number := range source {
				lock.Lock()
				seen++
				lock.Unlock()
				squares <- number * number
			}
		}()
	}
	go func() {
		working.Wait()
		close(squares)
	}()
	var sum uint64
	for square := range squares {
		sum += square
	}
	return mix(sum, seen)
}
