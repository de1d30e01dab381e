"""Train the embedded demo: `python -m artifacts.recipe.train_demo --data DIR --out artifacts/demo`.

What it learns and how is `demo_trainer`'s, what it learns from `examples`'.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from artifacts.recipe.corpus import draw_prompts, load_pools
from artifacts.recipe.demo_trainer import DemoTrainer, Recipe
from artifacts.recipe.examples import batches, epoch_examples, train_tokenizer


def mean_losses(rows: list[dict[str, float]]) -> str:
    """The rows' means as one line."""
    return "  ".join(f"{k} {sum(r[k] for r in rows) / len(rows):.3f}" for k in rows[0])


def train(data: Path, out: Path, recipe: Recipe) -> None:
    """Train tokenizer and model from the prompt folder `data`; write a transformers checkpoint to `out`."""
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    pools = load_pools(data, recipe.seed)
    tokenizer = train_tokenizer(pools, recipe.vocab_size, recipe.seed)
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
