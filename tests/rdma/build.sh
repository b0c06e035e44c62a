#!/usr/bin/env bash
# Makes what the guest boots from: Debian's kernel and an initramfs with soft-RoCE. Usage: build.sh FOLDER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"

missing=()
command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86)
command -v cpio >/dev/null || missing+=(cpio)
command -v rdma >/dev/null || missing+=(iproute2)
[ -e /sbin/modprobe ] || missing+=(kmod)
[ -e /bin/busybox ] && ! ldd /bin/busybox >/dev/null 2>&1 || missing+=(busybox-static)
compgen -G '/usr/lib/*/libibverbs/librxe-rdmav*.so' >/dev/null || missing+=(ibverbs-providers)
if [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] || { echo "needs: apt-get install ${missing[*]}" >&2; exit 2; }
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
fi

if ! ls vmlinuz-* >/dev/null 2>&1; then
    # the non-cloud kernel: the cloud one has no RDMA
    package=$(apt-cache depends linux-image-amd64 | awk '/Depends:/ {print $2; exit}')
    apt-get download -q "$package" 2>/dev/null
    rm -rf unpacked && dpkg -x "$package"_*.deb unpacked
    cp unpacked/boot/vmlinuz-* .
    rm -f "$package"_*.deb
fi
release=$(ls vmlinuz-* | head -1 | sed s/vmlinuz-//)

rm -rf initramfs && mkdir -p initramfs/{bin,modules,proc,sys,dev,host,rw,root}
cp /bin/busybox initramfs/bin/busybox
install -m 755 "$here/init" initramfs/init
# Without crc32_generic soft-RoCE refuses every device.
wanted="crc32_generic virtio_pci 9pnet_virtio 9p overlay dummy veth sch_netem ib_uverbs rdma_rxe rdma_ucm"
mkdir -p unpacked/usr && [ -e unpacked/lib/modules/"$release"/modules.dep.bin ] || /sbin/depmod -b unpacked "$release"
number=10
for module in $wanted; do
    /sbin/modprobe -d "$PWD/unpacked" -S "$release" --show-depends "$module"
done | awk '$1 == "insmod" && !seen[$2]++ {print $2}' | while read -r file; do
    cp "$file" "initramfs/modules/$number-$(basename "$file")"
    number=$((number + 1))
done
(cd initramfs && find . | cpio -o -H newc --quiet | gzip -1) >initramfs.gz
ls -la "$PWD"/vmlinuz-"$release" "$PWD"/initramfs.gz
