"""What a checkpoint is loaded as."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from server.engine.native import load

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("stored", "fast", "wanted"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.float32, False, torch.float32),
        (None, True, torch.float32),
    ],
)
def test_auto_takes_what_the_processor_is_good_at(stored, fast, wanted, monkeypatch):
    monkeypatch.setattr(load, "_bfloat16_is_fast", lambda: fast)
    assert load._dtype("auto", SimpleNamespace(dtype=stored), CPU) == wanted


def test_a_gpu_takes_what_is_stored():
    assert load._dtype("auto", SimpleNamespace(dtype=torch.float16), torch.device("cuda")) == torch.float16


def test_the_processor_is_asked():
    assert load._bfloat16_is_fast() in (True, False)
