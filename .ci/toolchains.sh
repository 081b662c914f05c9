#!/bin/sh
# Install the Debian packages that the cross and emulator tests need, or say which they are.
set -u
packages=""
need() { command -v "$1" >/dev/null 2>&1 || packages="$packages $2"; }
need cc gcc
need aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
need arm-linux-gnueabihf-gcc gcc-arm-linux-gnueabihf
need qemu-aarch64 qemu-user
need qemu-arm qemu-user
need arm-none-eabi-gcc "gcc-arm-none-eabi libnewlib-arm-none-eabi"
need qemu-system-arm qemu-system-arm
need riscv64-unknown-elf-gcc "gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf"
need qemu-system-riscv32 qemu-system-misc
need clinfo "clinfo pocl-opencl-icd ocl-icd-opencl-dev opencl-headers"
need vulkaninfo "vulkan-tools mesa-vulkan-drivers libvulkan1"
need cmake cmake
need chromium chromium
# What some tests can do without, and some distributions do not have.
extra=""
command -v llvm-mca-19 >/dev/null 2>&1 || extra="llvm-19"
[ -z "$packages$extra" ] && exit 0
if [ "$(id -u)" = 0 ]; then sudo=""; elif command -v sudo >/dev/null 2>&1; then sudo="sudo -n"; else sudo="no"; fi
if [ "$sudo" != no ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing:$packages $extra"
    $sudo apt-get update -qq >/dev/null 2>&1
    if [ -n "$extra" ]; then
        DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "$extra" >/dev/null 2>&1 ||
            echo "not installed, benchmarks print no modelled cycles; to install: apt-get install $extra"
    fi
    [ -z "$packages" ] && exit 0
    # shellcheck disable=SC2086
    if DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $packages \
        libc6-dev-arm64-cross libc6-dev-armhf-cross >/dev/null 2>&1; then
        exit 0
    fi
fi
echo "not installed, the tests that need them are skipped; to install: apt-get install$packages $extra"
exit 0
