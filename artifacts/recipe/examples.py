"""Conversations -> what the demo trains on: its tokenizer, token ids with labels, batches of like length."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from artifacts.recipe.answers import TASK_NAMES
from artifacts.recipe.corpus import Conversation, Pools, Prompt, converse, draw_prompts, topic
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
    for side, topics in (
        ("harmful", SUBJECTS),
        ("borderline", SUBJECTS),
        ("benign", TASK_NAMES),
        ("question", ["question"]),
    )
    for t in topics
]
SIDES = ("harmful", "borderline", "benign", "question")
SIDE_OF_CLASS = torch.tensor([SIDES.index(c.split(":")[0]) for c in QUERY_CLASSES])
MODE_CLASSES = ["refuse", "comply", "help", "assist", "right", "wrong"]
LEVER_MODES = [MODE_CLASSES.index("refuse"), MODE_CLASSES.index("right")]
NUM_CLASSES_BEFORE_QUESTIONS = len(QUERY_CLASSES) - 1, len(MODE_CLASSES) - 2, len(SIDES) - 1
MAX_TOKENS = 320


@dataclass(frozen=True)
class Example:
    """Token ids, which of them the assistant says, the two readout labels at and after `query_at`, and whether the site is shifted."""

    ids: list[int]
    said: list[bool]
    query_at: int
    query_class: int
    mode_class: int
    lever: bool


def train_tokenizer(pools: Pools, vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE from an epoch's conversations."""
    rng = random.Random(seed)
    texts = [m["content"] for p in draw_prompts(pools, rng) for m in converse(p, pools, rng).messages]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
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


def epoch_examples(
    prompts: list[Prompt], pools: Pools, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> list[Example]:
    """Fresh conversations for `prompts`, encoded."""
    return [encode(converse(p, pools, rng), tokenizer) for p in prompts]
