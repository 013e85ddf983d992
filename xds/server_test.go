package xds

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

func eachProtocol(t *testing.T, run func(t *testing.T, protocol string)) {
	for _, p := range []string{protocolSotW, protocolDelta} {
		t.Run(p, func(t *testing.T) { run(t, p) })
	}
}

// either picks what differs between the protocols.
func either(protocol string, sotw, delta reply) reply {
	if protocol == protocolSotW {
		return sotw
	}
	return delta
}

func TestWildcard(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		c := f.dial(p, gatewayNode("a/b"))
		c.subscribe(typeCDS)
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeCDS: {"b=1", "a=1"}}))
		c.accept(typeCDS, reply{names: "a=1 b=1"})

		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeCDS: {"a=1", "b=2"}}))
		c.accept(typeCDS, either(p, reply{names: "a=1 b=2"}, reply{names: "b=2"}))

		// The same content, and a change of another type, send nothing.
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeCDS: {"b=2", "a=1"}, typeLDS: {"l=1"}}))
		c.quiet(f)

		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeCDS: {"b=2"}}))
		c.accept(typeCDS, either(p, reply{names: "b=2"}, reply{removed: "a"}))
		f.server.SetSnapshot(testKey, snap(t, nil))
		c.accept(typeCDS, either(p, reply{}, reply{removed: "b"}))
		c.quiet(f)
	})
}

func TestEmptyTypeIsAnswered(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {}}))
		c := f.dial(p, gatewayNode("a/b"))
		for _, typeURL := range []string{typeLDS, typeCDS, "some.unknown/Type"} {
			c.subscribe(typeURL)
			c.accept(typeURL, reply{})
		}
		c.quiet(f)
	})
}

// TestClientsNonce: istiod's first request carries a nonce of its own making.
func TestClientsNonce(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {"l=1"}}))
		c := f.dial(p, gatewayNode("a/b"))
		c.nonce[typeLDS] = "Mon Jan 2 15:04:05 2026"
		c.request(typeLDS, nil, nil, "", nil)
		c.want(typeLDS, reply{names: "l=1"})
		if s := f.server.Connections()[0].Types[typeLDS]; s.Acked != "" {
			t.Errorf("taken as an acknowledgement: %+v", s)
		}
		c.ack(typeLDS)
		c.quiet(f)
	})
}

func TestNamed(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeEDS: {"a=1", "b=1", "c=1"}}))
		c := f.dial(p, gatewayNode("a/b"))
		c.subscribe(typeEDS, "b", "a")
		c.accept(typeEDS, reply{names: "a=1 b=1"})

		// Only what changed, and only what was asked for.
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeEDS: {"a=1", "b=2", "c=2"}}))
		c.accept(typeEDS, reply{names: "b=2"})
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeEDS: {"a=1", "b=2", "c=3"}}))
		c.quiet(f)

		// A name more: only that.
		c.subscribe(typeEDS, slices.DeleteFunc([]string{"a", "b", "c"}, func(n string) bool { return p == protocolDelta && n != "c" })...)
		c.accept(typeEDS, reply{names: "c=3"})

		// Gone and back in another version.
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeEDS: {"b=2", "c=3"}}))
		if p == protocolDelta {
			c.accept(typeEDS, reply{removed: "a"})
		}
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeEDS: {"a=9", "b=2", "c=3"}}))
		c.accept(typeEDS, reply{names: "a=9"})
		c.quiet(f)
	})
}

func TestNamedAbsent(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		f.server.SetSnapshot(testKey, snap(t, nil))
		c := f.dial(p, gatewayNode("a/b"))
		c.subscribe(typeECDS, "x")
		if p == protocolDelta { // only this protocol can say so
			c.accept(typeECDS, reply{removed: "x"})
		}
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeECDS: {"y=1"}}))
		c.quiet(f)
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeECDS: {"x=1"}}))
		c.accept(typeECDS, reply{names: "x=1"})
	})
}

func TestUnsubscribe(t *testing.T) {
	f := newFixture(t)
	f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeEDS: {"a=1", "b=1"}}))
	c := f.dial(protocolDelta, gatewayNode("a/b"))
	c.subscribe(typeEDS, "a", "b")
	c.accept(typeEDS, reply{names: "a=1 b=1"})
	c.request(typeEDS, nil, []string{"a"}, "", nil)
	c.quiet(f)
	f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeEDS: {"a=2", "b=1"}}))
	c.quiet(f)
	c.subscribe(typeEDS, "a")
	c.accept(typeEDS, reply{names: "a=2"})
}

// TestExtensionsTravelAlone: a settings change doesn't resend code, and what
// becomes of code says nothing about settings.
func TestExtensionsTravelAlone(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeECDS: {"code=1", "settings=1"}}))
		c := f.dial(p, gatewayNode("a/b"))
		c.subscribe(typeECDS, "code", "settings")
		c.accept(typeECDS, reply{names: "code=1"})
		c.accept(typeECDS, reply{names: "settings=1"})
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeECDS: {"code=1", "settings=2"}}))
		c.accept(typeECDS, reply{names: "settings=2"})

		state := func() TypeState { return f.server.Connections()[0].Types[typeECDS] }
		until(t, "acknowledged", func() bool { s := state(); return s.Acked == s.Sent })
		good := state().Acked
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeECDS: {"code=bad", "settings=3"}}))
		c.want(typeECDS, reply{names: "code=bad"})
		c.nack(typeECDS, "no such thing")
		c.accept(typeECDS, reply{names: "settings=3"})
		c.quiet(f)
		s := state()
		if s.Acked != good || len(s.Rejected) != 1 || s.Rejected[0].Name != "code" || s.LastError != "no such thing" {
			t.Fatalf("the rejection doesn't stand: %+v", s)
		}
		// The old code again is another version than the last one sent.
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeECDS: {"code=1", "settings=3"}}))
		c.accept(typeECDS, reply{names: "code=1"})
		until(t, "all is well", func() bool { s := state(); return s.Acked == s.Sent && s.LastError == "" && len(s.Rejected) == 0 })
	})
}

func TestNackIsNotLooped(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {"l=1"}}))
		c := f.dial(p, gatewayNode("a/b"))
		c.subscribe(typeLDS)
		c.accept(typeLDS, reply{names: "l=1"})
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {"l=2"}}))
		c.want(typeLDS, reply{names: "l=2"})
		c.nack(typeLDS, strings.Repeat("ä", maxErrorBytes))
		c.quiet(f)
		s := f.server.Connections()[0].Types[typeLDS]
		if len(s.LastError) != maxErrorBytes || s.Acked == s.Sent {
			t.Errorf("state: %d bytes of error, acked %s of %s", len(s.LastError), s.Acked, s.Sent)
		}
		if got := gather(t, f)[`periscope_xds_nacks_total{type=lds}`]; got != 1 {
			t.Errorf("%v rejections counted", got)
		}
		if n := f.log.Count("xds resources rejected"); n != 1 {
			t.Errorf("%d log lines", n)
		}
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {"l=3"}}))
		c.accept(typeLDS, reply{names: "l=3"})
	})
}

// TestEndpointsFollowClusters: Envoy waits for the endpoints of a cluster that
// changed without asking for them.
func TestEndpointsFollowClusters(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeCDS: {"a=1", "b=1"}, typeEDS: {"a=1", "b=1"}}))
		c := f.dial(p, gatewayNode("a/b"))
		c.subscribe(typeCDS)
		c.accept(typeCDS, reply{names: "a=1 b=1"})
		c.subscribe(typeEDS, "a", "b")
		c.accept(typeEDS, reply{names: "a=1 b=1"})
		c.quiet(f)
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeCDS: {"a=2", "b=1"}, typeEDS: {"a=1", "b=1"}}))
		c.want(typeCDS, either(p, reply{names: "a=2 b=1"}, reply{names: "a=2"}))
		c.accept(typeEDS, either(p, reply{names: "a=1 b=1"}, reply{names: "a=1"}))
		c.ack(typeCDS)
		c.quiet(f)
	})
}

func TestReconnectWithOldState(t *testing.T) {
	f := newFixture(t)
	first := snap(t, map[string][]string{typeCDS: {"a=1", "b=1", "gone=1"}, typeEDS: {"a=1", "b=1"}})
	f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeCDS: {"a=1", "b=2"}, typeEDS: {"a=1", "b=2"}}))
	versions := func(typeURL string) map[string]string {
		out := map[string]string{}
		for _, r := range first.Resources(typeURL) {
			out[r.Name] = r.Version
		}
		return out
	}
	c := f.dial(protocolDelta, gatewayNode("a/b"))
	c.request(typeCDS, nil, nil, "", versions(typeCDS))
	c.accept(typeCDS, reply{names: "b=2", removed: "gone"})
	c.request(typeEDS, []string{"a", "b"}, nil, "", versions(typeEDS))
	// b changed; a's endpoints are as before, and so is its cluster.
	c.accept(typeEDS, reply{names: "b=2"})
	c.quiet(f)

	// All is as it was: a wildcard still gets its first answer.
	d := f.dial(protocolDelta, gatewayNode("a/b"))
	same := map[string]string{}
	for _, r := range snap(t, map[string][]string{typeCDS: {"a=1", "b=2"}}).Resources(typeCDS) {
		same[r.Name] = r.Version
	}
	d.request(typeCDS, nil, nil, "", same)
	d.accept(typeCDS, reply{})
	d.quiet(f)
}

func TestKeysAreApart(t *testing.T) {
	f := newFixture(t)
	a, b := f.dial(protocolDelta, gatewayNode("x/a")), f.dial(protocolDelta, gatewayNode("x/b"))
	a.subscribe(typeLDS)
	b.subscribe(typeLDS)
	f.server.SetSnapshot(GatewayKey("x/a"), snap(t, map[string][]string{typeLDS: {"l=a"}}))
	f.server.SetSnapshot(GatewayKey("x/b"), snap(t, map[string][]string{typeLDS: {"l=b"}}))
	a.accept(typeLDS, reply{names: "l=a"})
	b.accept(typeLDS, reply{names: "l=b"})
	// A key taken away is silence, not removal.
	f.server.SetSnapshot(GatewayKey("x/a"), nil)
	f.server.SetSnapshot(GatewayKey("x/b"), snap(t, map[string][]string{typeLDS: {"l=c"}}))
	b.accept(typeLDS, reply{names: "l=c"})
	f.server.SetSnapshot(GatewayKey("x/a"), snap(t, map[string][]string{typeLDS: {"l=d"}}))
	a.accept(typeLDS, reply{names: "l=d"})
}

func TestIdentityIsFixedByTheFirstMessage(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		f.server.SetSnapshot(GatewayKey("x/a"), snap(t, map[string][]string{typeLDS: {"l=a"}, typeCDS: {"c=a"}}))
		f.server.SetSnapshot(GatewayKey("x/b"), snap(t, map[string][]string{typeLDS: {"l=b"}, typeCDS: {"c=b"}}))
		c := f.dial(p, gatewayNode("x/a"))
		c.subscribe(typeLDS)
		c.accept(typeLDS, reply{names: "l=a"})
		c.node = gatewayNode("x/b")
		c.subscribe(typeCDS)
		c.accept(typeCDS, reply{names: "c=a"})
		if n := f.server.Connections()[0].Node; n != "gateway~x/a" {
			t.Errorf("node is %s", n)
		}
	})
}

func TestUnknownNodeIsHeld(t *testing.T) {
	nodes := map[string]*core.Node{"none": nil, "no metadata": {Id: "x"}, "bad role": gatewayNode("")}
	for name, n := range nodes {
		t.Run(name, func(t *testing.T) {
			eachProtocol(t, func(t *testing.T, p string) {
				f := newFixture(t)
				f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {"l=1"}}))
				for range 3 {
					c := f.dial(p, n)
					c.subscribe(typeLDS)
					c.subscribe(typeCDS)
				}
				until(t, "three held connections", func() bool {
					held := 0
					for _, c := range f.server.Connections() {
						if c.Held != "" && len(c.Types) == 2 {
							held++
						}
					}
					return held == 3
				})
				if n := f.log.Count("held without answer"); n != 1 {
					t.Errorf("%d log lines", n)
				}
				if got := gather(t, f)[`periscope_xds_refused_total{reason=identity}`]; got != 3 {
					t.Errorf("%v counted", got)
				}
				// The server is alive.
				c := f.dial(p, gatewayNode("a/b"))
				c.subscribe(typeLDS)
				c.accept(typeLDS, reply{names: "l=1"})
			})
		})
	}
}

func TestSelect(t *testing.T) {
	f := newFixture(t, func(c *Config) {
		c.Select = func(n *core.Node) (string, error) {
			if n.GetId() == "long" {
				return strings.Repeat("k", maxKeyBytes+1), nil
			}
			return "", errors.New("nobody is served")
		}
	})
	for _, id := range []string{"long", "other"} {
		f.dial(protocolSotW, &core.Node{Id: id}).subscribe(typeLDS)
	}
	until(t, "both are held", func() bool {
		list := f.server.Connections()
		return len(list) == 2 && list[0].Held != "" && list[1].Held != ""
	})
}

// TestCertified: a guarded snapshot isn't for a client without a certificate,
// which is told so; others are served as before.
func TestCertified(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t, func(c *Config) { c.Certified = func(key string) bool { return key == testKey } })
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {"l=1"}}))
		f.server.SetSnapshot(GatewayKey("open/b"), snap(t, map[string][]string{typeLDS: {"o=1"}}))
		for range 2 {
			c := f.dial(p, gatewayNode("a/b"))
			c.subscribe(typeLDS)
			if m := c.next(typeLDS); status.Code(m.err) != codes.Unauthenticated || !strings.Contains(m.err.Error(), "client certificate") {
				t.Errorf("got %+v", m)
			}
		}
		open := f.dial(p, gatewayNode("open/b"))
		open.subscribe(typeLDS)
		open.accept(typeLDS, reply{names: "o=1"})
		if n := f.log.Count("xds client refused"); n != 1 {
			t.Errorf("%d log lines", n)
		}
		if got := gather(t, f)[`periscope_xds_refused_total{reason=certificate}`]; got != 2 {
			t.Errorf("%v counted", got)
		}
		if list := f.server.Connections(); len(list) != 1 || list[0].Key != GatewayKey("open/b") {
			t.Errorf("connections: %+v", list)
		}
	})
}

// TestCertifiedBy: only a certificate that was verified counts.
func TestCertifiedBy(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Certified = func(string) bool { return true } })
	chain := []*x509.Certificate{{}}
	for name, tt := range map[string]struct {
		auth credentials.AuthInfo
		want codes.Code
	}{
		"plain text":       {nil, codes.Unauthenticated},
		"no certificate":   {credentials.TLSInfo{}, codes.Unauthenticated},
		"one not verified": {credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: chain}}, codes.Unauthenticated},
		"one verified":     {credentials.TLSInfo{State: tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{chain}}}, codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			// Loopback is no reason to trust: who is there may be a proxy.
			ctx := peer.NewContext(t.Context(), &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}, AuthInfo: tt.auth})
			c, err := f.server.open(ctx, protocolDelta)
			if err != nil {
				t.Fatal(err)
			}
			defer f.server.close(c)
			if _, err := c.identify(gatewayNode("a/b")); status.Code(err) != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if served := c.key != ""; served != (tt.want == codes.OK) {
				t.Errorf("key %q", c.key)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	names := make([]string, maxNames+1)
	for i := range names {
		names[i] = fmt.Sprint(i)
	}
	for name, abuse := range map[string]func(c *client){
		"names":     func(c *client) { c.subscribe(typeEDS, names...) },
		"long name": func(c *client) { c.subscribe(typeEDS, strings.Repeat("n", maxNameBytes+1)) },
		"long type": func(c *client) { c.subscribe(strings.Repeat("t", maxTypeURLBytes+1)) },
		"many types": func(c *client) {
			for i := range maxTypes + 1 {
				c.subscribe(fmt.Sprint("t", i))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachProtocol(t, func(t *testing.T, p string) {
				f := newFixture(t)
				f.server.SetSnapshot(testKey, snap(t, nil))
				c := f.dial(p, gatewayNode("a/b"))
				abuse(c)
				for {
					m := <-c.in
					if m.err != nil {
						if status.Code(m.err) != codes.ResourceExhausted {
							t.Errorf("ended with %v", m.err)
						}
						break
					}
				}
				until(t, "the stream is forgotten", func() bool { return len(f.server.Connections()) == 0 })
			})
		})
	}
	t.Run("names in steps", func(t *testing.T) {
		f := newFixture(t)
		c := f.dial(protocolDelta, gatewayNode("a/b"))
		c.subscribe(typeEDS, names[:maxNames]...)
		c.subscribe(typeEDS, names[maxNames])
		if m := <-c.in; status.Code(m.err) != codes.ResourceExhausted {
			t.Errorf("got %+v", m)
		}
	})
	t.Run("connections", func(t *testing.T) {
		f := newFixture(t, func(c *Config) { c.MaxConnections = 1 })
		f.server.SetSnapshot(testKey, snap(t, nil))
		c := f.dial(protocolSotW, gatewayNode("a/b"))
		c.subscribe(typeLDS)
		c.accept(typeLDS, reply{})
		d := f.dial(protocolDelta, gatewayNode("a/b"))
		if m := <-d.in; status.Code(m.err) != codes.ResourceExhausted {
			t.Errorf("got %+v", m)
		}
	})
}

// TestSlowReader: a client that reads nothing holds up neither the server nor
// another client, and gets the latest state when it reads again.
func TestSlowReader(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		big := strings.Repeat("x", 256<<10)
		set := func(i int) {
			f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {fmt.Sprintf("l=%d%s", i, big)}}))
		}
		set(0)
		slow := f.dial(p, gatewayNode("a/b"))
		fast := f.dial(p, gatewayNode("a/b"))
		slow.subscribe(typeLDS)
		fast.subscribe(typeLDS)
		// The slow one doesn't reply.
		if m := slow.next(typeLDS); m.names[:3] != "l=0" {
			t.Fatalf("got %.10s", m.names)
		} else {
			slow.nonce[typeLDS] = m.nonce
		}
		for i := range 20 {
			if i > 0 {
				set(i)
			}
			m := fast.next(typeLDS)
			if want := fmt.Sprintf("l=%dx", i); !strings.HasPrefix(m.names, want) {
				t.Fatalf("got %.10s, want %s", m.names, want)
			}
			fast.nonce[typeLDS] = m.nonce
			fast.ack(typeLDS)
		}
		slow.ack(typeLDS)
		if m := slow.next(typeLDS); !strings.HasPrefix(m.names, "l=19x") {
			t.Errorf("got %.10s", m.names)
		}
	})
}

func TestConcurrentUpdates(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		const rounds = 200
		done := make(chan struct{})
		go func() {
			defer close(done)
			for i := range rounds {
				f.server.SetSnapshot(testKey, snap(t, map[string][]string{
					typeLDS: {fmt.Sprint("l=", i)}, typeCDS: {fmt.Sprint("c=", i)}, typeECDS: {fmt.Sprint("e=", i), "f=1"},
				}))
				f.server.Connections()
			}
		}()
		c := f.dial(p, gatewayNode("a/b"))
		c.subscribe(typeLDS)
		c.subscribe(typeCDS)
		c.subscribe(typeECDS, "e", "f")
		last := map[string]string{typeLDS: fmt.Sprint("l=", rounds-1), typeCDS: fmt.Sprint("c=", rounds-1), typeECDS: fmt.Sprint("e=", rounds-1)}
		for len(last) > 0 {
			select {
			case m := <-c.in:
				if m.err != nil {
					t.Fatal(m.err)
				}
				c.nonce[m.typeURL] = m.nonce
				c.ack(m.typeURL)
				if m.names == last[m.typeURL] {
					delete(last, m.typeURL)
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("not seen: %v", slices.Collect(maps.Values(last)))
			}
		}
		<-done
	})
}

func TestConnections(t *testing.T) {
	f := newFixture(t)
	f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {"l=1"}}))
	c := f.dial(protocolDelta, gatewayNode("a/b"))
	c.subscribe(typeLDS)
	c.accept(typeLDS, reply{names: "l=1"})
	until(t, "acknowledged", func() bool { return f.server.Connections()[0].Types[typeLDS].Acked != "" })
	got := f.server.Connections()[0]
	if got.Address == "" || got.ConnectedAt.IsZero() || got.Types[typeLDS].SentAt.IsZero() || got.Types[typeLDS].AckedAt.IsZero() {
		t.Errorf("incomplete: %+v", got)
	}
	version := snap(t, map[string][]string{typeLDS: {"l=1"}}).Version(typeLDS)
	want := Connection{ID: "gateway~a/b-1", Node: "gateway~a/b", Cluster: "test", Protocol: protocolDelta, Key: testKey, Address: got.Address,
		ConnectedAt: got.ConnectedAt, Types: map[string]TypeState{typeLDS: {Sent: version, Nonce: "1", Acked: version,
			SentAt: got.Types[typeLDS].SentAt, AckedAt: got.Types[typeLDS].AckedAt}}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	c.cancel()
	until(t, "the stream is forgotten", func() bool { return len(f.server.Connections()) == 0 })
	f.server.SetSnapshot(testKey, nil)
	f.server.mu.Lock()
	defer f.server.mu.Unlock()
	if len(f.server.keys) != 0 {
		t.Errorf("%d keys are left", len(f.server.keys))
	}
}

// gather reads counters as "name{label=value}".
func gather(t *testing.T, f *fixture) map[string]float64 {
	t.Helper()
	families, err := f.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, fam := range families {
		for _, m := range fam.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			out[fam.GetName()+"{"+strings.Join(labels, ",")+"}"] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return out
}

func TestMetrics(t *testing.T) {
	f := newFixture(t)
	f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {"l=1"}, "own/Type": {"o=1"}}))
	c := f.dial(protocolSotW, gatewayNode("a/b"))
	for _, typeURL := range []string{typeLDS, "own/Type"} {
		c.subscribe(typeURL)
		c.want(typeURL, reply{names: map[string]string{typeLDS: "l=1", "own/Type": "o=1"}[typeURL]})
		c.ack(typeURL)
	}
	c.quiet(f)
	got := gather(t, f)
	delete(got, "periscope_xds_pushes_total{type=other}") // depends on quiet's probe
	want := map[string]float64{
		"periscope_xds_late_requests_total{}":             0,
		"periscope_xds_connections{protocol=delta}":       0,
		"periscope_xds_connections{protocol=sotw}":        1,
		"periscope_xds_pushes_total{type=lds}":            1,
		"periscope_xds_push_ack_seconds{type=lds}":        1,
		"periscope_xds_push_ack_seconds{type=other}":      1,
		"periscope_xds_refused_total{reason=identity}":    0,
		"periscope_xds_refused_total{reason=certificate}": 0,
		"periscope_xds_refused_total{reason=connections}": 0,
		"periscope_xds_refused_total{reason=names}":       0,
		"periscope_xds_refused_total{reason=types}":       0,
		"periscope_xds_refused_total{reason=debug}":       0,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
