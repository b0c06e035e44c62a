#!/usr/bin/env bash
# Boots a guest with a soft-RoCE device from the host's own file system, and runs mooncake's tests in it over verbs.
# No RDMA hardware, no KVM, no network, no root on a machine that has the packages. About five minutes on two idle cores.
# run.sh hosts: instead, transfers between two namespaces in the guest, with 20 ms and 1 % loss each way.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
case $here in /tmp/* | /run/* | /dev/shm/*) # where the guest has file systems of its own
    echo "tests/rdma/run.sh: the guest cannot see $here: use a checkout outside of /tmp, /run and /dev/shm" >&2
    exit 2
    ;;
esac
folder=${RDMA_BUILD:-$here/../../build/rdma}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
for part in init build.sh; do
    [ "$folder/initramfs.gz" -nt "$here/$part" ] || { bash "$here/build.sh" "$folder"; break; }
done
log=$folder/console.log
nice timeout "${RDMA_TIMEOUT_S:-1500}" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 4096 \
    -nographic -no-reboot -net none -kernel "$folder"/vmlinuz-* -initrd "$folder/initramfs.gz" \
    -append "console=ttyS0 quiet panic=-1 guest=$here/guest.sh what=${1:-all}" \
    -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap \
    </dev/null | tee "$log"
tr -d '\r' <"$log" | grep -q '^guest: exit 0$'
