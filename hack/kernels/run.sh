#!/usr/bin/env bash
# Runs the tests of node/sockstat on another kernel, in a virtual machine.
# Usage: run.sh KERNEL [LOCKDOWN]; LOCKDOWN: integrity or confidentiality.
set -euo pipefail

kernel=${1:?usage: run.sh KERNEL [LOCKDOWN]}
lockdown=${2:-none}
here=$(cd "$(dirname "$0")" && pwd)
dir=${PERISCOPE_CACHE:?}/kernels/$kernel
"$here/fetch.sh" "$kernel" "$dir"

vm=$(mktemp -d)
trap 'rm -rf "$vm"' EXIT
mkdir -p "$vm"/root/{bin,dev,proc,sys,tmp}
cp /bin/busybox "$vm/root/bin/"
cp -r "$dir/modules" "$vm/root/"
cp "$here/init" "$vm/root/init"
(cd "$here/../.." && CGO_ENABLED=0 go test -c -o "$vm/root/sockstat.test" ./node/sockstat)
(cd "$vm/root" && find . | cpio -o -H newc --quiet | gzip -1 >"$vm/initrd")

append="console=ttyS0 quiet panic=-1"
if [[ $lockdown != none ]]; then append+=" lockdown=$lockdown"; fi
for try in 1 2 3; do # under TCG, QEMU 7.2 now and then panics newer kernels at boot
  timeout 900 qemu-system-x86_64 -machine accel=tcg -cpu max -smp 2 -m 1024 -nographic -no-reboot -nic none \
    -kernel "$dir/vmlinuz" -initrd "$vm/initrd" -append "$append" </dev/null 2>&1 | tr -d '\r' | tee "$vm/log" |
    grep -aE 'kernel [0-9]|^(exit code|FAIL|panic|--- |[[:space:]]+[a-z_]+\.go:)' || true
  if grep -aq 'exit code: ' "$vm/log"; then break; fi
  echo "run.sh: Linux $kernel did not get through (try $try)" >&2
done
if ! grep -aq 'exit code: 0$' "$vm/log"; then
  echo "run.sh: Linux $kernel, lockdown $lockdown: failed" >&2
  tail -n 40 "$vm/log" >&2
  exit 1
fi
echo "Linux $kernel, lockdown $lockdown: passed"
