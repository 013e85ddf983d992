package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// suspiciousOf is how many requests there are for each that looks like an attack.
const suspiciousOf = 100

// mostDue bounds requests that are due and not sent yet.
const mostDue = 100_000

// users send requests at a rate, whatever becomes of earlier ones.
type users struct {
	url    string
	client *http.Client

	mu         sync.Mutex
	took       []time.Duration // from when each was due
	sent       int
	failed     int
	suspicious int
}

func newUsers(url string) *users {
	return &users{url: url, client: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}}
}

func (u *users) close() { u.client.CloseIdleConnections() }

// run sends so many requests a second for a time, and tells each second how long
// those of it took.
func (u *users) run(ctx context.Context, perSecond float64, long time.Duration, each func(took []time.Duration)) {
	ctx, cancel := context.WithTimeout(ctx, long)
	defer cancel()
	due := make(chan time.Time, mostDue)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for at := range due {
				u.send(ctx, at)
			}
		})
	}
	defer wg.Wait()
	defer close(due)
	wg.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		told := u.count()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				u.mu.Lock()
				took := slices.Clone(u.took[told:])
				u.mu.Unlock()
				told += len(took)
				each(took)
			}
		}
	})
	limiter := rate.NewLimiter(rate.Limit(perSecond), 1+int(perSecond/100)) // a sleep may be some ms too long
	for limiter.Wait(ctx) == nil {
		select {
		case due <- time.Now():
		case <-ctx.Done():
		}
	}
}

func (u *users) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.took)
}

// send leaves out what was still due when the time was over.
func (u *users) send(ctx context.Context, at time.Time) {
	if ctx.Err() != nil {
		return
	}
	u.mu.Lock()
	suspicious := u.sent%suspiciousOf == 0
	u.sent++
	u.mu.Unlock()
	path := "/items/7"
	if suspicious {
		path = "/find?file=../../etc/passwd"
	}
	res, err := u.client.Get(u.url + path)
	if err == nil {
		_, err = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
		if res.StatusCode >= 500 {
			err = fmt.Errorf("status %d", res.StatusCode)
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err != nil {
		u.failed++
		return
	}
	if suspicious {
		u.suspicious++
	}
	u.took = append(u.took, time.Since(at))
}

// cut takes what was measured so far.
func (u *users) cut() (took []time.Duration, failed, suspicious int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	took, failed, suspicious = u.took, u.failed, u.suspicious
	u.took, u.failed, u.suspicious = nil, 0, 0
	return took, failed, suspicious
}

// quantile of times; 0: there are none.
func quantile(took []time.Duration, q float64) time.Duration {
	if len(took) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(took))
	return sorted[int(q*float64(len(sorted)-1))]
}
