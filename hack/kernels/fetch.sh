#!/usr/bin/env bash
# Puts a Debian kernel, with the modules that the tests need, into DIR (second
# argument): 5.10, 6.1 or 6.12, each the newest of its release. No root needed.
set -euo pipefail

kernel=${1:?usage: fetch.sh KERNEL DIR}
dir=${2:?usage: fetch.sh KERNEL DIR}
case $kernel in
5.10) suite=bullseye ;;
6.1) suite=bookworm ;;
6.12) suite=trixie ;;
*) echo "fetch.sh: no kernel $kernel; there are 5.10, 6.1 and 6.12" >&2; exit 1 ;;
esac

if [[ -e $dir/vmlinuz ]]; then exit 0; fi
echo "fetching Linux $kernel of Debian $suite (60 MB, half a minute)" >&2
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp"/{lists/partial,archives/partial,none}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $suite main" >"$tmp/sources.list"
apt=(-q -o "Dir::State::lists=$tmp/lists" -o Dir::State::status=/dev/null -o "Dir::Cache=$tmp"
  -o "Dir::Etc::sourcelist=$tmp/sources.list" -o "Dir::Etc::sourceparts=$tmp/none" -o "Dir::Etc::preferencesparts=$tmp/none"
  -o APT::Architecture=amd64 -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false)
apt-get "${apt[@]}" update >"$tmp/log" 2>&1 || { cat "$tmp/log" >&2; exit 1; }
image=$(apt-cache "${apt[@]}" depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2}')
(cd "$tmp" && apt-get "${apt[@]}" download "$image" >>log 2>&1) || { cat "$tmp/log" >&2; exit 1; }
dpkg-deb -x "$tmp"/linux-image-*.deb "$tmp/root"
mkdir -p "$dir/modules"
find "$tmp/root" -name 'inet_diag.ko*' -o -name 'tcp_diag.ko*' -o -name 'mptcp_diag.ko*' | while read -r m; do
  if [[ $m == *.xz ]]; then xz -dc "$m" >"$dir/modules/$(basename "$m" .xz)"; else cp "$m" "$dir/modules/"; fi
done
cp "$tmp"/root/boot/vmlinuz-* "$dir/vmlinuz.part"
mv "$dir/vmlinuz.part" "$dir/vmlinuz"
echo "$image" >&2
