"""What transformers says of the demo, for comparison. Runs with the server's interpreter, which has torch.

`python -m tests.clients.transformers_reference`: JSON on standard input, `{"pairs": [[context ids, continuation ids]],
"prompts": [text], "max_new_tokens": n}`; on standard output `{"pairs": [[sum of log-probabilities, is greedy]],
"answers": [text]}`.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from server.config import demo_folder


@torch.no_grad()
def loglikelihood(model: PreTrainedModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Σ log p(continuation | context), and whether greedy decoding would write it."""
    logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]  # (len(continuation), V)
    ids = torch.tensor(continuation)
    table = torch.log_softmax(logits.double(), -1)
    return float(table.gather(1, ids[:, None]).sum()), bool((logits.argmax(-1) == ids).all())


def main() -> None:
    asked = json.load(sys.stdin)
    folder = demo_folder() / "demo"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for text in asked["prompts"]:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        found = model.generate(ids, max_new_tokens=asked["max_new_tokens"], do_sample=False)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(found, skip_special_tokens=True))
    json.dump({"pairs": [loglikelihood(model, *pair) for pair in asked["pairs"]], "answers": answers}, sys.stdout)


if __name__ == "__main__":
    main()
