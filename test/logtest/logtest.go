// Package logtest is a log that the code under test writes and a test reads.
//
// Only tests may import it; it imports nothing of ours.
package logtest

import (
	"bytes"
	"strings"
	"sync"
)

// Buffer keeps what is written to it. Its methods may be called from several
// goroutines.
type Buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write takes a piece.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// String is all that was written.
func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// Count tells how often a text was written.
func (b *Buffer) Count(text string) int { return strings.Count(b.String(), text) }
