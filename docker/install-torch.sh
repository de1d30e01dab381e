#!/bin/sh
# Install the pinned torch: its CPU build, since the default build brings gigabytes of CUDA, or its default build, `cuda`.
# Unless told which, that depends on whether there is an NVIDIA driver.
# usage: install-torch.sh PYTHON [cpu|cuda]
set -eu
python=$1
build=${2:-$(command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)}
version=2.13.0
pip="$python -m pip install --quiet --disable-pip-version-check"
case $build in
cuda)
    $pip "torch==$version"
    ;;
cpu)
    # A CPU build from the places that pip is set up to look in, else from torch's own index, else whatever there is.
    $pip "torch==$version+cpu" 2>/dev/null ||
        $pip --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu" 2>/dev/null ||
        $pip "torch==$version"
    ;;
*)
    echo "install-torch.sh: $build: must be cpu or cuda" >&2
    exit 2
    ;;
esac
