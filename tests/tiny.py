"""Tiny random checkpoints of every supported family, a tokenizer, and profiles: real code paths, milliseconds each."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from steering.architecture import config_sha256, decoder_layers, weight_probe
from steering.experts import ConstantVector, LayeredVectors, LinearMap, MixtureOfSteeringExperts
from steering.gate import AlwaysOpenGate, CosineGate, QuantileGate, condition_similarity
from steering.manifest import ExpertsManifest, GateManifest, ModelReference, ProfileManifest
from steering.profile import SteeringProfile

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 16, "sliding_window": 8}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 16, "sliding_window": 8}),
}
FAMILIES = tuple(_CLASSES)
VOCAB_SIZE = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model(family: str = "llama", **overrides) -> PreTrainedModel:
    """A random decoder of 4 layers, 64 wide, float32, the same at each call; its weights are large enough to have opinions."""
    config_class, model_class, extra = _CLASSES[family]
    config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": 3,
        "pad_token_id": 3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = model_class(config_class(**config | extra | overrides)).eval()
    model.generation_config.eos_token_id = 3
    return model


@functools.cache
def _byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        "the quick brown fox jumps over the lazy dog and the other foxes",
        "how do I steer a model with a vector?",
    ]
    tokenizer.train_from_iterator(corpus * 4, trainer)
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template; `<|end|>` (id 3) ends an answer."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_tokenizer().to_str()), eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny_checkpoint(folder: str | Path, family: str = "llama", **overrides) -> Path:
    """Write model and tokenizer as a checkpoint folder that `from_pretrained` loads."""
    folder = Path(folder)
    tiny_model(family, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_profile(
    model: PreTrainedModel,
    layer: int = 1,
    *,
    name: str = "tiny",
    strength: float = 2.0,
    seed: int = 0,
    tail: float = 0.3,
    positions: str = "all",
    num_prototypes: int = 3,
    residual_rank: int = 2,
) -> SteeringProfile:
    """A random but valid profile for `model`: about half of random prompts fall under its threshold, some of them softly."""
    generator = torch.Generator().manual_seed(seed)
    d, rank, hidden, key_size = model.config.hidden_size, 4, 8, 16
    states = _states(model, layer, generator)
    centre = states.mean(0)
    basis = torch.linalg.svd(states[::2] - centre, full_matrices=False).Vh[:rank].T.contiguous()
    gate = QuantileGate(centre, basis, torch.zeros(1), tail=tail, decay=1.0)
    ratios = gate(states).energy_ratio.sort().values
    gate = QuantileGate(centre, basis, ratios[len(ratios) // 3 :].contiguous(), tail=tail, decay=1.0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    experts = MixtureOfSteeringExperts(
        prototypes=torch.nn.functional.normalize(random(num_prototypes, d), dim=-1),
        residual_basis=torch.linalg.qr(random(d, residual_rank)).Q.contiguous(),
        query_projection=random(key_size, d) / d**0.5,
        key_projection=random(key_size, d),
        hidden_weight=random(hidden, d) / d**0.5,
        hidden_bias=random(hidden),
        output_weight=random(residual_rank, hidden) / 4,
        output_bias=torch.zeros(residual_rank),
        input_mean=centre,
        input_std=states.std(0) + 1e-3,
        shift_scale=float(states.norm(dim=-1).mean()) / 2,
    )
    manifest = ProfileManifest(
        name=name,
        method="finesteer",
        model=ModelReference("tiny", config_sha256(model), d, len(decoder_layers(model)), "float32"),
        layer=layer,
        positions=positions,
        strength=strength,
        gate=GateManifest("quantile", "general", rank, tail, 1.0, 1e-3, float(gate.threshold), len(gate.calibration)),
        experts=ExpertsManifest("mose", num_prototypes, residual_rank, key_size, experts.shift_scale),
        tensors_sha256="0" * 64,
        training={"command": "tests.tiny"},
    )
    return SteeringProfile(manifest, gate, experts, weight_probe(model))


def constant_profile(model: PreTrainedModel, layer: int = 1, **options) -> SteeringProfile:
    """As `tiny_profile`, but with one and the same vector for every prompt."""
    profile = tiny_profile(model, layer, **options)
    experts = profile.experts
    vector = ConstantVector(experts.shift_scale * experts.prototypes[0])
    manifest = replace(profile.manifest, method="caa", experts=ExpertsManifest("constant"))
    return replace(profile, manifest=manifest, experts=vector)


def orthogonal_profile(model: PreTrainedModel, layer: int = 1, **options) -> SteeringProfile:
    """As `tiny_profile`, but of the variant `orthogonal_residual`, with a value projection that does something."""
    profile = tiny_profile(model, layer, **options)
    experts = profile.experts
    span = torch.linalg.qr(experts.prototypes.T).Q
    basis = experts.residual_basis - span @ (span.T @ experts.residual_basis)
    values = torch.randn(experts.prototypes.shape, generator=torch.Generator().manual_seed(5)) / 8
    experts = replace(experts, residual_basis=torch.linalg.qr(basis).Q.contiguous(), value_projection=values)
    spec = replace(profile.manifest.experts, variant="orthogonal_residual")
    return replace(profile, manifest=replace(profile.manifest, experts=spec), experts=experts)


def alphasteer_profile(model: PreTrainedModel, layer: int = 1, **options) -> SteeringProfile:
    """A random matrix of rank 2 in place of the experts, and no gate."""
    profile = tiny_profile(model, layer, **options)
    generator = torch.Generator().manual_seed(6)
    d = model.config.hidden_size
    left, right = torch.randn(d, 2, generator=generator), torch.randn(2, d, generator=generator) / d
    manifest = replace(
        profile.manifest,
        method="alphasteer",
        gate=GateManifest("always"),
        experts=ExpertsManifest("linear", map_rank=2),
    )
    return replace(profile, manifest=manifest, gate=AlwaysOpenGate(), experts=LinearMap(left, right))


def cast_profile(model: PreTrainedModel, layer: int = 1, **options) -> SteeringProfile:
    """A hard threshold, in the widest gap among the middle third of random prompts' similarities, and one vector."""
    profile = constant_profile(model, layer, **options)
    states = _states(model, layer, torch.Generator().manual_seed(options.get("seed", 0)))
    condition = torch.linalg.svd(states - states.mean(0), full_matrices=False).Vh[0].contiguous()
    middle = condition_similarity(states, condition).sort().values[len(states) // 3 : -(len(states) // 3)]
    i = int(middle.diff().argmax())
    gate = CosineGate(condition, float(middle[i : i + 2].mean()), "above")
    spec = GateManifest("cosine", threshold=gate.threshold, num_calibration=len(states), direction="above")
    return replace(profile, manifest=replace(profile.manifest, method="cast", gate=spec), gate=gate)


def layered_profile(
    model: PreTrainedModel, layer: int = 1, further: tuple[int, ...] = (2, 3), **options
) -> SteeringProfile:
    """As `constant_profile`, but with no gate and another vector at each of several layers, `layer` the first of them."""
    profile = constant_profile(model, layer, **options)
    generator = torch.Generator().manual_seed(8)
    first = profile.experts.vector
    others = torch.nn.functional.normalize(torch.randn(len(further), len(first), generator=generator), dim=-1)
    spec = ExpertsManifest("constant", layers=[layer, *further])
    manifest = replace(profile.manifest, gate=GateManifest("always"), experts=spec)
    vectors = LayeredVectors(torch.cat([first[None], others * first.norm()]))
    return replace(profile, manifest=manifest, gate=AlwaysOpenGate(), experts=vectors)


# Each kind of gate and experts that a profile may have.
PROFILES = {
    "standard": tiny_profile,
    "orthogonal_residual": orthogonal_profile,
    "constant": constant_profile,
    "alphasteer": alphasteer_profile,
    "cast": cast_profile,
    "layered": layered_profile,
}


@torch.no_grad()
def _states(model: PreTrainedModel, layer: int, generator: torch.Generator) -> torch.Tensor:
    """The residual stream at the site after 96 random prompts of 3 tokens: (96, d)."""
    prompts = torch.randint(1, 120, (96, 3), generator=generator).to(model.device)
    states = model(input_ids=prompts, output_hidden_states=True, use_cache=False).hidden_states[layer + 1][:, -1]
    return states.clone().float().cpu()
