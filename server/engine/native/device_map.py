"""Where the parts of a model go that one device cannot hold: `--device-map`, checked before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from steering.errors import ModelError

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
DeviceMap = str | dict[str, str | int]


def read_device_map(text: str, device: str = "auto") -> DeviceMap | None:
    """One of `STRATEGIES`, or a JSON file's {module: device}, as `from_pretrained` takes them; None for no text.

    Raises ModelError, also for a `device` beside the map.
    """
    if not text:
        return None
    if device != "auto":
        raise ModelError(f"--device {device} and --device-map {text} exclude each other. Give one of them.")
    if find_spec("accelerate") is None:
        raise ModelError(
            "--device-map needs the package accelerate: pip install accelerate, or finesteer-server[large]."
        )
    if text in STRATEGIES:
        return text
    what = f"one of {', '.join(STRATEGIES)}, or a JSON file {{module: device}} such as {{'model': 0, 'lm_head': 'cpu'}}"
    try:
        found = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"--device-map {text}: cannot be read ({error.strerror}). Give {what}.") from error
    except ValueError as error:
        raise ModelError(f"--device-map {text}: not valid JSON ({error}). Give {what}.") from error
    whole = isinstance(found, dict) and found
    if not whole or not all(isinstance(place, str | int) and not isinstance(place, bool) for place in found.values()):
        raise ModelError(f"--device-map {text}: does not map modules to devices. Give {what}.")
    return found


def check_device_map(places: Mapping[str, str | int], config: PretrainedConfig, check: Callable[[str], object]) -> None:
    """Raise ModelError where the map leaves a weight out or has it twice, names a module that is none, or a device that is not here.

    `check` raises for a device. What is on "disk" is read when it is needed, and on "cpu" beside a GPU moved there then.
    """
    for place in dict.fromkeys(places.values()):
        if place != "disk":
            check(f"cuda:{place}" if isinstance(place, int) else place)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    modules, weights = {name for name, _ in empty.named_modules()}, [name for name, _ in empty.named_parameters()]
    if unknown := [name for name in places if name not in modules and name not in weights]:
        raise ModelError(f"--device-map: the model has no module {unknown[0]!r}. Its first weight is {weights[0]}.")
    if inner := [(a, b) for a in places for b in places if a != b and (not b or a.startswith(f"{b}."))]:
        raise ModelError("--device-map: {!r} lies within {!r}. Name each part once.".format(*inner[0]))
    left = [w for w in weights if not any(not m or w == m or w.startswith(f"{m}.") for m in places)]
    if left:
        raise ModelError(
            f"--device-map leaves out {len(left)} of the model's weights, the first is {left[0]}. Add a module that holds it."
        )


def refuse_several_devices(places: DeviceMap | PreTrainedModel) -> None:
    """Raise ModelError where a map, or a loaded model, has more than one device: the engine, which answers, knows one only."""
    if isinstance(places, PreTrainedModel):
        places = getattr(places, "hf_device_map", None) or {}
    if isinstance(places, dict) and len(found := sorted({str(place) for place in places.values()})) > 1:
        raise ModelError(
            f"--strength auto answers queries, for which the model must be on one device; --device-map has {', '.join(found)}. "
            "Give --strength a number."
        )
