#!/usr/bin/env bash
# Generates Go code from the .proto files. Repeatable: protoc comes pinned from
# PyPI (grpcio-tools), protoc-gen-go in the version that go.mod names,
# protoc-gen-go-grpc in the one below.
set -euo pipefail
IFS=$'\n\t'

readonly GRPCIO_TOOLS=1.80.0 # protoc 31.1
readonly GO_GRPC=v1.6.0

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$root"

tools="$root/.tools/proto-$GRPCIO_TOOLS"
if [[ ! -x "$tools/bin/python" ]]; then
  rm -rf "$tools"
  python3 -m venv "$tools"
fi
if ! "$tools/bin/python" -c 'import grpc_tools' 2>/dev/null; then
  "$tools/bin/pip" install --quiet --disable-pip-version-check "grpcio-tools==$GRPCIO_TOOLS"
fi

go build -o "$tools/bin/protoc-gen-go" google.golang.org/protobuf/cmd/protoc-gen-go
GOBIN="$tools/bin" go install "google.golang.org/grpc/cmd/protoc-gen-go-grpc@$GO_GRPC"

"$tools/bin/python" -m grpc_tools.protoc \
  --proto_path=. \
  --plugin=protoc-gen-go="$tools/bin/protoc-gen-go" \
  --plugin=protoc-gen-go-grpc="$tools/bin/protoc-gen-go-grpc" \
  --go_out=. --go_opt=paths=source_relative \
  --go-grpc_out=. --go-grpc_opt=paths=source_relative \
  xds/node/nodev1/node_policy.proto xds/node/nodev1/node_report.proto
