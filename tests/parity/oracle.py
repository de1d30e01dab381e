"""What the engine must agree with, computed by another road: transformers' own forward, two passes, float64 numpy steering."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from transformers import PreTrainedModel

from steering.architecture import decoder_layers
from steering.decision import ProfileActivation
from steering.experts import ConstantVector, LayeredVectors, LinearMap
from steering.gate import CosineGate, QuantileGate
from steering.profile import SteeringProfile


def gate_and_vector(
    profile: SteeringProfile, state: torch.Tensor, layer: int | None = None
) -> tuple[float, np.ndarray]:
    """g(h) and v(h) of one (d,) state at one of the profile's layers, by default the first, by the formulas of the paper, in
    float64."""
    h = state.double().numpy()
    gate = profile.gate
    g = 1.0
    if isinstance(gate, QuantileGate):
        mean, basis, calibration = (x.double().numpy() for x in (gate.mean, gate.basis, gate.calibration))
        ratio = np.sum((basis.T @ (h - mean)) ** 2) / np.sum((h - mean) ** 2)
        rank = max(int(gate.tail * (len(calibration) + 1)), 1)
        if ratio < sorted(calibration)[rank - 1]:
            g = min(np.mean(calibration <= ratio) / gate.tail, 1.0) ** gate.decay
        g = g if g >= gate.floor else 0.0
    elif isinstance(gate, CosineGate):
        c = gate.condition.double().numpy()
        projected = np.tanh(np.outer(c, c) @ h / (c @ c))
        cosine = h @ projected / (np.linalg.norm(h) * np.linalg.norm(projected))
        g = float(cosine >= gate.threshold if gate.direction == "above" else cosine <= gate.threshold)
    e = profile.experts
    if isinstance(e, ConstantVector):
        return g, e.vector.double().numpy()
    if isinstance(e, LayeredVectors):
        return g, e.vectors[profile.manifest.layers.index(profile.layer if layer is None else layer)].double().numpy()
    if isinstance(e, LinearMap):
        return g, (e.left.double().numpy() @ e.right.double().numpy()) @ h
    z = (h - e.input_mean.double().numpy()) / e.input_std.double().numpy()
    keys = e.prototypes.double().numpy() @ e.key_projection.double().numpy().T
    scores = keys @ (e.query_projection.double().numpy() @ z) / np.sqrt(keys.shape[1])
    alpha = np.exp(scores - scores.max())
    alpha /= alpha.sum()
    hidden = np.maximum(e.hidden_weight.double().numpy() @ z + e.hidden_bias.double().numpy(), 0)
    beta = e.output_weight.double().numpy() @ hidden + e.output_bias.double().numpy()
    values = e.prototypes.double().numpy()
    if e.value_projection is not None:
        values = values + e.value_projection.double().numpy()
    return g, e.shift_scale * (alpha @ values + e.residual_basis.double().numpy() @ beta)


@torch.no_grad()
def two_pass(
    model: PreTrainedModel,
    prompt: list[int],
    num_tokens: int,
    steering: list[tuple[SteeringProfile, ProfileActivation]],
) -> tuple[list[int], list[float], list[float]]:
    """Greedy tokens, their log-probabilities and the gates, the authors' way.

    First the prompt is run to read the states and make the vectors (from the lowest layer up, each site seeing the
    profiles below it act, as a single pass does); then prompt and answer are run again, whole, with the vectors added.
    No cache, no packing, no batch.
    """
    with _eager(model):
        vectors, gates = _vectors(model, prompt, steering)
        tokens, logprobs = list(prompt), []
        for _ in range(num_tokens):
            logits = _logits(model, tokens, vectors, len(prompt))[-1]
            table = torch.log_softmax(logits.double(), -1)
            tokens.append(int(table.argmax()))
            logprobs.append(float(table.max()))
        return tokens[len(prompt) :], logprobs, gates


@torch.no_grad()
def prompt_table(
    model: PreTrainedModel, prompt: list[int], steering: list[tuple[SteeringProfile, ProfileActivation]] = ()
) -> torch.Tensor:
    """log p(t | prompt up to position i) for each i and every token t: (P, V) float64, in two passes as above."""
    with _eager(model):
        vectors, _ = _vectors(model, prompt, steering)
        return torch.log_softmax(_logits(model, prompt, vectors, len(prompt)).double(), -1)


@contextlib.contextmanager
def _eager(model):
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def _vectors(model, prompt, steering):
    """What is added at each layer, with its positions; and the gates, from the lowest layer up."""
    vectors: dict[int, list[tuple[np.ndarray, str]]] = {}
    gates = []
    for layer in sorted({layer for profile, _ in steering for layer in profile.manifest.layers}):
        state = _site(model, prompt, vectors, layer, len(prompt))[-1]
        here = []
        for profile, activation in steering:
            if layer not in profile.manifest.layers:
                continue
            g, v = gate_and_vector(profile, state, layer)
            g = {"auto": g, "open": 1.0, "closed": 0.0}[activation.gate]
            if layer == profile.layer:
                gates.append(g)
            strength = 0.0 if activation.shadow else activation.strength
            here.append((strength * g * v, activation.positions))
        vectors[layer] = here
    return vectors, gates


def _hooks(model, vectors, num_prompt):
    def hook_for(layer_vectors):
        def hook(module, args, output):
            states = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            for vector, positions in layer_vectors:
                start = 0 if positions == "all" else num_prompt - 1
                states[:, start:] += torch.from_numpy(vector).to(states.dtype)
            return states if isinstance(output, torch.Tensor) else (states, *output[1:])

        return hook

    layers = decoder_layers(model)
    return [layers[layer].register_forward_hook(hook_for(found)) for layer, found in vectors.items()]


def _site(model, tokens, vectors, layer, num_prompt):
    """The residual stream at a layer's output, (T, d), before anything is added there."""
    handles = _hooks(model, vectors, num_prompt)
    seen = []
    handles.append(
        decoder_layers(model)[layer].register_forward_hook(
            lambda m, a, o: seen.append((o if isinstance(o, torch.Tensor) else o[0])[0].clone())
        )
    )
    try:
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]


def _logits(model, tokens, vectors, num_prompt):
    handles = _hooks(model, vectors, num_prompt)
    try:
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
