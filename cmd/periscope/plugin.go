package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"

	"github.com/periscope-mesh/periscope/atomicfile"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/mirror/rollout"
	"github.com/periscope-mesh/periscope/xds"
)

const (
	rolloutInterval = 500 * time.Millisecond
	// settling is how long after its start a control plane hears what nodes and
	// istiods know before it gives any gateway another build: nodes come back
	// within 5 s, and must have told twice what was sent.
	settling = 10 * time.Second

	maxNames = 256 // of builds, remembered by the version of the resource
)

// pluginFlags say which build of the plugin gateways are to run.
type pluginFlags struct {
	file      string
	unchecked bool
	retry     bool
	soak      time.Duration
	envoy     string
}

func (f *pluginFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.file, "plugin", "", "Lua file with another build of the gateway plugin; default: the one in this binary")
	flags.BoolVar(&f.unchecked, "plugin-unchecked", false, "send the build of --plugin without having an Envoy load it first")
	flags.BoolVar(&f.retry, "plugin-retry", false, "try builds again that were rolled back; take it away again afterwards, for it does so at each start")
	flags.DurationVar(&f.soak, "plugin-soak", rollout.DefaultSoak, "how long the first gateway runs a new build before others get it; each of those has a tenth of it")
	flags.StringVar(&f.envoy, "envoy", "", "Envoy that loads the build of --plugin before it is sent; default: the one on PATH, then the one of make tools")
}

// plugins gives each gateway its build of the plugin: see package rollout. What
// it decided is kept on disk, with the builds, so that a restart neither sends a
// build to everybody at once nor tries one again that failed.
type plugins struct {
	dir     string
	soak    time.Duration
	started time.Time
	log     *slog.Logger
	metrics *pluginMetrics
	problem string // why the build of --plugin is not taken; empty: it is

	// Under the control plane's publishing mutex.
	builds map[string]lua.Build // by name
	names  map[string]string    // of builds, by the version of the resource
	target lua.Build
	state  rollout.State
}

type pluginMetrics struct {
	gateways  *prometheus.GaugeVec
	rollbacks prometheus.Counter
}

func newPluginMetrics(reg prometheus.Registerer) *pluginMetrics {
	m := &pluginMetrics{
		gateways: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "periscope_control_plugin_gateways", Help: "Gateways by the build of the plugin that they are to run: the target, or the one before it."}, []string{"build"}),
		rollbacks: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_control_plugin_rollbacks_total", Help: "Builds of the plugin that were rolled back."}),
	}
	reg.MustRegister(m.gateways, m.rollbacks)
	for _, build := range []string{"target", "stable"} {
		m.gateways.WithLabelValues(build)
	}
	return m
}

type pluginConfig struct {
	pluginFlags
	dataDir string
	logger  *slog.Logger
	reg     prometheus.Registerer
}

// openPlugins reads what was decided before, and the build that is wanted now.
// One that can't be had is no reason to be away: gateways keep what they have.
func openPlugins(ctx context.Context, c pluginConfig) (*plugins, error) {
	p := &plugins{dir: filepath.Join(c.dataDir, "plugins"), soak: c.soak, started: time.Now(), log: c.logger.With("component", "plugin"),
		metrics: newPluginMetrics(c.reg), builds: map[string]lua.Build{}, names: map[string]string{}}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of plugins: %w", err)
	}
	embedded := lua.Embedded()
	p.builds[embedded.Name()] = embedded
	p.restore()
	if p.state.Stable.Name == "" {
		p.state.Stable = buildOf(embedded)
	}
	if c.retry {
		p.state = p.state.Retry()
	}
	p.target = embedded
	if c.file != "" {
		if b, err := readPlugin(ctx, c.pluginFlags, embedded.Name(), p.state.Target.Name, p.state.Stable.Name); err != nil {
			p.problem = err.Error()
			p.target = p.builds[p.state.Stable.Name]
			p.log.Error("the build of --plugin is not sent to any gateway", "error", err, "build_kept", p.target.Name())
		} else {
			p.target, p.builds[b.Name()] = b, b
		}
	}
	if reason, failed := p.state.Failed[p.target.Name()]; failed {
		p.log.Warn("plugin stays rolled back; --plugin-retry tries it again", "build", p.target.Name(), "reason", reason)
	}
	return p, nil
}

// readPlugin reads the build of --plugin and has an Envoy load it, unless it is
// known to load.
func readPlugin(ctx context.Context, f pluginFlags, known ...string) (lua.Build, error) {
	raw, err := os.ReadFile(f.file)
	if err != nil {
		return lua.Build{}, fmt.Errorf("--plugin: %w", err)
	}
	b, err := lua.Read(string(raw))
	if err != nil {
		return lua.Build{}, fmt.Errorf("--plugin: %s: %w", f.file, err)
	}
	if f.unchecked || slices.Contains(known, b.Name()) {
		return b, nil
	}
	envoy, err := findEnvoy(f.envoy)
	if err != nil {
		return lua.Build{}, fmt.Errorf("--plugin: %s must be loaded by an Envoy before it is sent: %w; or pass --plugin-unchecked", f.file, err)
	}
	if err := loadPlugin(ctx, envoy, b); err != nil {
		return lua.Build{}, fmt.Errorf("--plugin: %s: %w", f.file, err)
	}
	return b, nil
}

func buildOf(b lua.Build) rollout.Build { return rollout.Build{Name: b.Name(), Wire: b.Wire} }

func (p *plugins) stateFile() string { return filepath.Join(p.dir, "rollout.json") }

func (p *plugins) buildFile(name string) string {
	return filepath.Join(p.dir, filepath.Base(name)+".lua")
}

func loadBuild(file, name string) (lua.Build, error) {
	code, err := os.ReadFile(file)
	if err != nil {
		return lua.Build{}, err
	}
	b, err := lua.Read(string(code))
	if err == nil && b.Name() != name {
		err = fmt.Errorf("it holds build %s", b.Name())
	}
	if err != nil {
		return lua.Build{}, fmt.Errorf("%s: %w", file, err)
	}
	return b, nil
}

// restore reads the last state, and the builds that it names. A state of which
// the builds are gone is of no use.
func (p *plugins) restore() {
	raw, err := os.ReadFile(p.stateFile())
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var s rollout.State
	if err == nil {
		err = json.Unmarshal(raw, &s)
	}
	for _, name := range []string{s.Stable.Name, s.Target.Name} {
		if err == nil && name != "" && p.builds[name].Code == "" {
			p.builds[name], err = loadBuild(p.buildFile(name), name)
		}
	}
	if err != nil {
		p.log.Error("what was rolled out before is not known: every gateway gets the build in this binary first", "error", err)
		return
	}
	p.state = s
}

// underWay tells whether time or evidence may change what was decided.
func (p *plugins) underWay() bool {
	return p.state.Phase == rollout.Rolling || p.state.Phase == rollout.Held
}

// step decides anew. What it decided is kept before anybody acts on it.
func (p *plugins) step(gateways []rollout.Gateway, nodes []rollout.Node) {
	now := time.Now()
	before := p.state
	p.state = rollout.Step(before, rollout.Input{Now: now, Target: buildOf(p.target), Gateways: gateways, Nodes: nodes, Soak: p.soak, Settled: p.settled(now)})
	if reflect.DeepEqual(before, p.state) {
		return
	}
	p.account(before, p.state)
	if err := p.save(p.state); err != nil {
		p.log.Error("roll-out not kept for the next start", "error", err)
	}
}

// settled is when nodes and istiods had had the time to say what they know.
func (p *plugins) settled(now time.Time) time.Time {
	if at := p.started.Add(settling); !at.After(now) {
		return at
	}
	return time.Time{}
}

// nameOf is the name of the build that a resource carries; empty: none, or one
// that isn't ours. The same content has the same version.
func (p *plugins) nameOf(r xds.Resource) string {
	if name, ok := p.names[r.Version]; ok {
		return name
	}
	name := ""
	if code, ok := pluginCode(r); ok {
		if b, err := lua.Read(code); err == nil {
			name = b.Name()
		}
	}
	if len(p.names) >= maxNames {
		clear(p.names)
	}
	p.names[r.Version] = name
	return name
}

// account counts and logs what has changed.
func (p *plugins) account(before, next rollout.State) {
	counts := map[string]float64{"target": 0, "stable": 0}
	for id, a := range next.Gateways {
		which := "stable"
		if a.Build == next.Target.Name {
			which = "target"
		}
		counts[which]++
		if was := before.Gateways[id].Build; was != "" && was != a.Build {
			p.log.Info("gateway gets another build of the plugin", "gateway", id, "build", a.Build, "before", was)
		}
	}
	for which, n := range counts {
		p.metrics.gateways.WithLabelValues(which).Set(n)
	}
	switch {
	case next.Phase == before.Phase:
	case next.Phase == rollout.RolledBack:
		if _, known := before.Failed[next.Target.Name]; !known {
			p.metrics.rollbacks.Inc()
		}
		p.log.Error("plugin rolled back", "build", next.Target.Name, "to", next.Stable.Name, "reason", next.Reason)
	case next.Phase == rollout.Held:
		p.log.Warn("plugin held back", "build", next.Target.Name, "reason", next.Reason)
	default:
		p.log.Info("plugin roll-out", "phase", string(next.Phase), "build", next.Target.Name)
	}
}

func (p *plugins) save(s rollout.State) error {
	for _, name := range []string{s.Stable.Name, s.Target.Name} {
		if _, err := os.Stat(p.buildFile(name)); err == nil {
			continue
		}
		if err := atomicfile.Replace(p.buildFile(name), []byte(p.builds[name].Code)); err != nil {
			return err
		}
	}
	raw, err := json.MarshalIndent(s, "", "  ")
	if err == nil {
		err = atomicfile.Replace(p.stateFile(), raw)
	}
	if err != nil {
		return err
	}
	return p.prune(s)
}

// prune removes builds that nobody is to run any more.
func (p *plugins) prune(s rollout.State) error {
	files, err := filepath.Glob(filepath.Join(p.dir, "*.lua"))
	for _, f := range files {
		if f != p.buildFile(s.Stable.Name) && f != p.buildFile(s.Target.Name) {
			err = errors.Join(err, os.Remove(f))
		}
	}
	return err
}

// build is what a gateway is to run.
func (p *plugins) build(id string) lua.Build {
	if b, ok := p.builds[p.state.Gateways[id].Build]; ok {
		return b
	}
	return p.builds[p.state.Stable.Name]
}
