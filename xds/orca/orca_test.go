package orca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	data "github.com/cncf/xds/go/xds/data/orca/v3"
	service "github.com/cncf/xds/go/xds/service/orca/v3"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/periscope-mesh/periscope/mirror/load"
	nodeorca "github.com/periscope-mesh/periscope/node/orca"
	"github.com/periscope-mesh/periscope/xds/certs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is a real node's side of the reports.
type node struct {
	server *nodeorca.Server
	addr   string
	stop   func()

	mu   sync.Mutex
	load load.Report
}

func startNode(t *testing.T, addr string, r load.Report, certified bool, options ...grpc.ServerOption) *node {
	t.Helper()
	n := &node{load: r}
	var err error
	n.server, err = nodeorca.New(nodeorca.Config{Report: n.report, Certified: certified, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	n.addr, n.stop = serve(t, addr, n.server.Register, options...)
	return n
}

// serve serves a service on an address, until stop or the test's end.
func serve(t *testing.T, addr string, register func(grpc.ServiceRegistrar), options ...grpc.ServerOption) (string, func()) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	g := nodeorca.NewGRPCServer(options...)
	register(g)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	stop := sync.OnceFunc(func() {
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return l.Addr().String(), stop
}

func (n *node) report() (load.Report, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.load, nil
}

func (n *node) set(change func(*load.Report)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	change(&n.load)
}

// control is a control plane that keeps the newest update of each node.
type control struct {
	*Watcher
	stop func()

	mu     sync.Mutex
	newest map[string]Update
}

func startControl(t *testing.T, change func(*Config)) *control {
	t.Helper()
	c := &control{newest: map[string]Update{}}
	config := Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewPedanticRegistry(), Deliver: func(u Update) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.newest[u.Address] = u
	}}
	if change != nil {
		change(&config)
	}
	w, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	c.Watcher = w
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	c.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(c.stop)
	return c
}

func (c *control) update(addr string) Update {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.newest[addr]
}

func (c *control) node(addr string) Node {
	nodes, _ := c.Nodes()
	for _, n := range nodes {
		if n.Address == addr {
			return n
		}
	}
	return Node{}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for start := time.Now(); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Since(start) > 15*time.Second {
			t.Fatalf("%s: not within 15 s", what)
		}
	}
}

func demand(vm string, eligible uint64) load.Demand {
	return load.Demand{Gateway: "g", VM: vm, Policy: "p", Eligible: eligible}
}

// Two control planes hear the same of a node, whole reports though it sends
// parts, and what is urgent at once.
func TestTwoControlPlanes(t *testing.T) {
	n := startNode(t, "127.0.0.1:0", load.Report{Node: "n", Epoch: 1, Demands: []load.Demand{demand("a", 1), demand("b", 1)}}, false)
	one, two := startControl(t, nil), startControl(t, nil)
	for _, c := range []*control{one, two} {
		c.SetNodes([]string{n.addr})
		eventually(t, "the first report", func() bool { return c.update(n.addr).Report != nil })
	}
	want := []load.Demand{demand("a", 1), demand("b", 2), demand("c", 3)}
	n.set(func(r *load.Report) { r.Demands = want; r.Queue = 80 * time.Millisecond })
	start := time.Now()
	n.server.Urge()
	for _, c := range []*control{one, two} {
		eventually(t, "the second", func() bool { return c.update(n.addr).Report.Queue == 80*time.Millisecond })
		u := c.update(n.addr)
		if !slices.Equal(u.Report.Demands, want) || u.Report.Partial || time.Since(u.Received) > time.Since(start) {
			t.Errorf("got %+v at %v", u.Report, u.Received)
		}
		if s := c.node(n.addr); s.State != StateReporting || s.Fault != "" || s.Streams != 1 || s.Reports < 2 || s.ConnectedAt.IsZero() {
			t.Errorf("state %+v", s)
		}
	}
	t.Logf("urgent reports took %v to two control planes", time.Since(start))
	if known, reporting := one.count(); known != 1 || reporting != 1 {
		t.Errorf("%d of %d report", reporting, known)
	}
}

// A node that comes back, as another epoch, is heard again by all; one that is
// not wanted any more is left alone.
func TestRestart(t *testing.T) {
	n := startNode(t, "127.0.0.1:0", load.Report{Node: "n", Epoch: 1, Analysed: 100}, false)
	one, two := startControl(t, nil), startControl(t, nil)
	for _, c := range []*control{one, two} {
		c.SetNodes([]string{n.addr})
		eventually(t, "the first report", func() bool { return c.update(n.addr).Report != nil })
	}
	n.stop()
	eventually(t, "a fault", func() bool { return one.node(n.addr).Fault != "" && one.node(n.addr).ConnectedAt.IsZero() })
	if s := one.node(n.addr); s.Report == nil || s.Report.Analysed != 100 {
		t.Errorf("what was told last is gone: %+v", s)
	}
	n = startNode(t, n.addr, load.Report{Node: "n", Epoch: 2, Analysed: 1}, false)
	for _, c := range []*control{one, two} {
		eventually(t, "the report of the new epoch", func() bool { return c.update(n.addr).Report.Epoch == 2 })
		if s := c.node(n.addr); s.Restarts != 1 || s.Streams != 2 || s.Fault != "" {
			t.Errorf("state %+v", s)
		}
	}
	one.SetNodes(nil)
	if nodes, _ := one.Nodes(); len(nodes) != 0 {
		t.Errorf("%d nodes are known", len(nodes))
	}
	before := one.update(n.addr)
	n.set(func(r *load.Report) { r.Analysed = 50 })
	eventually(t, "news at the other", func() bool { return two.update(n.addr).Report.Analysed == 50 })
	if one.update(n.addr) != before {
		t.Error("a node that is not wanted is heard")
	}
}

// strange serves what the test has it send.
type strange struct {
	service.UnimplementedOpenRcaServiceServer
	streams chan func(grpc.ServerStreamingServer[data.OrcaLoadReport]) error
}

func (s *strange) StreamCoreMetrics(_ *service.OrcaLoadReportRequest, stream grpc.ServerStreamingServer[data.OrcaLoadReport]) error {
	select {
	case f := <-s.streams:
		return f(stream)
	case <-stream.Context().Done():
		return nil
	}
}

func startStrange(t *testing.T) (*strange, string) {
	s := &strange{streams: make(chan func(grpc.ServerStreamingServer[data.OrcaLoadReport]) error)}
	addr, _ := serve(t, "127.0.0.1:0", func(r grpc.ServiceRegistrar) { service.RegisterOpenRcaServiceServer(r, s) })
	return s, addr
}

// Demands that are gone stay until the next full report; what is too much then is left out.
func TestMoreAndMoreDemands(t *testing.T) {
	last := &load.Report{Node: "n", Epoch: 1, Demands: []load.Demand{demand("a", 1)}}
	part := &load.Report{Node: "n", Epoch: 1, Partial: true}
	for i := range load.MaxDemands {
		part.Demands = append(part.Demands, demand(fmt.Sprintf("z%05d", i), 1))
	}
	r, err := whole(last, part)
	if err != nil || r.Partial || len(r.Demands) != load.MaxDemands || r.Demands[0] != last.Demands[0] {
		t.Errorf("%v, %d demands", err, len(r.Demands))
	}
}

// A node whose reports are garbage is named as such, and heard again once they
// are none; so is one that falls silent.
func TestGarbageAndSilence(t *testing.T) {
	s, addr := startStrange(t)
	c := startControl(t, func(c *Config) { c.stall, c.backoff = 500*time.Millisecond, 2*minBackoff })
	c.SetNodes([]string{addr})
	good := func(epoch uint64) *data.OrcaLoadReport {
		return load.Encode(&load.Report{Node: "n", Epoch: epoch, Demands: []load.Demand{demand("a", 1)}})
	}
	other := load.Encode(&load.Report{Node: "n", Epoch: 9, Partial: true})
	huge := &data.OrcaLoadReport{NamedMetrics: map[string]float64{strings.Repeat("x", load.MaxBytes): 1}}
	for name, tc := range map[string]struct {
		send []*data.OrcaLoadReport
		want string
	}{
		"no report":                {[]*data.OrcaLoadReport{{}}, "no report of an analysis node"},
		"part of nothing":          {[]*data.OrcaLoadReport{other}, "partial report without"},
		"part of another epoch's":  {[]*data.OrcaLoadReport{good(1), other}, "partial report without"},
		"a demand that can't be":   {[]*data.OrcaLoadReport{{NamedMetrics: map[string]float64{"periscope.node/n": 1, "periscope.demand/g/v/p/eligible": -1}}}, "eligible is -1"},
		"more bytes than there be": {[]*data.OrcaLoadReport{good(1), huge}, "larger than max"},
		"silence":                  {[]*data.OrcaLoadReport{good(1)}, "no report came in time"},
		"silence from the start":   {nil, "no report came in time"},
	} {
		t.Run(name, func(t *testing.T) {
			begun := make(chan struct{})
			s.streams <- func(stream grpc.ServerStreamingServer[data.OrcaLoadReport]) error {
				close(begun)
				for _, m := range tc.send {
					if err := stream.Send(m); err != nil {
						return err
					}
				}
				<-stream.Context().Done()
				return nil
			}
			<-begun
			eventually(t, "the fault", func() bool { return strings.Contains(c.node(addr).Fault, tc.want) })
			back := make(chan struct{})
			s.streams <- func(stream grpc.ServerStreamingServer[data.OrcaLoadReport]) error {
				err := stream.Send(good(2))
				<-back
				return err
			}
			eventually(t, "a good report", func() bool { n := c.node(addr); return n.Fault == "" && n.Report != nil && n.Report.Epoch == 2 })
			close(back)
		})
	}
}

// While the taker is busy, the newest of each node is what it gets next.
func TestBusyTaker(t *testing.T) {
	n := startNode(t, "127.0.0.1:0", load.Report{Node: "n"}, false)
	got := make(chan uint64)
	c := startControl(t, func(config *Config) {
		config.Deliver = func(u Update) {
			select {
			case got <- u.Report.Analysed:
			case <-t.Context().Done():
			}
		}
	})
	c.SetNodes([]string{n.addr})
	eventually(t, "the first report", func() bool { return c.node(n.addr).Report != nil })
	for i := range 5 {
		n.set(func(r *load.Report) { r.Analysed = uint64(i + 1) })
		eventually(t, "the next report", func() bool { return c.node(n.addr).Report.Analysed == uint64(i+1) })
	}
	first := <-got
	if second := <-got; first != 0 || second != 5 {
		t.Errorf("it gets %d, then %d", first, second)
	}
	select {
	case more := <-got:
		t.Errorf("and then %d", more)
	case <-time.After(100 * time.Millisecond):
	}
}

func TestManyNodes(t *testing.T) {
	var all []string
	for i := range maxNodes + 5 {
		all = append(all, fmt.Sprintf("127.0.0.1:%d", 60000-i))
	}
	w, err := New(Config{Deliver: func(Update) {}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	w.SetNodes(append(all, all...))
	if nodes, left := w.Nodes(); len(nodes) != maxNodes || left != 5 {
		t.Errorf("%d nodes, %d left out", len(nodes), left)
	}
	w.SetNodes(all[:2])
	if nodes, left := w.Nodes(); len(nodes) != 2 || left != 0 {
		t.Errorf("%d nodes, %d left out", len(nodes), left)
	}
}

// In plain text only loopback is watched, and no connection is tried elsewhere.
func TestPlainText(t *testing.T) {
	c := startControl(t, nil)
	c.SetNodes([]string{"192.0.2.7:9091", "nonsense"})
	eventually(t, "faults", func() bool {
		return strings.Contains(c.node("192.0.2.7:9091").Fault, "plain text") && strings.Contains(c.node("nonsense").Fault, "not host:port")
	})
}

// By TLS, both show certificates; who shows none, or one of other authorities,
// hears nothing.
func TestTLS(t *testing.T) {
	logger := slog.New(slog.DiscardHandler)
	ca, others := newAuthority(t), newAuthority(t)
	serverCert, serverKey := ca.issue(t, "node")
	server, err := certs.New(certs.Config{CertFile: serverCert, KeyFile: serverKey, ClientCAFile: ca.file, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	n := startNode(t, "127.0.0.1:0", load.Report{Node: "n", Analysed: 5}, true, grpc.Creds(credentials.NewTLS(server.ServerConfig())))
	client := func(authority *authority, trusted string, shows bool) *control {
		config := certs.ClientConfig{CAFile: trusted, Logger: logger}
		if shows {
			config.CertFile, config.KeyFile = authority.issue(t, "control")
		}
		side, err := certs.NewClient(config)
		if err != nil {
			t.Fatal(err)
		}
		c := startControl(t, func(c *Config) { c.Credentials = side.Credentials() })
		c.SetNodes([]string{n.addr})
		return c
	}
	good := client(ca, ca.file, true)
	eventually(t, "a report by TLS", func() bool { u := good.update(n.addr); return u.Report != nil && u.Report.Analysed == 5 })
	plain := startControl(t, nil)
	plain.SetNodes([]string{n.addr})
	for name, tc := range map[string]struct {
		c    *control
		want string
	}{
		"no certificate": {client(ca, ca.file, false), "certificate that this node trusts"},
		"of others":      {client(others, ca.file, true), "certificate"},
		"trusts others":  {client(ca, others.file, true), "unknown authority"},
		"plain text":     {plain, "rpc error"},
	} {
		eventually(t, name, func() bool { return strings.Contains(tc.c.node(n.addr).Fault, tc.want) })
		if r := tc.c.node(n.addr).Report; r != nil {
			t.Errorf("%s: it hears %+v", name, r)
		}
	}
}

// authority issues certificates for 127.0.0.1.
type authority struct {
	dir, file string
	cert      *x509.Certificate
	key       *ecdsa.PrivateKey
	issued    int
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	a.key = newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.file = a.write(t, "ca.crt", "CERTIFICATE", der)
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *authority) write(t *testing.T, name, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (a *authority) issue(t *testing.T, name string) (cert, key string) {
	t.Helper()
	a.issued++
	private := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(int64(a.issued + 1)), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, private.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return a.write(t, fmt.Sprintf("%d.crt", a.issued), "CERTIFICATE", der), a.write(t, fmt.Sprintf("%d.key", a.issued), "PRIVATE KEY", raw)
}
