package extproc

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/load"
)

const (
	maxDemands = 1024            // policies, each at each gateway
	demandFor  = 5 * time.Minute // how long that of a gateway that is silent is told
)

type demandKey struct{ gateway, policy string }

// demand is what a gateway wants for a policy: each exchange that comes stands for
// as many as Envoy chose it from.
type demand struct {
	eligible float64
	received uint64
	last     time.Time
}

// shares are a gateway's, by which Envoy has sampled, and that of the policy at a
// place among its policies, in parts per million.
func shares(header http.Header, place, ceiling int) (sampled, wanted int) {
	sampled = max(1, ppm(header.Get(shareKey)))
	wanted = min(ceiling, sampled)
	if list := header.Get(sharesKey); list != "" {
		if f := strings.SplitN(clip(list), ",", place+2); place < len(f) {
			wanted = min(ceiling, ppm(f[place]))
		}
	}
	return sampled, wanted
}

func ppm(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || n > mirror.Everything {
		return mirror.Everything
	}
	return n
}

// wants counts an exchange that a policy wants, chosen by a share, and whether it is
// kept.
func (h *Handler) wants(gateway, policy string, share int, kept bool, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	key := demandKey{gateway, policy}
	d := h.demands[key]
	if d == nil {
		if len(h.demands) >= maxDemands {
			return
		}
		d = &demand{}
		h.demands[demandKey{strings.Clone(gateway), strings.Clone(policy)}] = d
	}
	d.eligible += mirror.Everything / float64(share)
	if kept {
		d.received++
	}
	d.last = now
}

// Demands lists the demand at gateways, as what came of it tells, sorted. Each node
// has its own part of a gateway's.
func (h *Handler) Demands(start time.Time) []load.Demand {
	now := h.cfg.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]load.Demand, 0, len(h.demands))
	for key, d := range h.demands {
		if now.Sub(d.last) > demandFor {
			if len(h.demands) >= maxDemands {
				delete(h.demands, key)
			}
			continue
		}
		out = append(out, load.Demand{
			Gateway: key.gateway, VM: h.vm, Policy: key.policy,
			Eligible: uint64(d.eligible), Mirrored: d.received, Received: d.received, Heard: max(0, d.last.Sub(start)),
		})
	}
	slices.SortFunc(out, load.Demand.Compare)
	return out
}

// Discarded counts the exchanges that the guard has discarded.
func (h *Handler) Discarded() uint64 { return h.discarded.Load() }
