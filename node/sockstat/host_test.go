package sockstat

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	rootCaps = "Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t000001ffffffffff\n"
	wholeMap = "         0          0 4294967295\n"
)

// tree makes the files of a host.
func tree(t *testing.T, files map[string]string) host {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return host{root}
}

// Each lack is told by its name.
func TestRefuse(t *testing.T) {
	for name, c := range map[string]struct {
		change map[string]string // "": the file is away
		want   string            // "": nothing
	}{
		"all there":      {nil, ""},
		"no BTF":         {map[string]string{"sys/kernel/btf/vmlinux": ""}, "the kernel has no BTF"},
		"no capability":  {map[string]string{"proc/self/status": "Name:\tx\nCapEff:\t0000000000000000\n"}, "lacks CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN"},
		"admin":          {map[string]string{"proc/self/status": "Name:\tx\nCapEff:\t0000000000201000\n"}, ""},
		"admin alone":    {map[string]string{"proc/self/status": "Name:\tx\nCapEff:\t0000000000200000\n"}, "lacks CAP_NET_ADMIN"},
		"three":          {map[string]string{"proc/self/status": "Name:\tx\nCapEff:\t000000c000001000\n"}, ""},
		"user namespace": {map[string]string{"proc/self/uid_map": "         0       1000          1\n"}, "user namespace"},
		"garbage":        {map[string]string{"proc/self/status": "CapEff\n"}, "read own capabilities"},
		"no /proc":       {map[string]string{"proc/self/status": ""}, "read own capabilities"},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]string{"sys/kernel/btf/vmlinux": "x", "proc/self/status": rootCaps, "proc/self/uid_map": wholeMap}
			for f, content := range c.change {
				files[f] = content
				if content == "" {
					delete(files, f)
				}
			}
			err := tree(t, files).refuse()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// A refusal by the kernel's tells of lockdown, where there is one.
func TestHint(t *testing.T) {
	refused := fmt.Errorf("load: %w", unix.EPERM)
	for state, want := range map[string]string{
		"": refused.Error(), "[none] integrity confidentiality\n": refused.Error(),
		"none integrity [confidentiality]\n": "load: operation not permitted; the kernel is locked down (confidentiality)",
	} {
		h := tree(t, map[string]string{"sys/kernel/security/lockdown": state})
		if got := h.hint(refused).Error(); got != want {
			t.Errorf("%q: %s", state, got)
		}
		if got := h.hint(unix.EINVAL); !errors.Is(got, unix.EINVAL) || got.Error() != unix.EINVAL.Error() {
			t.Errorf("%q: %v", state, got)
		}
	}
}
