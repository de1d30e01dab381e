"""What answers must be, computed by another road: transformers' `generate` where nothing is steered, two passes where it is."""

from __future__ import annotations

from functools import cache

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from steering.decision import ProfileActivation
from steering.profile import SteeringProfile
from tests.checkpoint import prompt_ids
from tests.parity.oracle import two_pass
from tests.serving import Artifacts


class TextOracle:
    """Greedy answers to one-turn conversations, and the gates of its profiles."""

    def __init__(self, artifacts: Artifacts) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(artifacts.model)
        self.model = LlamaForCausalLM.from_pretrained(artifacts.model).eval()
        self.profiles = {
            "safety": SteeringProfile.load(artifacts.safety, "safety"),
            "tone": SteeringProfile.load(artifacts.tone, "tone"),
        }
        self.plain_ids = cache(self._plain_ids)

    def prompt(self, text: str) -> list[int]:
        return prompt_ids(self.tokenizer, text)

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def plain(self, text: str, num_tokens: int = 12) -> str:
        """The unsteered answer."""
        return self.decode(self.plain_ids(text, num_tokens))

    def _plain_ids(self, text: str, num_tokens: int) -> list[int]:
        prompt = torch.tensor([self.prompt(text)])
        with torch.no_grad():
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return output[0, prompt.shape[1] :].tolist()

    def steered(self, text: str, num_tokens: int = 12, strength: float | None = None, name: str = "safety") -> str:
        """The answer under one profile."""
        chosen = self.profiles[name].manifest.strength if strength is None else strength
        return self._two_pass(text, num_tokens, {name: chosen})

    def steered_by_all(self, text: str, num_tokens: int = 12) -> str:
        """The answer under both profiles at their own strengths."""
        return self._two_pass(text, num_tokens, {n: p.manifest.strength for n, p in self.profiles.items()})

    def _two_pass(self, text: str, num_tokens: int, strengths: dict[str, float]) -> str:
        steering = [(self.profiles[name], ProfileActivation(name, value)) for name, value in strengths.items()]
        tokens, _, _ = two_pass(self.model, self.prompt(text), num_tokens, steering)
        eos = self.tokenizer.eos_token_id
        return self.decode(tokens[: tokens.index(eos)] if eos in tokens else tokens)
