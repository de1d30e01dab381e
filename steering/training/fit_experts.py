"""Fitting MoSE: prototypes by clustering the shifts, a residual basis, and a router and MLP trained to predict the shift."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import calinski_harabasz_score, pairwise_distances, silhouette_score
from torch import Tensor

from steering.errors import TrainingDataError
from steering.experts import MixtureOfSteeringExperts
from steering.manifest import Variant
from steering.training.principal import principal_directions
from steering.training.progress import progress_bar

MIN_PAIRS = 20


@dataclass(frozen=True)
class ExpertOptions:
    """Hyperparameters; the defaults are the paper's where it gives them. `variant`: see `fit_experts`.

    `patience`: how many epochs may pass without the validation error falling by `improvement`, a share of the mean squared
    shift (ours: without, noise far below what matters goes on resetting the count).
    """

    variant: Variant = "standard"
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
    improvement: float = 1e-4


@dataclass(frozen=True)
class ExpertFit:
    """The fitted experts and how they came about.

    Errors are mean ‖v − δ‖² over the validation pairs, in units of the mean ‖δ‖² (`shift_scale`²): predicting zero gives
    about 1. `clusters`: (N,) each pair's prototype. `criteria`: {criterion: {K: score}}, the higher the better, and `choices`:
    {criterion: K}, each one's own; the variant `standard` has one criterion, `orthogonal_residual` three and takes the median.
    """

    experts: MixtureOfSteeringExperts
    criteria: dict[str, dict[int, float]]
    choices: dict[str, int]
    clusters: np.ndarray
    curve: list[tuple[float, float]]
    validation_error: float
    mean_vector_error: float
    zero_error: float

    @property
    def cluster_scores(self) -> dict[int, float]:
        """Calinski–Harabasz by K."""
        return self.criteria["calinski_harabasz"]


def fit_experts(
    states: Tensor, shifts: Tensor, options: ExpertOptions | None = None, *, seed: int = 0, progress: bool = False
) -> ExpertFit:
    """Fit v(h) ≈ δ on (N, d) query states and their pairs' shifts.

    Source: FineSteer, MoSE; METHOD's deviations: standardised inputs, units of σ = √mean‖δ‖², the MLP's last layer starts
    at zero. The residual basis is the principal directions of the raw, uncentred shifts. Deterministic given the seed.

    `variant` "orthogonal_residual" is the authors' code's: prototypes of shifts that keep their lengths (in units of σ), K the
    median of what the elbow, the silhouette and Calinski–Harabasz choose, a residual basis of what of the shifts lies
    outside of the prototypes' span, and a value projection that starts at the identity (see `MixtureOfSteeringExperts`).
    Raises TrainingDataError with fewer than `MIN_PAIRS` pairs or shifts that are all alike.
    """
    options = options or ExpertOptions()
    refuse_too_few(len(states))
    scale = float(shifts.square().sum(-1).mean().sqrt())
    if not scale > 0:
        raise TrainingDataError(
            "all preferred and undesired answers have the same states: nothing to learn. Check the pairs."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if options.variant == "standard":
            prototypes, clusters, criteria, choices = _prototypes(
                torch.nn.functional.normalize(shifts, dim=-1), options.prototypes, ("calinski_harabasz",), seed
            )
            experts = _initial(states, shifts, prototypes, scale, options)
        else:
            prototypes, clusters, criteria, choices = _prototypes(shifts / scale, options.prototypes, CRITERIA, seed)
            experts = _initial(states, _outside(shifts, prototypes), prototypes, scale, options)
            experts = replace(_orthogonal(experts), value_projection=torch.nn.Parameter(torch.zeros_like(prototypes)))
        order = torch.randperm(len(states))
        held = max(1, int(options.validation * len(states)))
        validation, training = order[:held], order[held:]
        with _one_thread():
            experts, curve = _train(experts, states, shifts, training, validation, options, progress)
    mean_vector = shifts[training].mean(0)
    return ExpertFit(
        experts,
        criteria,
        choices,
        clusters,
        curve,
        validation_error=float(_error(experts(states[validation]).vector, shifts[validation], scale)),
        mean_vector_error=float(_error(mean_vector, shifts[validation], scale)),
        zero_error=float(_error(torch.zeros(()), shifts[validation], scale)),
    )


def refuse_too_few(num_queries: int) -> None:
    """Raise TrainingDataError where the pairs have too few different queries for a mixture."""
    if num_queries < MIN_PAIRS:
        raise TrainingDataError(
            f"MoSE needs at least {MIN_PAIRS} pairs of different queries; there are {num_queries}. Add pairs, or train --method caa."
        )


CRITERIA = ("elbow", "silhouette", "calinski_harabasz")
RESTARTS = 10
RESTART_SAMPLE = 4000  # of the shifts: what k-means restarts on
SILHOUETTE_SAMPLE = 2000  # its cost is quadratic


def _prototypes(
    shifts: Tensor, counts: tuple[int, int], criteria: tuple[str, ...], seed: int
) -> tuple[Tensor, np.ndarray, dict[str, dict[int, float]], dict[str, int]]:
    """K-means centroids, K the (lower) median of the criteria's choices: (K, d), each shift's cluster, scores, choices."""
    rows = shifts.double().numpy()
    fits = _clusterings(rows, range(counts[0], min(counts[1], len(shifts) - 1) + 1), seed)
    judged = {k: fit for k, fit in fits.items() if k > 1}
    scores: dict[str, dict[int, float]] = {}
    for name in criteria:
        if name == "elbow":
            scores[name] = elbow({k: float(fit.inertia_) for k, fit in fits.items()})
        elif name == "silhouette":
            some = _some(len(rows), SILHOUETTE_SAMPLE, seed)
            distances = pairwise_distances(rows[some])
            np.fill_diagonal(distances, 0)  # rounding
            scores[name] = {
                k: float(silhouette_score(distances, fit.labels_[some], metric="precomputed"))
                for k, fit in judged.items()
            }
        else:
            scores[name] = {k: float(calinski_harabasz_score(rows, fit.labels_)) for k, fit in judged.items()}
    choices = {name: max(found, key=found.__getitem__) if found else counts[0] for name, found in scores.items()}
    best = sorted(choices.values())[(len(choices) - 1) // 2]
    return torch.from_numpy(fits[best].cluster_centers_).float(), fits[best].labels_, scores, choices


def _clusterings(rows: np.ndarray, counts: Iterable[int], seed: int) -> dict[int, KMeans]:
    """K-means of (N, d) rows for each K. Of more than `RESTART_SAMPLE` rows the restarts see a sample, whose best centroids
    all rows then start from: one run on all of them in place of ten."""
    sample = rows[_some(len(rows), RESTART_SAMPLE, seed)]
    fits = {k: KMeans(k, n_init=RESTARTS, random_state=seed).fit(sample) for k in counts}
    if len(sample) == len(rows):
        return fits
    return {k: KMeans(k, init=fit.cluster_centers_, n_init=1).fit(rows) for k, fit in fits.items()}


def _some(count: int, most: int, seed: int) -> np.ndarray:
    """The numbers of at most so many of `count` rows: all of them in order, or a seeded draw."""
    return np.arange(count) if count <= most else np.random.RandomState(seed).permutation(count)[:most]


def elbow(inertias: dict[int, float]) -> dict[int, float]:
    """How far each K's inertia lies under the straight line between the first and the last, in units of their difference.

    Source: Satopaa et al., "Finding a Kneedle in a Haystack", 2011, without its smoothing. The first and the last K have 0.
    """
    counts = sorted(inertias)
    first, last = counts[0], counts[-1]
    drop = inertias[first] - inertias[last]
    if not drop > 0:
        return dict.fromkeys(counts, 0.0)
    return {k: (inertias[first] - inertias[k]) / drop - (k - first) / (last - first) for k in counts}


def _outside(shifts: Tensor, prototypes: Tensor) -> Tensor:
    """What of (N, d) shifts lies outside of the span of (K, d) prototypes."""
    span = _span(prototypes)
    rows = shifts.double()
    return (rows - rows @ span @ span.T).float()


def _span(rows: Tensor) -> Tensor:
    """An orthonormal basis of (K, d) rows' span: (d, rank) float64."""
    _, values, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    return directions[values > 1e-6 * values[0]].T


def _orthogonal(experts: MixtureOfSteeringExperts) -> MixtureOfSteeringExperts:
    """The experts with a residual basis orthogonal to their prototypes to rounding.

    Where the shifts have fewer directions outside of the prototypes' span than were asked for, the last principal
    directions are anyone's guess and may lie in the span: those are dropped, with the MLP's outputs for them.
    """
    span, basis = _span(experts.prototypes), experts.residual_basis.double()
    kept = (span.T @ basis).square().sum(0) < 1e-6
    basis = basis[:, kept]
    basis = torch.linalg.qr(basis - span @ (span.T @ basis)).Q.float().contiguous()
    output_weight, output_bias = (
        torch.nn.Parameter(p.detach()[kept]) for p in (experts.output_weight, experts.output_bias)
    )
    return replace(experts, residual_basis=basis, output_weight=output_weight, output_bias=output_bias)


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
    parameters = [getattr(experts, name) for name in _trained(experts)]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    best, best_error, curve = _freeze(experts), float("inf"), []
    improved, since = float("inf"), 0
    with progress_bar("router and residual", options.epochs, progress) as advance:
        for _ in range(options.epochs):
            total = 0.0
            for batch in training[torch.randperm(len(training))].split(options.batch_size):
                loss, fit = training_loss(experts, states[batch], shifts[batch], options.regularisation)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, options.clip)
                optimizer.step()
                total += float(fit.detach()) * len(batch)
            with torch.no_grad():
                error = float(_error(experts(states[validation]).vector, shifts[validation], experts.shift_scale))
            curve.append((total / len(training), error))
            advance()
            if error < best_error:
                best, best_error = _freeze(experts), error
            if error < improved - options.improvement:
                improved, since = error, 0
            elif (since := since + 1) > options.patience:
                break
    return best, curve


def training_loss(
    experts: MixtureOfSteeringExperts, states: Tensor, shifts: Tensor, regularisation: float
) -> tuple[Tensor, Tensor]:
    """L = mean ‖v(h) − δ‖²/σ² + λ_reg ‖Θ‖², and its first term alone: two scalars, with gradients.

    Source: FineSteer; its Θ is all that is trained: W_Q, W_K, the MLP with its biases and, where there is one, the value
    projection, of which (W_V − I)C counts. Deviation: the error is in units of σ².
    Args:
        states, shifts: (N, d).
    """
    fit = _error(experts(states).vector, shifts, experts.shift_scale)
    parameters = (getattr(experts, name) for name in _trained(experts))
    return fit + regularisation * sum(p.square().sum() for p in parameters), fit


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small lose more to handing work between threads than they gain, many times over on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trained(experts: MixtureOfSteeringExperts) -> tuple[str, ...]:
    return TRAINED if experts.value_projection is None else (*TRAINED, "value_projection")


def _freeze(experts: MixtureOfSteeringExperts) -> MixtureOfSteeringExperts:
    return replace(experts, **{name: getattr(experts, name).detach().clone() for name in _trained(experts)})


def _error(predicted: Tensor, shifts: Tensor, scale: float) -> Tensor:
    """mean ‖v − δ‖² / σ², a scalar."""
    return ((predicted - shifts) / scale).square().sum(-1).mean()
