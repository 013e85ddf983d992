package load

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// timer wakes within some ten microseconds. time.Sleep does not: an idle Go
// process sleeps in epoll_wait, which counts milliseconds, and that would be
// more than the latencies measured here.
type timer struct {
	f *os.File
}

func newTimer() (*timer, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create timer: %w", err)
	}
	return &timer{os.NewFile(uintptr(fd), "timerfd")}, nil
}

func (t *timer) close() { t.f.Close() }

// until waits for t0, or not at all when it has passed.
func (t *timer) until(t0 time.Time) error {
	d := time.Until(t0)
	if d <= 0 {
		return nil
	}
	raw, err := t.f.SyscallConn()
	if err != nil {
		return fmt.Errorf("set timer: %w", err)
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.TimerfdSettime(int(fd), 0, &unix.ItimerSpec{Value: unix.NsecToTimespec(int64(d))}, nil)
	})
	if err == nil {
		err = set
	}
	if err != nil {
		return fmt.Errorf("set timer: %w", err)
	}
	var ticks [8]byte
	if _, err := t.f.Read(ticks[:]); err != nil {
		return fmt.Errorf("wait for timer: %w", err)
	}
	return nil
}
