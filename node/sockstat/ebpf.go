package sockstat

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// footerMagic ends the iterator's output; it changes with the form of a record.
const footerMagic = 0x31304b434f535350 // "PSSOCK01"

const (
	recordBytes = int(unsafe.Sizeof(record{}))
	footerBytes = int(unsafe.Sizeof(socketsFooter{}))
)

// programs are attached to a cgroup; they stay so until closed, or as long as
// their links are pinned.
type programs struct {
	opened   link.Link  // tags sockets
	sockets  *link.Iter // reads them
	existing error      // why sockets opened before could not be tagged
}

// attach loads the programs for the sockets of a cgroup with these local ports.
func attach(h host, cgroup string, ports []uint16, version string) (*programs, error) {
	if err := h.refuse(); err != nil {
		return nil, err
	}
	if err := checkCgroup2(cgroup); err != nil {
		return nil, err
	}
	// Kernels before 5.11 count maps as locked memory. Where the limit can't be
	// lifted, loading tells.
	_ = rlimit.RemoveMemlock()
	c, existing, err := loadPrograms(socketsFooter{Magic: footerMagic, LoadedNs: uint64(time.Now().UnixNano())}, cgroup, ports, version)
	if err != nil {
		return nil, fmt.Errorf("load: %w", h.hint(firstLine(err)))
	}
	defer c.Close() // links keep what they need
	p := &programs{existing: existing}
	p.opened, err = link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupSockOps, Program: c.Programs[socketsProgTagOpened]})
	if err != nil {
		return nil, fmt.Errorf("attach to cgroup %s: %w", cgroup, err)
	}
	p.sockets, err = link.AttachIter(link.IterOptions{Program: c.Programs[socketsProgSockets], Map: c.Maps[socketsMapTags]})
	if err != nil {
		p.close()
		return nil, fmt.Errorf("attach the iterator: %w", err)
	}
	if existing == nil {
		if p.existing = tagExisting(c.Programs[socketsProgTagExisting]); p.existing != nil {
			p.existing = fmt.Errorf("tag sockets opened before: %w", p.existing)
		}
	}
	return p, nil
}

// loadPrograms loads what the kernel takes: not every one lets iterators tag
// sockets, and the error says so.
func loadPrograms(f socketsFooter, cgroup string, ports []uint16, version string) (*ebpf.Collection, error, error) {
	if len(ports) == 0 || len(ports) > len(f.Ports) {
		return nil, nil, fmt.Errorf("%d ports; 1 to %d can be watched", len(ports), len(f.Ports))
	}
	copy(f.Ports[:], ports)
	copy(f.Version[:len(f.Version)-1], version)
	copy(f.Cgroup[:len(f.Cgroup)-1], cgroup)
	load := func(without string) (*ebpf.Collection, error) {
		spec, err := loadSockets()
		if err != nil {
			return nil, err
		}
		delete(spec.Programs, without)
		if err := spec.Variables[socketsVarLoad].Set(f); err != nil {
			return nil, err
		}
		return ebpf.NewCollection(spec)
	}
	c, err := load("")
	if err == nil {
		return c, nil, nil
	}
	var verifier *ebpf.VerifierError
	if !errors.As(err, &verifier) && !errors.Is(err, ebpf.ErrNotSupported) {
		return nil, nil, err
	}
	c, second := load(socketsProgTagExisting)
	return c, errors.New("this kernel's iterators cannot tag sockets; 5.12 and later can"), second
}

// tagExisting runs the program over this network namespace's TCP sockets.
func tagExisting(p *ebpf.Program) error {
	it, err := link.AttachIter(link.IterOptions{Program: p})
	if err != nil {
		return err
	}
	defer it.Close()
	r, err := it.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(io.Discard, r)
	return err
}

func (p *programs) close() error {
	err := p.opened.Close()
	if p.sockets != nil {
		err = errors.Join(err, p.sockets.Close())
	}
	return err
}

// firstLine leaves out the log of the kernel's verifier, but for its verdict.
func firstLine(err error) error {
	var v *ebpf.VerifierError
	if errors.As(err, &v) && len(v.Log) > 0 {
		last := ""
		for _, line := range v.Log {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "processed ") {
				last = line
			}
		}
		return fmt.Errorf("%w: %s", v.Cause, last)
	}
	return err
}

// iterator is a back end that reads a BPF iterator.
type iterator struct {
	backend string
	open    func() (io.ReadCloser, error) // a file
	shut    func() error
	buf     []record
}

func (i *iterator) name() string { return i.backend }
func (i *iterator) close() error { return i.shut() }

func (i *iterator) read() ([]record, Fields, error) {
	records, _, err := i.readAll()
	return records, Listening | Connected | Windows, err
}

// readAll runs the iterator once. The records are valid until the next time.
func (i *iterator) readAll() ([]record, socketsFooter, error) {
	var f socketsFooter
	r, err := i.open()
	if err != nil {
		return nil, f, fmt.Errorf("open the iterator: %w", err)
	}
	defer r.Close()
	file, ok := r.(interface{ Fd() uintptr })
	if !ok {
		return nil, f, errors.New("open the iterator: it is no file")
	}
	if i.buf == nil {
		i.buf = make([]record, 128)
	}
	n := 0
	for {
		b := unsafe.Slice((*byte)(unsafe.Pointer(&i.buf[0])), len(i.buf)*recordBytes)
		got, err := readHeld(file.Fd(), b[n:])
		if err != nil {
			return nil, f, fmt.Errorf("read the iterator: %w", err)
		}
		if got == 0 {
			break
		}
		n += got
		if n == len(b) {
			i.buf = append(i.buf, make([]record, len(i.buf))...)
		}
	}
	if n < footerBytes || (n-footerBytes)%recordBytes != 0 {
		return nil, f, errors.New("the iterator is of another version")
	}
	count := (n - footerBytes) / recordBytes
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&f)), footerBytes), unsafe.Slice((*byte)(unsafe.Pointer(&i.buf[0])), n)[count*recordBytes:])
	if f.Magic != footerMagic {
		return nil, f, errors.New("the iterator is of another version")
	}
	return i.buf[:count], f, nil
}

// readHeld is read(2) without telling Go's scheduler, which would give the
// processor away meanwhile: a process with much to do gets it back for this
// goroutine only after all others that are ready. It takes some ten microseconds.
func readHeld(fd uintptr, b []byte) (int, error) {
	for {
		n, _, e := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, e
		}
	}
}

// openEBPF loads the programs for this process alone.
func openEBPF(h host, c Config) (*iterator, *programs, error) {
	cgroup := c.Cgroup
	if cgroup == "" {
		var err error
		if cgroup, err = h.ownCgroup(); err != nil {
			return nil, nil, err
		}
	}
	p, err := attach(h, cgroup, []uint16{c.Listen.Port()}, c.Version)
	if err != nil {
		return nil, nil, err
	}
	return &iterator{backend: EBPF, open: p.sockets.Open, shut: p.close}, p, nil
}

// text is a C string.
func text(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

func (f *socketsFooter) ports() []uint16 {
	return slices.DeleteFunc(slices.Clone(f.Ports[:]), func(p uint16) bool { return p == 0 })
}
