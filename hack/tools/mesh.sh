#!/usr/bin/env bash
# Builds what the tests with a real Istio need, from Go modules pinned in the
# go.mod files beside this script, into a cache outside the checkout:
#
#   etcd             half a minute     kube-apiserver   two to ten minutes
#   istiod           three to seven    istioctl         one to two
#
# on two cores, once for each version; about 2 GiB of Go's build cache. Prints
# nothing when all of it is there already.
set -euo pipefail

cache=${1:?usage: mesh.sh CACHE}
here=$(cd "$(dirname "$0")" && pwd)

# build NAME MODULE-DIR MODULE PACKAGE builds CACHE/NAME-VERSION/NAME.
build() {
  local name=$1 dir=$here/$2 module=$3 package=$4 version out
  version=$(go -C "$dir" list -m -f '{{.Version}}' "$module")
  out=$cache/$name-$version/$name
  if [[ ! -x $out ]]; then
    echo "building $name $version into $cache (minutes, once)" >&2
    mkdir -p "$(dirname "$out")"
    CGO_ENABLED=0 go -C "$dir" build -trimpath -ldflags '-s -w' -o "$out.part" "$package"
    mv "$out.part" "$out"
  fi
  ln -sfn "$name-$version" "$cache/$name"
}

mkdir -p "$cache"
build etcd etcd go.etcd.io/etcd/server/v3 go.etcd.io/etcd/server/v3
build istiod istio istio.io/istio istio.io/istio/pilot/cmd/pilot-discovery
build istioctl istio istio.io/istio istio.io/istio/istioctl/cmd/istioctl
build kube-apiserver kube k8s.io/kubernetes k8s.io/kubernetes/cmd/kube-apiserver
