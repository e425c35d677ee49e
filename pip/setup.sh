#!/usr/bin/env bash
# Make .venv hold everything that runs and checks this package. Idempotent: a second run compares
# one fingerprint and ends. Usage: pip/setup.sh PYTHON  (an interpreter of Python 3.11 or newer)
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
stamp=.venv/stac_ros.fingerprint

# What the wheels do not bring: a toolchain for tf2_msgs, and libraries that Open3D links to.
missing_debian_packages() {
    local libraries
    libraries=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p)
    command -v cmake >/dev/null || echo cmake
    command -v g++ >/dev/null || echo g++
    command -v make >/dev/null || echo make
    "$python" -c 'import ensurepip' 2>/dev/null || echo "python$version-venv"
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
        echo "python$version-dev"
    for pair in libusb-1.0.so.0:libusb-1.0-0 libGL.so.1:libgl1 libEGL.so.1:libegl1 libX11.so.6:libx11-6; do
        grep -q "${pair%%:*}" <<<"$libraries" || echo "${pair##*:}"
    done
}

install_debian_packages() {
    local missing as_root=()
    missing=$(missing_debian_packages | xargs)
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        as_root=(sudo -n)
    fi
    echo "Installing system packages: $missing"
    # shellcheck disable=SC2086  # one word per package
    if ! { "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; }
    then
        echo "Not installed. Run this once, then try again:" >&2
        echo "    sudo apt-get install $missing" >&2
        exit 1
    fi
}

make_environment() {
    if [ -x .venv/bin/python ] && ! .venv/bin/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])' "$version"
    then
        echo ".venv was made by another Python than $version; remove it (make clean-venv) and try again" >&2
        exit 1
    fi
    [ -x .venv/bin/pip ] || "$python" -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check \
        -r pip/requirements.txt -r pip/requirements-dev.txt ./pip/tf2_msgs
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
}

if ! version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))'); then
    echo "$python is not Python 3.11 or newer; name one, e.g. make setup PYTHON=python3.12" >&2
    exit 1
fi
fingerprint=$(find pip setup.py setup.cfg package.xml -type f | LC_ALL=C sort | xargs sha256sum | sha256sum)
fingerprint="$version ${fingerprint%% *} $PWD"
if [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ]; then
    exit 0
fi
echo "Setting up .venv (minutes the first time, seconds afterwards)"
install_debian_packages
make_environment
echo "$fingerprint" >"$stamp"
if .venv/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("stac_cuda") is None)'; then
    echo "CUDA kernels: built"
elif command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" >/dev/null; then
    echo "CUDA kernels: not built; PyTorch and Triton serve without them, 'make cuda' builds them"
else
    echo "CUDA kernels: not built, for there is no CUDA compiler; PyTorch and Triton serve without them"
fi
