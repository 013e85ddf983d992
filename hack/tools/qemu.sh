#!/usr/bin/env bash
# Makes sure that what the tests of other kernels need is there. Debian's packages
# need root: without it, says what to run.
set -euo pipefail

readonly PACKAGES=(qemu-system-x86 busybox-static cpio xz-utils debian-archive-keyring)

if command -v qemu-system-x86_64 busybox cpio xz >/dev/null; then exit 0; fi
if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
  echo "installing QEMU for the tests of other kernels (Debian packages, about a minute)" >&2
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}" >/dev/null
  exit 0
fi
echo "qemu.sh: the tests of other kernels need QEMU. On Debian run, as root:" >&2
echo "    apt-get install --no-install-recommends ${PACKAGES[*]}" >&2
exit 1
