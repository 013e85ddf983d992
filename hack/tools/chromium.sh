#!/usr/bin/env bash
# Makes sure that a Chromium for the browser tests is there. Debian's package
# needs root: without it, says what to run.
set -euo pipefail

if command -v chromium >/dev/null; then exit 0; fi
if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
  echo "installing chromium for the browser tests (Debian package, about a minute)" >&2
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
  exit 0
fi
echo "chromium.sh: the browser tests need Chromium. On Debian run, as root:" >&2
echo "    apt-get install chromium" >&2
exit 1
