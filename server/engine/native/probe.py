"""Whether a decoder still computes what it computed at start-up: asked after a pass has failed, before the next one."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from server.engine.native.attention import PrefillStep, Span
from server.engine.native.build import new_cache
from server.engine.native.decoder import Decoder

LENGTH = 8
logger = logging.getLogger(__name__)


class Probe:
    """Runs a few tokens through a decoder, with a cache of its own, and remembers the logits."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._wanted = self._logits()

    def holds(self) -> bool:
        """Whether the same tokens give the same logits, to rounding. False where the decoder or its device fails altogether."""
        try:
            return torch.allclose(self._logits(), self._wanted, rtol=1e-3, atol=1e-3)
        except Exception:  # whatever it is, the answer is no
            logger.exception("the decoder cannot run any more")
            return False

    @torch.inference_mode()
    def _logits(self) -> Tensor:
        decoder = self._decoder
        cache = new_cache(decoder, 0, 1, LENGTH, num_blocks=1)
        cache.reserve(0, LENGTH)
        ids = torch.arange(1, LENGTH + 1, device=decoder.device) % decoder.vocab_size
        step = PrefillStep(cache, [Span(0, 0, 0, LENGTH, True)])
        return decoder.logits(decoder.run(decoder.embed(ids), range(decoder.num_layers), step)).float()
