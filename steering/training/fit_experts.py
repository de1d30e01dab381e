"""Fitting MoSE: prototypes by clustering the shifts, a residual basis, and a router and MLP trained to predict the shift."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import calinski_harabasz_score
from torch import Tensor

from steering.errors import TrainingDataError
from steering.experts import MixtureOfSteeringExperts
from steering.training.principal import principal_directions
from steering.training.progress import progress_bar


@dataclass(frozen=True)
class ExpertOptions:
    """Hyperparameters; the defaults are the paper's where it gives them."""

    prototypes: tuple[int, int] = (4, 10)
    residual_rank: int = 10
    key_size: int = 64
    hidden_size: int = 128
    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 5e-4
    weight_decay: float = 1e-5
    regularisation: float = 1e-5
    clip: float = 1.0
    validation: float = 0.1
    patience: int = 8


@dataclass(frozen=True)
class ExpertFit:
    """The fitted experts and how they came about.

    Errors are mean ‖v − δ‖² over the validation pairs, in units of the mean ‖δ‖² (`shift_scale`²): predicting zero gives
    about 1. `cluster_scores`: Calinski–Harabasz by K. `clusters`: (N,) each pair's prototype.
    """

    experts: MixtureOfSteeringExperts
    cluster_scores: dict[int, float]
    clusters: np.ndarray
    curve: list[tuple[float, float]]
    validation_error: float
    mean_vector_error: float
    zero_error: float


def fit_experts(
    states: Tensor, shifts: Tensor, options: ExpertOptions | None = None, *, seed: int = 0, progress: bool = False
) -> ExpertFit:
    """Fit v(h) ≈ δ on (N, d) query states and their pairs' shifts.

    Source: FineSteer, MoSE; METHOD's deviations: standardised inputs, units of σ = √mean‖δ‖², the MLP's last layer starts
    at zero. The residual basis is the principal directions of the raw, uncentred shifts. Deterministic given the seed.
    Raises TrainingDataError with fewer than 20 pairs or shifts that are all alike.
    """
    options = options or ExpertOptions()
    if len(states) < 20:
        raise TrainingDataError(
            f"MoSE needs at least 20 pairs; there are {len(states)}. Add pairs, or train --method caa."
        )
    scale = float(shifts.square().sum(-1).mean().sqrt())
    if not scale > 0:
        raise TrainingDataError(
            "all preferred and undesired answers have the same states: nothing to learn. Check the pairs."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prototypes, clusters, scores = _prototypes(shifts, options.prototypes, seed)
        experts = _initial(states, shifts, prototypes, scale, options)
        order = torch.randperm(len(states))
        held = max(1, int(options.validation * len(states)))
        validation, training = order[:held], order[held:]
        with _one_thread():
            experts, curve = _train(experts, states, shifts, training, validation, options, progress)
    mean_vector = shifts[training].mean(0)
    return ExpertFit(
        experts,
        scores,
        clusters,
        curve,
        validation_error=_error(experts(states[validation]).vector, shifts[validation], scale),
        mean_vector_error=_error(mean_vector, shifts[validation], scale),
        zero_error=_error(torch.zeros(()), shifts[validation], scale),
    )


def _prototypes(shifts: Tensor, counts: tuple[int, int], seed: int) -> tuple[Tensor, np.ndarray, dict[int, float]]:
    """Centroids of the length-normalised shifts, K by Calinski–Harabasz: (K, d), each shift's cluster, the scores."""
    normalised = torch.nn.functional.normalize(shifts, dim=-1).double().numpy()
    fits, scores = {}, {}
    for k in range(counts[0], min(counts[1], len(shifts) - 1) + 1):
        fits[k] = KMeans(k, n_init=10, random_state=seed).fit(normalised)
        if k > 1:
            scores[k] = float(calinski_harabasz_score(normalised, fits[k].labels_))
    best = max(scores, key=scores.__getitem__) if scores else counts[0]
    return torch.from_numpy(fits[best].cluster_centers_).float(), fits[best].labels_, scores


def _initial(
    states: Tensor, shifts: Tensor, prototypes: Tensor, scale: float, options: ExpertOptions
) -> MixtureOfSteeringExperts:
    """Untrained experts: random projections, and an MLP that starts by adding nothing."""
    d, m = states.shape[1], min(options.residual_rank, states.shape[1])
    directions = principal_directions(shifts, m)
    query = torch.nn.Linear(d, options.key_size, bias=False).weight
    key = torch.nn.Linear(d, options.key_size, bias=False).weight
    hidden = torch.nn.Linear(d, options.hidden_size)
    return MixtureOfSteeringExperts(
        prototypes=prototypes,
        residual_basis=directions,
        query_projection=query,
        key_projection=key,
        hidden_weight=hidden.weight,
        hidden_bias=hidden.bias,
        output_weight=torch.nn.Parameter(torch.zeros(m, options.hidden_size)),
        output_bias=torch.nn.Parameter(torch.zeros(m)),
        input_mean=states.mean(0),
        input_std=states.std(0).clamp_min(1e-6),
        shift_scale=scale,
    )


TRAINED = ("query_projection", "key_projection", "hidden_weight", "hidden_bias", "output_weight", "output_bias")


def _train(
    experts: MixtureOfSteeringExperts,
    states: Tensor,
    shifts: Tensor,
    training: Tensor,
    validation: Tensor,
    options: ExpertOptions,
    progress: bool,
) -> tuple[MixtureOfSteeringExperts, list[tuple[float, float]]]:
    """AdamW on the operator's own forward; returns the best epoch's experts, frozen, and (training, validation) errors."""
    parameters = [getattr(experts, name) for name in TRAINED]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    best, best_error, since, curve = _freeze(experts), float("inf"), 0, []
    with progress_bar("router and residual", options.epochs, progress) as advance:
        for _ in range(options.epochs):
            total = 0.0
            for batch in training[torch.randperm(len(training))].split(options.batch_size):
                residual = (experts(states[batch]).vector - shifts[batch]) / experts.shift_scale
                fit = residual.square().sum(-1).mean()
                loss = fit + options.regularisation * sum(p.square().sum() for p in parameters)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, options.clip)
                optimizer.step()
                total += float(fit.detach()) * len(batch)
            with torch.no_grad():
                error = _error(experts(states[validation]).vector, shifts[validation], experts.shift_scale)
            curve.append((total / len(training), error))
            advance()
            if error < best_error:
                best, best_error, since = _freeze(experts), error, 0
            elif (since := since + 1) > options.patience:
                break
    return best, curve


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small lose more to handing work between threads than they gain, many times over on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _freeze(experts: MixtureOfSteeringExperts) -> MixtureOfSteeringExperts:
    return replace(experts, **{name: getattr(experts, name).detach().clone() for name in TRAINED})


def _error(predicted: Tensor, shifts: Tensor, scale: float) -> float:
    """mean ‖v − δ‖² / σ²."""
    return float((predicted - shifts).square().sum(-1).mean() / scale**2)
