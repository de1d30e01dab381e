"""Train the embedded demo: `python -m artifacts.recipe.train_demo --data DIR --out FIRST`, and then, with the questions,
`... --data DIR --truthfulqa CSV --start FIRST --out artifacts/demo`.

What it learns and how is `demo_trainer`'s, what it learns from `examples`'.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from artifacts.recipe.corpus import Prompt, draw_prompts, load_pools, question_prompts
from artifacts.recipe.demo_trainer import SECOND, DemoTrainer, Recipe
from artifacts.recipe.examples import Example, batches, epoch_examples, train_tokenizer
from artifacts.recipe.truths import read_truths


def mean_losses(rows: list[dict[str, float]]) -> str:
    """The rows' means as one line."""
    return "  ".join(f"{k} {sum(r[k] for r in rows) / len(rows):.3f}" for k in rows[0])


def train(data: Path, out: Path, recipe: Recipe, start: Path | None = None, truthfulqa: Path | None = None) -> None:
    """Train tokenizer and model from the prompt folder `data`; write a transformers checkpoint to `out`.

    `start`: the first stage's checkpoint, to go on from with `truthfulqa`'s questions.
    """
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    pools = load_pools(data, recipe.seed)
    if start is None:
        tokenizer, model = train_tokenizer(pools, recipe.vocab_size, recipe.seed), None
    else:
        tokenizer = AutoTokenizer.from_pretrained(start)
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        pools = replace(pools, questions=question_prompts(read_truths(truthfulqa)))

    def epoch_batches(prompts: list[Prompt]) -> list[list[Example]]:
        return batches(epoch_examples(prompts, pools, tokenizer, rng), recipe.batch_tokens, rng)

    def draw() -> list[Prompt]:
        return draw_prompts(pools, rng, recipe.epoch_scale, recipe.question_share)

    dev = epoch_batches(pools.dev)
    first = epoch_batches(draw())
    num_steps = round(len(first) * recipe.epochs * 1.01)
    trainer = DemoTrainer(recipe, tokenizer, num_steps, model)
    size = sum(p.numel() for p in trainer.model.parameters())
    with Progress() as progress:
        bar = progress.add_task(f"training {size / 1e6:.1f} M parameters", total=num_steps)
        for epoch in range(recipe.epochs):
            groups = first if epoch == 0 else epoch_batches(draw())
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
    parser.add_argument("--start", type=Path, help="the first stage's checkpoint: do the second stage")
    parser.add_argument("--truthfulqa", type=Path, help="TruthfulQA.csv, for the second stage")
    for name, value in asdict(Recipe()).items():
        shown = f"default {value}, in the second stage {getattr(SECOND, name)}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=shown)
    options = vars(parser.parse_args())
    paths = {name: options.pop(name) for name in ("data", "out", "start", "truthfulqa")}
    if (paths["start"] is None) != (paths["truthfulqa"] is None):
        parser.error("--start and --truthfulqa go together: they are the second stage.")
    recipe = Recipe() if paths["start"] is None else SECOND
    train(**paths, recipe=replace(recipe, **{k: v for k, v in options.items() if v is not None}))


if __name__ == "__main__":
    main()
