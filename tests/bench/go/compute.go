package main

import (
	"crypto/sha256"
	"encoding/binary"
	"math"
)

// recursion is calls, returns and small integer arithmetic.
func recursion() uint64 {
	return fib(40)
}

//go:noinline
func fib(n uint64) uint64 {
	if n < 2 {
		return n
	}
	return fib(n-1) + fib(n-2)
}

// hashing is SHA-256 as the standard library does it: vector instructions where the CPU has them.
func hashing() uint64 {
	block := make([]byte, 1<<20)
	fill := generator(7)
	for i := 0; i < len(block); i += 8 {
		binary.LittleEndian.PutUint64(block[i:], fill.next())
	}
	var sum [sha256.Size]byte
	for i := 0; i < 170; i++ {
		copy(block, sum[:])
		sum = sha256.Sum256(block)
	}
	return binary.LittleEndian.Uint64(sum[:])
}

// body is a point mass.
type body struct {
	position, velocity [3]float64
	mass               float64
}

// orbits integrates five bodies: scalar floating point with square roots and divisions.
func orbits() uint64 {
	place := generator(3)
	bodies := make([]body, 5)
	for i := range bodies {
		b := &bodies[i]
		for k := 0; k < 3; k++ {
			b.position[k] = 10 * float64(int64(place.next())) / (1 << 63)
			b.velocity[k] = float64(int64(place.next())) / (1 << 63)
		}
		b.mass = 1 + float64(place.next()>>40)/(1<<24)
	}
	for step := 0; step < 2_600_000; step++ {
		advance(bodies, 1.0/1024)
	}
	var result uint64
	for _, b := range bodies {
		for k := 0; k < 3; k++ {
			result = mix(result, math.Float64bits(b.position[k]))
		}
	}
	return result
}

func advance(bodies []body, step float64) {
	for i := range bodies {
		a := &bodies[i]
		for j := i + 1; j < len(bodies); j++ {
			b := &bodies[j]
			dx := a.position[0] - b.position[0]
			dy := a.position[1] - b.position[1]
			dz := a.position[2] - b.position[2]
			// Softened, so that close encounters stay finite.
			square := dx*dx + dy*dy + dz*dz + 0.01
			pull := step / (square * math.Sqrt(square))
			a.velocity[0] -= dx * b.mass * pull
			a.velocity[1] -= dy * b.mass * pull
			a.velocity[2] -= dz * b.mass * pull
			b.velocity[0] += dx * a.mass * pull
			b.velocity[1] += dy * a.mass * pull
			b.velocity[2] += dz * a.mass * pull
		}
	}
	for i := range bodies {
		b := &bodies[i]
		for k := range b.position {
			b.position[k] += step * b.velocity[k]
		}
	}
}

// matrices multiplies square matrices in the plain order: floating point that waits for memory.
func matrices() uint64 {
	const n = 640
	fill := generator(5)
	a, b, c := make([]float64, n*n), make([]float64, n*n), make([]float64, n*n)
	for i := range a {
		a[i] = float64(fill.next()>>40) / (1 << 24)
		b[i] = float64(fill.next()>>40) / (1 << 24)
	}
	for i := 0; i < n; i++ {
		row := c[i*n : i*n+n]
		for k := 0; k < n; k++ {
			factor := a[i*n+k]
			for j, value := range b[k*n : k*n+n] {
				row[j] += factor * value
			}
		}
	}
	var result uint64
	for _, value := range c {
		result = mix(result, math.Float64bits(value))
	}
	return result
}
