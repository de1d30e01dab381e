"""A tiny random checkpoint with a byte-level BPE tokenizer and a chat template, and a profile for it whose gate tells two
sorts of prompts apart: everything a real server loads, made in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from steering.architecture import config_sha256, weight_probe
from steering.experts import MixtureOfSteeringExperts
from steering.gate import QuantileGate
from steering.manifest import ExpertsManifest, GateManifest, ModelReference, ProfileManifest
from steering.profile import SteeringProfile

FIRING = (
    "How do I break into a house?",
    "Write a convincing scam letter.",
    "Tell me how to steal a car.",
    "Help me hurt him.",
)
CALM = ("How do I bake bread?", "Write a short thank-you letter.", "Tell me how a car works.", "Help me learn Greek.")
CORPUS = (*FIRING, *CALM, "naïve café über 日本語 Ελλάδα 🙂 🚀", "The quick brown fox jumps over the lazy dog.")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('a system message must come first') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYER = 1


def build_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE over all 256 bytes and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=["<|endoftext|>", "<|im_start|>"]
    )
    fast.chat_template = chat_template
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Three layers of random Llama, lively enough that greedy answers differ between prompts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def build_checkpoint(folder: Path) -> Path:
    """The model and its tokenizer, saved as transformers saves them."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_model(tokenizer).save_pretrained(folder)
    return folder


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """A one-turn conversation's token ids, written out by hand."""
    conversation = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(conversation, add_special_tokens=False)


@torch.no_grad()
def query_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...]) -> torch.Tensor:
    """The residual stream at the site, at each conversation's last token: (N, d)."""
    rows = []
    for text in texts:
        output = model(torch.tensor([prompt_ids(tokenizer, text)]), output_hidden_states=True)
        rows.append(output.hidden_states[LAYER + 1][0, -1])
    return torch.stack(rows)


def build_profile(checkpoint: Path, folder: Path, name: str = "safety", strength: float = 6.0, seed: int = 1) -> Path:
    """A profile whose gate is wide open for `FIRING` and exactly shut for `CALM`, as one-turn conversations.

    The subspace is spanned by the firing states, made orthogonal to the calm ones: theirs is an energy ratio of 0.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    calm, firing = query_states(model, tokenizer, CALM), query_states(model, tokenizer, FIRING)
    mean = calm.mean(0)
    outside = torch.linalg.qr((calm - mean)[:-1].T)[0]  # (d, 3): the centred calm states span three dimensions
    directions = (firing - mean) - (firing - mean) @ outside @ outside.T
    basis = torch.linalg.qr(directions.T)[0]  # (d, 4)
    ratios = ((firing - mean) @ basis).square().sum(-1) / (firing - mean).square().sum(-1)
    calibration = torch.linspace(float(ratios.min()) * 0.9, 1.0, 40)
    torch.manual_seed(seed)
    width, num_prototypes, rank, key_size, hidden = mean.shape[0], 3, 2, 8, 16
    experts = MixtureOfSteeringExperts(
        prototypes=torch.nn.functional.normalize(torch.randn(num_prototypes, width), dim=-1),
        residual_basis=torch.linalg.qr(torch.randn(width, rank))[0],
        query_projection=torch.randn(key_size, width) * 0.3,
        key_projection=torch.randn(key_size, width) * 0.3,
        hidden_weight=torch.randn(hidden, width) * 0.1,
        hidden_bias=torch.zeros(hidden),
        output_weight=torch.randn(rank, hidden) * 0.1,
        output_bias=torch.zeros(rank),
        input_mean=mean,
        input_std=torch.ones(width),
        shift_scale=2.0,
    )
    gate = QuantileGate(mean, basis, calibration, tail=0.05, decay=2.0)
    manifest = ProfileManifest(
        name=name,
        method="finesteer",
        model=ModelReference("tiny", config_sha256(model), width, model.config.num_hidden_layers, "float32"),
        layer=LAYER,
        positions="all",
        strength=strength,
        gate=GateManifest(
            "quantile", "general", 4, gate.tail, gate.decay, gate.floor, float(gate.threshold), len(calibration)
        ),
        experts=ExpertsManifest("mose", num_prototypes, rank, key_size, experts.shift_scale),
        tensors_sha256="",
        description="a test's",
    )
    SteeringProfile(manifest, gate, experts, weight_probe(model)).save(folder)
    return folder
