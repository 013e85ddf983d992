package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/result"
)

// section is the outcome of a scenario.
type section interface {
	write(*strings.Builder)
	// faults are those that make the figures worthless.
	faults() error
}

// surroundings are what every section tells of its run.
type surroundings struct {
	machine result.Machine
	envoy   string // version
	date    time.Time
	rounds  int
	pinned  bool
	foreign float64 // share of the gateways' CPU that others had; negative: unknown
}

// surroundings are those since the last call.
func (b *bench) surroundings() surroundings {
	s := surroundings{machine: b.machine, envoy: b.version, date: b.date, rounds: b.options.rounds, pinned: b.pinning.on, foreign: -1}
	if b.measured > 0 {
		s.foreign = b.foreign.Seconds() / b.measured.Seconds()
	}
	b.measured, b.foreign = 0, 0
	return s
}

func (s surroundings) heading(b *strings.Builder) {
	fmt.Fprintf(b, "%s; Envoy %s, `--concurrency 1`; %s", s.machine, s.envoy, s.date.Format(time.DateOnly))
	if s.machine.Load != "" {
		fmt.Fprintf(b, "; load average before the run: %s", s.machine.Load)
	}
	if s.foreign >= 0 {
		fmt.Fprintf(b, "; other processes and the kernel had %.1f %% of the gateways' CPU", 100*s.foreign)
	}
	b.WriteString(".\n")
}

// method is how to read the figures of rounds, which are compared with something.
func (s surroundings) method(with string) string {
	m := "Figures are medians over rounds; ratios and Δ are medians of each round's own comparison with " + with + ". " +
		"After a median stands its interval of 95 % confidence, between order statistics; with less than six rounds, the lowest and highest. "
	if s.pinned {
		return m + "Gateways have one CPU; generator, backend and receivers share another."
	}
	return m + "Nothing was pinned, as there is only one CPU: gateways, generator, backend and receivers compete for it."
}

// notes tells what went wrong with mirroring.
func notes(b *strings.Builder, variants []variant, title string, fs []figures) {
	for i, f := range fs {
		if f.noted != "" {
			fmt.Fprintf(b, "\nNote: %s, %s: %s\n", variants[i].name, title, f.noted)
		}
	}
}

// publish prints a section, or writes it into the file between the marks of
// that name, unless users of a gateway saw errors.
func publish(name string, s section, file string, stdout io.Writer) error {
	var out strings.Builder
	s.write(&out)
	faults := s.faults()
	if file == "" || faults != nil {
		if _, err := fmt.Fprintln(stdout, out.String()); err != nil {
			return fmt.Errorf("print report: %w", err)
		}
		return faults
	}
	return result.WriteInto(file, name, out.String())
}
