#!/usr/bin/env bash
# Makes sure that the compiler of the eBPF programs is there: the very version, as
# another one makes other bytes. Debian's package needs root: without it, says
# what to run. With -n it never installs.
set -euo pipefail

readonly VERSION=14.0.6 # of Debian 12

right() {
  command -v llvm-strip-14 >/dev/null && clang-14 --version 2>/dev/null | grep -q "clang version $VERSION"
}

if right; then exit 0; fi
if [[ ${1-} != -n && $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
  echo "installing clang 14 for the eBPF programs (Debian packages, about a minute)" >&2
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends clang-14 llvm-14 >/dev/null
  if right; then exit 0; fi
fi
echo "clang.sh: compiling the eBPF programs needs clang $VERSION. On Debian 12 run, as root:" >&2
echo "    apt-get install --no-install-recommends clang-14 llvm-14" >&2
exit 1
