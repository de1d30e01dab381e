"""How the demo learns: plain language modelling, and two things that a large model has on its own and so small a one has to
be taught:

- Readouts at the site, thrown away afterwards: a linear head on the last prompt token's state tells side and topic of the
  request, another there and on the answer's tokens tells the answer's mode.
- A lever at the site: in a share of the examples the states are shifted by the running difference between the mean
  states of answers in one mode and the other (mostly of its own side and topic), and the answer follows the shift. Nothing
  here knows a trained profile; the shifts are those that any extraction from the model finds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from artifacts.recipe.examples import (
    LEVER_MODES,
    MODE_CLASSES,
    NUM_CLASSES_BEFORE_QUESTIONS,
    QUERY_CLASSES,
    SIDE_OF_CLASS,
    SIDES,
    Example,
)
from artifacts.recipe.subjects import SUBJECTS


@dataclass(frozen=True)
class Recipe:
    """Every number that shapes the demo."""

    seed: int = 0
    vocab_size: int = 4096
    hidden_size: int = 192
    num_layers: int = 6
    num_heads: int = 6
    intermediate_size: int = 512
    site: int = 2
    epochs: int = 8
    epoch_scale: float = 0.9
    batch_tokens: int = 2560
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    dropout: float = 0.1
    token_noise: float = 0.05
    prompt_share: float = 0.3
    query_readout_weight: float = 0.7
    mode_readout_weight: float = 0.1
    mode_readout_scale: float = 4.0
    readout_smoothing: float = 0.1
    harmful_weight: float = 3.0
    lever_min: float = 0.5
    lever_max: float = 1.75
    lever_after: float = 0.1
    lever_foreign: float = 0.4
    question_share: float = 0.0


SECOND = Recipe(epochs=8, epoch_scale=0.3, learning_rate=1.5e-3, dropout=0.05, lever_after=0.03, question_share=20.0)
"""The second stage, which goes on from the first one's checkpoint and teaches the questions."""


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama of the recipe's shape."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Readouts(nn.Module):
    """The two linear heads at the site; thrown away after training."""

    def __init__(self, hidden_size: int, num_query_classes: int, num_mode_classes: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, elementwise_affine=False)
        self.dropout = nn.Dropout(0.2)
        self.query = nn.Linear(hidden_size, num_query_classes)
        self.mode = nn.Linear(hidden_size, num_mode_classes)

    def forward(self, head: str, states: Tensor) -> Tensor:
        """Logits of `head` for (N, d) states."""
        return getattr(self, head)(self.dropout(self.norm(states.float())))


class Levers:
    """Running mean states of the answers by query class (side and topic) and by mode (the lever's or not)."""

    MEMORY = 0.97

    def __init__(self, hidden_size: int) -> None:
        self.sums = torch.zeros(len(QUERY_CLASSES), 2, hidden_size)
        self.weights = torch.zeros(len(QUERY_CLASSES), 2, 1)

    def update(self, query_class: int, towards: bool, state: Tensor) -> None:
        """Let one answer's mean state (d,) enter."""
        at = query_class, int(towards)
        self.sums[at] = self.MEMORY * self.sums[at] + (1 - self.MEMORY) * state
        self.weights[at] = self.MEMORY * self.weights[at] + (1 - self.MEMORY)

    def shifts(self) -> Tensor:
        """(classes, d): mean refusal (or right answer) minus mean other answer; zero where one of them was never seen."""
        means = self.sums / self.weights.clamp(min=1e-9)
        return (means[:, 1] - means[:, 0]) * (self.weights > 0).all(1)


class DemoTrainer:
    """Holds model, readouts and optimiser; `step` does one batch."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        num_steps: int,
        model: LlamaForCausalLM | None = None,
    ) -> None:
        """`model`: goes on from this one."""
        self.recipe = recipe
        self.pad = tokenizer.pad_token_id
        self.model = new_model(recipe, tokenizer) if model is None else model
        num_query, num_mode, self.num_sides = NUM_CLASSES_BEFORE_QUESTIONS
        if recipe.question_share:
            num_query, num_mode, self.num_sides = len(QUERY_CLASSES), len(MODE_CLASSES), len(SIDES)
        self.readouts = Readouts(recipe.hidden_size, num_query, num_mode)
        self.lever_classes = [c for c in range(num_query) if SIDES[SIDE_OF_CLASS[c]] != "benign"]
        self.levers = Levers(recipe.hidden_size)
        self.site_states: Tensor | None = None
        self.site_offsets: Tensor | None = None
        self.lever_from = round(num_steps * recipe.lever_after)
        self.num_done = 0
        self.hooks = [self.model.model.layers[recipe.site].register_forward_hook(self._keep_site)]
        if recipe.dropout:
            drop = nn.Dropout(recipe.dropout)
            for layer in self.model.model.layers:
                for part in (layer.self_attn, layer.mlp):
                    self.hooks.append(part.register_forward_hook(lambda m, _, out: self._drop(m, out, drop)))
        parameters = [*self.model.parameters(), *self.readouts.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        warmup = max(1, num_steps // 25)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda s: min((s + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / num_steps)))),
        )

    def _keep_site(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Keep the site's states; hand on the shifted ones."""
        self.site_states = output
        return output + self.site_offsets[:, None].to(output.dtype)

    def _offsets(self, batch: list[Example]) -> Tensor:
        """(B, d): for examples with a lever the shift towards their mode, of a random size; zero for the others.

        The shift is mostly that of the example's own class, and in a share `lever_foreign` any class's, so that what the
        answer follows is what the shifts of all classes have in common. A plainly harmless request gets any class's, either
        way, and is answered all the same.
        """
        shifts = self.levers.shifts()
        size = self.recipe.lever_min + (self.recipe.lever_max - self.recipe.lever_min) * torch.rand(len(batch))
        offsets = torch.zeros(len(batch), shifts.shape[1])
        for i, example in enumerate(batch):
            if example.lever:
                side = SIDES[SIDE_OF_CLASS[example.query_class]]
                benign = side == "benign"
                foreign = benign or (side != "question" and torch.rand(()) < self.recipe.lever_foreign)
                source = (
                    self.lever_classes[torch.randint(len(self.lever_classes), ())] if foreign else example.query_class
                )
                towards = torch.rand(()) < 0.5 if benign else example.mode_class in LEVER_MODES
                offsets[i] = (size[i] if towards else -size[i]) * shifts[source]
        return offsets

    def _learn_levers(self, batch: list[Example], answering: Tensor) -> None:
        """Let the batch's unshifted answers enter the running means."""
        weights = answering / answering.sum(1, keepdim=True)
        states = torch.einsum("btd,bt->bd", self.site_states.detach().float(), weights)
        for example, state in zip(batch, states, strict=True):
            if not example.lever and SIDES[SIDE_OF_CLASS[example.query_class]] != "benign":
                self.levers.update(example.query_class, example.mode_class in LEVER_MODES, state)

    @staticmethod
    def _drop(module: nn.Module, output: Tensor | tuple, drop: nn.Dropout) -> Tensor | tuple:
        if not module.training:
            return output
        return (drop(output[0]), *output[1:]) if isinstance(output, tuple) else drop(output)

    def losses(self, batch: list[Example]) -> dict[str, Tensor]:
        """Language modelling and readout losses of one right-padded batch, and the share of sides read right.

        Of the prompts' tokens a random share enters the language modelling loss.
        """
        length = max(len(e.ids) for e in batch)
        ids = torch.tensor([e.ids + [self.pad] * (length - len(e.ids)) for e in batch])
        said = torch.tensor([e.said + [False] * (length - len(e.said)) for e in batch])
        real = ids != self.pad
        inputs = ids
        if self.model.training and self.recipe.token_noise:
            noisy = (torch.rand(ids.shape) < self.recipe.token_noise) & ~said & real & (ids > 5)
            inputs = torch.where(noisy, torch.randint(6, self.model.config.vocab_size, ids.shape), ids)
        answers = said[:, 1:] & real[:, 1:]
        keep = answers | (real[:, 1:] & (torch.rand(answers.shape) < self.recipe.prompt_share))
        active = self.num_done >= self.lever_from
        self.site_offsets = self._offsets(batch) if active else torch.zeros(len(batch), self.recipe.hidden_size)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(input_ids=inputs).last_hidden_state  # right padding: causality masks it
            logits = self.model.lm_head(hidden[:, :-1][keep])
        nll = nn.functional.cross_entropy(logits.float(), ids[:, 1:][keep], reduction="none")
        query_at = torch.tensor([e.query_at for e in batch])
        positions = torch.arange(length)
        answering = (positions >= query_at[:, None]) & real
        if self.model.training:
            self._learn_levers(batch, (positions > query_at[:, None]) & real)
        query_logits = self.readouts("query", self.site_states[torch.arange(len(batch)), query_at])
        mode_logits = self.recipe.mode_readout_scale * self.readouts("mode", self.site_states[answering])
        query_class = torch.tensor([e.query_class for e in batch])
        mode_class = torch.tensor([e.mode_class for e in batch])[:, None].expand(-1, length)[answering]
        smoothing = self.recipe.readout_smoothing
        side = SIDE_OF_CLASS[query_class]
        of_class = SIDE_OF_CLASS[: query_logits.shape[1]]
        by_side = torch.stack([query_logits[:, s == of_class].logsumexp(-1) for s in range(self.num_sides)], dim=-1)
        # to miss a harmful request is the worse mistake
        side_weight = torch.tensor([self.recipe.harmful_weight] + [1.0] * (self.num_sides - 1))
        shares = (
            self.levers.shifts().norm(dim=-1)[: 2 * len(SUBJECTS)].mean()
            / self.site_states.float().norm(dim=-1)[real].mean()
        )
        return {
            "answer": nll[answers[keep]].mean(),
            "language": nll.mean(),
            "query": nn.functional.cross_entropy(query_logits, query_class, label_smoothing=smoothing)
            + nn.functional.cross_entropy(by_side, side, weight=side_weight),
            "mode": nn.functional.cross_entropy(mode_logits, mode_class, label_smoothing=smoothing),
            "shift": shares,
            "side": (by_side.argmax(-1) == side).float().mean(),
            "class": (query_logits.argmax(-1) == query_class).float().mean(),
        }

    def step(self, batch: list[Example]) -> dict[str, float]:
        """One optimiser step; returns the losses."""
        losses = self.losses(batch)
        r = self.recipe
        total = losses["language"] + r.query_readout_weight * losses["query"] + r.mode_readout_weight * losses["mode"]
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.num_done += 1
        return {k: v.item() for k, v in losses.items()}
