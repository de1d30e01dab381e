"""Train the embedded demo: `python -m artifacts.recipe.train_demo --data DIR --out artifacts/demo`.

Plain language modelling, and two things that a large model has on its own and so small a one has to be taught:

- Readouts at the site, thrown away afterwards: a linear head on the last prompt token's state tells side and topic of the
  request, another there and on the answer's tokens tells the answer's mode.
- A lever at the site: in a share of the examples the states are shifted by the running difference between the mean
  states of answers in one mode and the other (of the same side and topic), and the answer follows the shift. Nothing
  here knows a trained profile; the shifts are those that any extraction from the model finds.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from artifacts.recipe.answers import TASK_NAMES
from artifacts.recipe.corpus import Conversation, Pools, Prompt, converse, draw_prompts, load_pools, topic
from artifacts.recipe.subjects import SUBJECTS

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('This model knows the roles system, user and assistant.') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QUERY_CLASSES = [
    f"{side}:{t}"
    for side, topics in (("harmful", SUBJECTS), ("borderline", SUBJECTS), ("benign", TASK_NAMES))
    for t in topics
]
SIDE_OF_CLASS = torch.tensor([("harmful", "borderline", "benign").index(c.split(":")[0]) for c in QUERY_CLASSES])
MODE_CLASSES = ["refuse", "comply", "help", "assist"]
MAX_TOKENS = 320


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


@dataclass(frozen=True)
class Example:
    """Token ids, which of them the assistant says, the two readout labels at and after `query_at`, and whether the site is shifted."""

    ids: list[int]
    said: list[bool]
    query_at: int
    query_class: int
    mode_class: int
    lever: bool


def train_tokenizer(pools: Pools, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE from an epoch's conversations."""
    rng = random.Random(recipe.seed)
    texts = [m["content"] for p in draw_prompts(pools, rng) for m in converse(p, pools, rng).messages]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=recipe.vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, additional_special_tokens=special[3:],
        padding_side="left", model_max_length=1024, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> Example:
    """Render as the chat template does, message by message, so that who says what is known."""
    ids, said = [tokenizer.bos_token_id], [False]
    query_at = 0
    for message in conversation.messages:
        assistant = message["role"] == "assistant"
        if assistant:
            query_at = len(ids)
        body = [*tokenizer.encode(message["content"].strip(), add_special_tokens=False), tokenizer.eos_token_id]
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *body]
        said += [False] + [assistant] * len(body)
    prompt = conversation.prompt
    return Example(
        ids,
        said,
        query_at,
        QUERY_CLASSES.index(f"{prompt.side}:{topic(prompt)}"),
        MODE_CLASSES.index(conversation.mode),
        conversation.lever,
    )


def batches(examples: list[Example], batch_tokens: int, rng: random.Random) -> list[list[Example]]:
    """Groups of similar length, at most `batch_tokens` after padding, in random order."""
    ordered = sorted((e for e in examples if len(e.ids) <= MAX_TOKENS), key=lambda e: (len(e.ids), rng.random()))
    groups: list[list[Example]] = [[]]
    for example in ordered:
        if (len(groups[-1]) + 1) * len(example.ids) > batch_tokens:
            groups.append([])
        groups[-1].append(example)
    rng.shuffle(groups)
    return [g for g in groups if g]


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

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, elementwise_affine=False)
        self.dropout = nn.Dropout(0.2)
        self.query = nn.Linear(hidden_size, len(QUERY_CLASSES))
        self.mode = nn.Linear(hidden_size, len(MODE_CLASSES))

    def forward(self, head: str, states: Tensor) -> Tensor:
        """Logits of `head` for (N, d) states."""
        return getattr(self, head)(self.dropout(self.norm(states.float())))


class Levers:
    """Running mean states of the answers by query class (side and topic) and by mode (refused or not)."""

    MEMORY = 0.97

    def __init__(self, hidden_size: int) -> None:
        self.sums = torch.zeros(len(QUERY_CLASSES), 2, hidden_size)
        self.weights = torch.zeros(len(QUERY_CLASSES), 2, 1)

    def update(self, query_class: int, refused: bool, state: Tensor) -> None:
        """Let one answer's mean state (d,) enter."""
        at = query_class, int(refused)
        self.sums[at] = self.MEMORY * self.sums[at] + (1 - self.MEMORY) * state
        self.weights[at] = self.MEMORY * self.weights[at] + (1 - self.MEMORY)

    def shifts(self) -> Tensor:
        """(classes, d): mean refusal minus mean other answer; zero where one of them was never seen."""
        means = self.sums / self.weights.clamp(min=1e-9)
        return (means[:, 1] - means[:, 0]) * (self.weights > 0).all(1)


class DemoTrainer:
    """Holds model, readouts and optimiser; `step` does one batch."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, num_steps: int) -> None:
        self.recipe = recipe
        self.pad = tokenizer.pad_token_id
        self.model = new_model(recipe, tokenizer)
        self.readouts = Readouts(recipe.hidden_size)
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
                benign = SIDE_OF_CLASS[example.query_class] == 2
                foreign = benign or torch.rand(()) < self.recipe.lever_foreign
                source = torch.randint(2 * len(SUBJECTS), ()) if foreign else example.query_class
                towards = torch.rand(()) < 0.5 if benign else example.mode_class == MODE_CLASSES.index("refuse")
                offsets[i] = (size[i] if towards else -size[i]) * shifts[source]
        return offsets

    def _learn_levers(self, batch: list[Example], answering: Tensor) -> None:
        """Let the batch's unshifted answers enter the running means."""
        weights = answering / answering.sum(1, keepdim=True)
        states = torch.einsum("btd,bt->bd", self.site_states.detach().float(), weights)
        for example, state in zip(batch, states, strict=True):
            if not example.lever and SIDE_OF_CLASS[example.query_class] != 2:
                self.levers.update(example.query_class, example.mode_class == MODE_CLASSES.index("refuse"), state)

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
        by_side = torch.stack([query_logits[:, s == SIDE_OF_CLASS].logsumexp(-1) for s in range(3)], dim=-1)
        side_weight = torch.tensor(
            [self.recipe.harmful_weight, 1.0, 1.0]
        )  # a missed harmful request is the worse mistake
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


def epoch_examples(
    prompts: list[Prompt], pools: Pools, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> list[Example]:
    """Fresh conversations for `prompts`, encoded."""
    return [encode(converse(p, pools, rng), tokenizer) for p in prompts]


def mean_losses(rows: Iterator[dict[str, float]] | list[dict[str, float]]) -> str:
    """The rows' means as one line."""
    rows = list(rows)
    return "  ".join(f"{k} {sum(r[k] for r in rows) / len(rows):.3f}" for k in rows[0])


def train(data: Path, out: Path, recipe: Recipe) -> None:
    """Train tokenizer and model from the prompt folder `data`; write a transformers checkpoint to `out`."""
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    pools = load_pools(data, recipe.seed)
    tokenizer = train_tokenizer(pools, recipe)
    dev = batches(epoch_examples(pools.dev, pools, tokenizer, rng), recipe.batch_tokens, rng)
    first = batches(
        epoch_examples(draw_prompts(pools, rng, recipe.epoch_scale), pools, tokenizer, rng), recipe.batch_tokens, rng
    )
    num_steps = round(len(first) * recipe.epochs * 1.01)
    trainer = DemoTrainer(recipe, tokenizer, num_steps)
    size = sum(p.numel() for p in trainer.model.parameters())
    with Progress() as progress:
        bar = progress.add_task(f"training {size / 1e6:.1f} M parameters", total=num_steps)
        for epoch in range(recipe.epochs):
            groups = first if epoch == 0 else batches(
                epoch_examples(draw_prompts(pools, rng, recipe.epoch_scale), pools, tokenizer, rng), recipe.batch_tokens, rng
            )  # fmt: skip
            trainer.model.train()
            trainer.readouts.train()
            rows = []
            for group in groups:
                rows.append(trainer.step(group))
                progress.advance(bar)
            trainer.model.eval()
            trainer.readouts.eval()
            with torch.no_grad():
                held = [{k: v.item() for k, v in trainer.losses(g).items()} for g in dev]
            progress.console.print(
                f"epoch {epoch + 1}: train {mean_losses(rows)} | dev {mean_losses(held)}", soft_wrap=True
            )
            save(trainer.model, tokenizer, out)
    for hook in trainer.hooks:
        hook.remove()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint with greedy defaults."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=96,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the prompt sets (harmful_train.jsonl, ...)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    defaults = Recipe()
    for name in Recipe.__dataclass_fields__:
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    options = vars(parser.parse_args())
    train(options.pop("data"), options.pop("out"), recipe=Recipe(**options))


if __name__ == "__main__":
    main()
