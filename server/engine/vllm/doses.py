"""A dose as vLLM's workers get it, and as its prefix cache tells it apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from server.engine.vllm.orders import Addition
from steering.intervention import Dose


def bearable(dose: Dose) -> bool:
    """Whether what is added, and twice as much, is a number of the model's dtype.

    What is none makes NaN of keys and values, and vLLM's blocks hand that on: whoever gets them next has positions masked there,
    and 0 · NaN is NaN.
    """
    most = torch.finfo(dose.answer.dtype).max / 2
    return all(bool(vector.abs().max() <= most) for vector in (dose.prompt, dose.answer) if vector is not None)


def addition_of(layer: int, dose: Dose | None) -> Addition | None:
    """What a layer adds, for the wire. Waits for the device."""
    if dose is None:
        return None
    answer = _raw(dose.answer)
    if dose.uniform:
        return Addition(layer, answer, answer)
    return Addition(layer, None if dose.prompt is None else _raw(dose.prompt), answer)


def salt_of(owner: str, versions: Iterable[str], additions: Iterable[Addition]) -> str | None:
    """What keeps a request's keys and values apart in the prefix cache, which vLLM finds by tokens and salt alone.

    None for what is neither steered nor anybody's own: all that share it. A steered request's is made of the profiles' versions
    and of each layer with its vectors, and where the two vectors differ the prompt's length belongs to it, which the caller adds
    to `versions`.
    """
    additions = list(additions)
    if not additions and not owner:
        return None
    digest = hashlib.sha256(owner.encode())
    for part in versions if additions else ():
        digest.update(b"\0v" + part.encode())
    for addition in additions:
        digest.update(b"\0l%d:" % addition.layer + hashlib.sha256(addition.prompt or b"").digest())
        digest.update(hashlib.sha256(addition.answer).digest() + (b"-" if addition.prompt is None else b"+"))
    return digest.hexdigest()


def _raw(vector: Tensor) -> bytes:
    return vector.cpu().contiguous().view(torch.uint8).numpy().tobytes()
