#!/bin/sh
# Install the pinned torch: its CPU build where no NVIDIA driver is found, since the default build brings gigabytes of CUDA.
# usage: install-torch.sh PYTHON
set -eu
python=$1
version=2.13.0
pip="$python -m pip install --quiet --disable-pip-version-check"
if command -v nvidia-smi >/dev/null 2>&1; then
    $pip "torch==$version"
    exit
fi
# A CPU build from the places that pip is set up to look in, else from torch's own index, else whatever there is.
$pip "torch==$version+cpu" 2>/dev/null ||
    $pip --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu" 2>/dev/null ||
    $pip "torch==$version"
