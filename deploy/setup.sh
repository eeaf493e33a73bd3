#!/bin/sh
# Brings a machine to where UKAI runs: Debian packages that are missing, .venv from the lock files, and UKAI itself in
# it, compiled (UKAI_PURE=1: as it is).  Asks nothing.  A second run finds the stamps of the first and ends at once.
#
#   deploy/setup.sh          everything
#   deploy/setup.sh --check  only says what is missing; changes nothing
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=$root/.venv
stamp=$venv/.ukai-setup
package_stamp=$venv/.ukai-package
guest=$venv/guest
PATH=$PATH:/usr/sbin:/sbin
export PATH

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# The first of these that is 3.11 or later.  Debian's own is before what the PATH has: it is compiled with profiles,
# and makes a tenth more requests than one that pyenv has compiled as it does by default.
find_python() {
    for name in ${PYTHON:-} /usr/bin/python3.11 /usr/bin/python3 python3.11 python3; do
        if command -v "$name" >/dev/null 2>&1 \
            && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    fail "Python 3.11 or later is needed; install it (Debian 12: apt-get install python3) and run this again"
}

has_library() { ldconfig -p 2>/dev/null | grep -q "$1"; }
has_command() { command -v "$1" >/dev/null 2>&1; }
has_module() { "$python" -c "import $1" >/dev/null 2>&1; }
has_headers() {
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

guest_runs() { [ "$(uname -m)" = x86_64 ]; }

# Appends a package and why it is wanted to what is missing.
want() {
    packages="$packages $1"
    reasons="$reasons${reasons:+, }$1 ($2)"
}

list_missing() {
    packages='' reasons=''
    # Debian's fuse3 replaces the package fuse and brings fusermount for both libraries.
    { has_library 'libfuse3\.so\.3' && has_command fusermount3 && has_command fusermount; } \
        || want fuse3 "libfuse3 and fusermount, for mfusepy"
    has_library 'libfuse\.so\.2' || want libfuse2 "for fusepy"
    { has_command qemu-img && has_command qemu-io; } || want qemu-utils "image import and export, tests"
    has_command gcc || want gcc "netifaces is compiled here"
    echo '#include <stdlib.h>' | gcc -E - >/dev/null 2>&1 || want libc6-dev "netifaces is compiled here"
    has_headers || want "$("$python" -c 'import sys; print("python3.%d-dev" % sys.version_info[1])')" \
        "netifaces is compiled here"
    { has_module ensurepip && has_module venv; } \
        || want "$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')" "makes .venv"
    { has_command mkfs.ext4 && has_command fsck.ext4; } || want e2fsprogs "the demo makes a filesystem on an image"
    has_command fio || want fio "load in the demo and the tests"
    { has_command mount && has_command losetup; } || want mount "loop mounts in the demo and the tests"
    has_command ip || want iproute2 "cut cables in the tests"
    has_command findmnt || want util-linux "loop mounts in the demo and the tests"
    if guest_runs; then
        has_command qemu-system-x86_64 || want qemu-system-x86 "a guest whose power is cut in the tests"
        has_command sqlite3 || want sqlite3 "what that guest writes"
    fi
    [ -e /etc/ssl/certs/ca-certificates.crt ] || want ca-certificates "pip speaks to PyPI over TLS"
}

fingerprint() {
    {
        cat "$root/requirements-build.lock" "$root/requirements.lock" "$root/deploy/setup.sh"
        printf '%s %s\n' "$root" "$python"
        "$python" --version
    } | sha256sum
}

install_packages() {
    sudo=''
    if [ "$(id -u)" -ne 0 ]; then
        has_command sudo || fail "these Debian packages are missing:$packages; run this as root, or install sudo"
        sudo -n true 2>/dev/null || [ -t 0 ] \
            || fail "these Debian packages are missing:$packages; run this as root, or allow sudo without a password"
        sudo=sudo
    fi
    has_command apt-get || fail "these packages are missing:$packages; there is no apt-get here: install them by hand"
    say "installing $reasons"
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    # Without word splitting off: each package is a word.
    # shellcheck disable=SC2086
    if ! { $sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 update \
        && $sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
            install -y --no-install-recommends $packages; } >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        fail "apt-get could not install$packages; its last lines are above"
    fi
    list_missing
    [ -z "$packages" ] || fail "still missing after apt-get:$packages"
}

# pip in .venv, quietly: what fails it tells all the same.
pip_install() {
    PIP_NO_WARN_SCRIPT_LOCATION=1 "$venv/bin/python" -m pip -qq --disable-pip-version-check install \
        --require-virtualenv --no-input --no-deps "$@"
}

make_venv() {
    say "making .venv with $("$python" --version) from requirements.lock"
    rm -f "$stamp"
    "$python" -m venv --clear "$venv"
    # fusepy and netifaces come as source only: what builds them is installed first and used as it is.
    pip_install --require-hashes -r "$root/requirements-build.lock"
    pip_install --require-hashes --no-build-isolation -r "$root/requirements.lock"
    "$venv/bin/python" -c 'import fuse, mfusepy, msgpack, netifaces, zmq'
    # The tests' programs are found in the tree, and UKAI, which stands before it, is the one that is installed.
    "$venv/bin/python" -c 'import sys, sysconfig
open(sysconfig.get_path("purelib") + "/tree.pth", "w").write(sys.argv[1] + "\n")' "$root"
    fingerprint >"$stamp"
}

package_fingerprint() {
    {
        cat "$stamp"
        printf '%s\n' "${UKAI_PURE:-0}"
        (cd "$root" && find ukai setup.py pyproject.toml -name __pycache__ -prune -o -type f -print | LC_ALL=C sort \
            | xargs sha256sum)
    } | sha256sum
}

install_ukai() {
    say "compiling and installing UKAI, which takes a minute or two"
    rm -rf "$package_stamp" "$root"/build/lib* "$root"/build/bdist*
    pip_install --no-build-isolation --force-reinstall "$root"
    package_fingerprint >"$package_stamp"
}

# Kernel and busybox of the tests' guest: taken apart here, not installed.
fetch_guest() {
    say "fetching the kernel and the busybox of the tests' guest"
    rm -rf "$guest"
    mkdir -p "$guest/new"
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    if ! (cd "$guest/new" && download_guest) >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        fail "apt-get could not download linux-image-cloud-amd64 or busybox-static; run apt-get update, then this again"
    fi
    for package in "$guest"/new/*.deb; do
        dpkg -x "$package" "$guest"
    done
    rm -rf "$guest/new"
}

download_guest() {
    # The name of the kernel's package has its version in it; the package of the plain name depends on it.
    kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [ -n "$kernel" ] || return 1
    apt-get download "$kernel" busybox-static
}

python=$(find_python)
list_missing
if [ "${1:-}" = --check ]; then
    [ -z "$reasons" ] || fail "missing: $reasons"
    [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] || fail "missing: .venv as in requirements.lock"
    [ "$(cat "$package_stamp" 2>/dev/null)" = "$(package_fingerprint)" ] || fail "missing: UKAI as in $root/ukai"
    ! guest_runs || [ -e "$guest/boot" ] || fail "missing: the parts of the tests' guest"
    exit 0
fi
[ -z "$packages" ] || install_packages
[ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] || make_venv
[ "$(cat "$package_stamp" 2>/dev/null)" = "$(package_fingerprint)" ] || install_ukai
! guest_runs || [ -e "$guest/boot" ] || fetch_guest
