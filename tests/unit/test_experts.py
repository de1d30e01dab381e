"""MoSE: the operator against float64 numpy, its limits, and its fitter on planted shifts."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import calinski_harabasz_score, silhouette_score

from steering.errors import ShapeError, TrainingDataError
from steering.experts import ConstantVector, LinearMap
from steering.training import fit_experts as fitting
from steering.training.fit_experts import RESTARTS, ExpertOptions, elbow, fit_experts
from tests.parity import numpy_reference as reference
from tests.tiny import orthogonal_profile, tiny_model, tiny_profile


@pytest.fixture(scope="module")
def experts():
    return tiny_profile(tiny_model()).experts


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_numpy(experts, states):
    """v, α and ‖residual‖ for each state, by the float64 reference."""
    e = {k: v.double().numpy() for k, v in vars(experts).items() if isinstance(v, torch.Tensor)}
    mlp = [e[k] for k in ("hidden_weight", "hidden_bias", "output_weight", "output_bias")]
    vectors, routings, residuals = [], [], []
    for h in states.double().numpy():
        z = reference.standardise(h, e["input_mean"], e["input_std"])
        vectors.append(reference.steering_vector(h, e, experts.shift_scale))
        routings.append(reference.routing(z, e["prototypes"], e["query_projection"], e["key_projection"]))
        residual = e["residual_basis"] @ reference.residual_coefficients(z, *mlp)
        residuals.append(experts.shift_scale * np.linalg.norm(residual))
    return np.array(vectors), np.array(routings), np.array(residuals)


def test_synthesis_equals_numpy(experts):
    states = experts.input_mean + experts.input_std * drawn(1, 9, 64)
    for found, wanted in zip(experts(states), in_numpy(experts, states), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(experts.routing(states).sum(-1), torch.ones(9))
    assert experts.routing(states).std(0).max() > 1e-2  # routing depends on the query


def test_batched_equals_alone_and_bfloat16_states_are_computed_in_float32(experts):
    states = experts.input_mean + experts.input_std * drawn(2, 9, 64)
    batched = experts(states).vector
    torch.testing.assert_close(torch.cat([experts(s[None]).vector for s in states]), batched, rtol=1e-4, atol=1e-5)
    low = experts(states.bfloat16()).vector
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, experts(states.bfloat16().float()).vector)


def test_one_expert_without_residual_is_its_centroid_times_the_scale_and_with_either_it_is_not():
    states = drawn(3, 4, 64)
    profile = tiny_profile(tiny_model(), num_prototypes=1, residual_rank=0)
    found = profile.experts(states)
    wanted = profile.experts.shift_scale * profile.experts.prototypes[0]
    torch.testing.assert_close(found.vector, wanted.expand(4, -1))
    assert (found.residual_norm == 0).all() and (found.routing == 1).all()
    for num_prototypes, residual_rank in ((1, 4), (2, 0)):
        more = tiny_profile(tiny_model(), num_prototypes=num_prototypes, residual_rank=residual_rank).experts
        found = more(states).vector
        assert (found - more.shift_scale * more.prototypes[0]).abs().max() > 1e-2
        assert (found - found[0]).abs().max() > 1e-2  # and it depends on the query


@pytest.mark.parametrize("spread", [0.0, 1.0, 1e4])  # 1e4 saturates the softmax
def test_routing_sums_to_one_so_that_experts_that_are_alike_are_one_expert_and_scores_alone_do_not(experts, spread):
    """The sum as it counts: with all values the same c, v is σc whatever the query, to rounding."""
    states = experts.input_mean + spread * experts.input_std * drawn(6, 9, 64)
    routing = experts.routing(states)
    torch.testing.assert_close(routing.sum(-1), torch.ones(9), atol=1e-6, rtol=0)
    assert ((routing >= 0) & (routing <= 1)).all()
    no_residual = replace(experts, output_weight=0 * experts.output_weight, output_bias=0 * experts.output_bias)
    alike = replace(no_residual, value_projection=experts.prototypes[:1] - experts.prototypes)
    wanted = (experts.shift_scale * experts.prototypes[0]).expand(9, -1)
    torch.testing.assert_close(alike(states).vector, wanted, atol=1e-4, rtol=1e-5)
    assert (no_residual(states).vector - wanted).abs().max() > 1e-2
    keys, z = experts.prototypes @ experts.key_projection.T, (states - experts.input_mean) / experts.input_std
    scores = z @ experts.query_projection.T @ keys.T / len(experts.key_projection) ** 0.5
    assert (torch.sigmoid(scores).sum(-1) - 1).abs().max() > 1e-2  # as independent gates in place of a softmax would


def test_nan_passes_through_and_another_width_is_refused(experts):
    states = drawn(4, 2, 64)
    states[1, 5] = float("nan")
    vector = experts(states).vector
    assert vector[0].isfinite().all() and vector[1].isnan().all()
    for operator in (experts, ConstantVector(torch.zeros(64)), LinearMap(torch.zeros(64, 1), torch.zeros(1, 64))):
        with pytest.raises(ShapeError, match="63 wide"):
            operator(torch.zeros(1, 63))


def test_a_value_projection_that_is_the_identity_is_the_standard_variant_and_another_is_not(experts):
    states = experts.input_mean + experts.input_std * drawn(5, 9, 64)
    identity = replace(experts, value_projection=torch.zeros_like(experts.prototypes))
    for a, b in zip(identity(states), experts(states), strict=True):
        assert torch.equal(a, b)
    other = replace(experts, value_projection=0.1 * drawn(6, *experts.prototypes.shape))
    assert (other(states).vector - experts(states).vector).abs().max() > 1e-2


def test_a_value_projection_is_what_a_matrix_does_to_the_prototypes_and_leaves_routing_alone():
    """v by a whole (d, d) matrix W_V, one state at a time in float64, against what is stored of it: (W_V − I)C."""
    experts = orthogonal_profile(tiny_model()).experts
    matrix = np.eye(64) + 0.2 * drawn(8, 64, 64).double().numpy()
    offsets = experts.prototypes.double().numpy() @ (matrix - np.eye(64)).T
    mine = replace(experts, value_projection=torch.from_numpy(offsets).float())
    states = experts.input_mean + experts.input_std * drawn(7, 6, 64)
    unprojected = replace(experts, value_projection=None)
    plain, weights, _ = in_numpy(unprojected, states)
    scale, prototypes = experts.shift_scale, experts.prototypes.double().numpy()
    wanted = [
        v - scale * alpha @ prototypes + scale * matrix @ (alpha @ prototypes)
        for v, alpha in zip(plain, weights, strict=True)
    ]
    np.testing.assert_allclose(mine(states).vector.numpy(), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(mine(states).routing, unprojected(states).routing)


def test_a_linear_map_equals_its_matrix_and_its_gain_is_the_most_it_does():
    left, right, states = drawn(1, 64, 3), drawn(2, 3, 64), drawn(3, 7, 64)
    found = LinearMap(left, right)
    matrix = left.double().numpy() @ right.double().numpy()
    np.testing.assert_allclose(found(states).vector.numpy(), states.double().numpy() @ matrix.T, rtol=1e-3, atol=1e-3)
    assert found(states).routing is None and found(states.bfloat16()).vector.dtype == torch.float32
    assert found.gain == pytest.approx(np.linalg.svd(matrix)[1][0], rel=1e-6)


def planted(count=400, clusters=5, d=24, noise=0.05):
    """Shifts around `clusters` orthogonal directions; the query's state tells which."""
    directions = torch.linalg.qr(drawn(7, d, d)).Q[:clusters]
    which = torch.arange(count) % clusters
    states = 3 * torch.linalg.qr(drawn(8, d, d)).Q[:clusters][which] + 0.3 * drawn(9, count, d)
    return states, 4 * directions[which] + noise * drawn(10, count, d), which


def test_fitter_finds_the_planted_clusters_and_beats_the_mean_vector():
    states, shifts, which = planted()
    fit = fit_experts(states, shifts)
    assert len(fit.experts.prototypes) == 5
    assert len({(int(k), int(c)) for k, c in zip(which, fit.clusters, strict=True)}) == 5  # one to one
    assert fit.validation_error < 0.1 < 0.5 < fit.mean_vector_error
    assert fit.zero_error == pytest.approx(1, abs=0.05)
    basis = fit.experts.residual_basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)


ORTHOGONAL = ExpertOptions(variant="orthogonal_residual")


def test_orthogonal_variants_residual_basis_is_orthogonal_to_the_prototypes_and_the_standard_ones_is_not():
    states, shifts, _ = planted(noise=1.0)
    fit = fit_experts(states, shifts, ORTHOGONAL)
    assert (
        fit.experts.residual_basis.shape[1] == 10 and fit.experts.value_projection.abs().max() > 0
    )  # and it is trained
    span = torch.linalg.qr(fit.experts.prototypes.T).Q
    basis = fit.experts.residual_basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(10), atol=1e-5, rtol=0)
    assert (span.T @ basis).abs().max() < 1e-5
    standard = fit_experts(states, shifts).experts
    assert (torch.linalg.qr(standard.prototypes.T).Q.T @ standard.residual_basis).abs().max() > 0.1


def test_orthogonal_variants_prototypes_are_the_means_of_the_shifts_with_their_lengths():
    states, shifts, which = planted(noise=0.5)
    shifts = shifts * (1 + which[:, None])  # lengths of their own
    fit = fit_experts(states, shifts, ExpertOptions(variant="orthogonal_residual", epochs=3))
    scaled = shifts / shifts.square().sum(-1).mean().sqrt()
    wanted = [scaled[torch.from_numpy(fit.clusters == k)].mean(0) for k in range(len(fit.experts.prototypes))]
    torch.testing.assert_close(fit.experts.prototypes, torch.stack(wanted), atol=1e-5, rtol=0)
    assert fit.experts.prototypes.norm(dim=-1).max() > 1.2  # means of vectors of length 1 are no longer than 1


def test_orthogonal_variants_k_is_the_median_of_three_choices_each_the_best_of_its_scores():
    states, shifts, _ = planted()
    fit = fit_experts(states, shifts, ExpertOptions(variant="orthogonal_residual", epochs=3))
    assert set(fit.choices) == set(fit.criteria) == {"elbow", "silhouette", "calinski_harabasz"}
    for name, scores in fit.criteria.items():
        assert set(scores) == set(range(4, 11)) and scores[fit.choices[name]] == max(scores.values())
    assert len(fit.experts.prototypes) == np.median(list(fit.choices.values())) == 5
    assert fit.cluster_scores == fit.criteria["calinski_harabasz"]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_orthogonal_variant_beats_the_mean_vector_and_drops_directions_that_are_not_there():
    """Shifts of five directions without noise: outside of the prototypes' span nothing is left for a basis."""
    states, shifts, _ = planted(noise=0.0)
    fit = fit_experts(states, shifts, ORTHOGONAL)
    assert fit.experts.residual_basis.shape[1] == len(fit.experts.output_bias) == 0
    assert fit.validation_error < 0.1 < 0.5 < fit.mean_vector_error


def test_elbow_is_where_the_curve_lies_deepest_under_its_chord():
    assert elbow({4: 10.0, 5: 2.0, 6: 1.0, 7: 0.0}) == pytest.approx({4: 0, 5: 0.8 - 1 / 3, 6: 0.9 - 2 / 3, 7: 0})
    assert elbow({4: 3.0, 5: 2.0, 6: 1.0}) == pytest.approx({4: 0, 5: 0, 6: 0})  # a straight line has none
    assert elbow({4: 1.0}) == {4: 0.0}


RADIUS = 4.0


def clustered(clusters, seed, count=240, d=24, noise=0.4):
    """Shifts of length `RADIUS` in as many random directions, and the margin: the smallest, over all shifts, of the distance to
    the nearest other centre less that to the own one."""
    centres = RADIUS * torch.nn.functional.normalize(drawn(seed, clusters, d), dim=-1)
    which = torch.arange(count) % clusters
    shifts = centres[which] + noise * drawn(seed + 1, count, d)
    distances = torch.cdist(shifts, centres)
    own = torch.nn.functional.one_hot(which, clusters).bool()
    margin = (distances.masked_fill(own, torch.inf).amin(-1) - distances[own]).min()
    return drawn(seed + 2, count, d), shifts, which, float(margin)


@pytest.mark.parametrize("clusters", range(4, 11))
def test_planted_clusters_are_counted_and_found_by_both_variants(clusters):
    """The elbow alone is blind at both ends of the range, where its curve is 0 by its making; so it is the median that counts."""
    for seed in (0, 10, 20):
        states, shifts, which, margin = clustered(clusters, 100 * clusters + seed)
        assert margin > 0.15 * RADIUS  # else nothing is planted
        for variant, criteria in (("standard", 1), ("orthogonal_residual", 3)):
            fit = fit_experts(states, shifts, ExpertOptions(variant=variant, epochs=1))
            assert len(fit.experts.prototypes) == clusters
            assert len({(int(k), int(c)) for k, c in zip(which, fit.clusters, strict=True)}) == clusters
            assert len(fit.choices) == criteria and fit.choices["calinski_harabasz"] == clusters
            assert max(fit.cluster_scores.values()) > 90
        assert fit.choices["silhouette"] == clusters and max(fit.criteria["silhouette"].values()) > 0.45
        if 5 <= clusters <= 8:
            assert fit.choices["elbow"] == clusters and max(fit.criteria["elbow"].values()) > 0.3
        assert fit.criteria["elbow"][4] == fit.criteria["elbow"][10] == 0


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_where_no_clusters_are_planted_no_number_of_them_stands_out(seed):
    """The negative control of the test above, on the same sizes: every criterion is several times lower."""
    fit = fit_experts(
        drawn(seed, 240, 24), drawn(seed + 1, 240, 24), ExpertOptions(variant=ORTHOGONAL.variant, epochs=1)
    )
    highest = {name: max(scores.values()) for name, scores in fit.criteria.items()}
    assert highest["calinski_harabasz"] < 12 and highest["silhouette"] < 0.06 and highest["elbow"] < 0.2
    lengths_gone = fit_experts(drawn(seed, 240, 24), drawn(seed + 1, 240, 24), ExpertOptions(epochs=1))
    assert max(lengths_gone.cluster_scores.values()) < 12


def uneven(count=3000, d=24, noise=0.5):
    """Seven clusters, the smallest of one row in 85."""
    weights = np.array([40, 20, 10, 8, 4, 2, 1])
    which = torch.from_numpy(np.random.default_rng(4).choice(7, count, p=weights / weights.sum()))
    centres = RADIUS * torch.nn.functional.normalize(drawn(35, 7, d), dim=-1)
    return drawn(33, count, d), centres[which] + noise * drawn(136, count, d), which


def test_of_many_shifts_restarts_on_a_sample_find_what_restarts_on_all_would_at_a_tenth_of_the_runs(monkeypatch):
    monkeypatch.setattr(fitting, "RESTART_SAMPLE", 2000)
    states, shifts, which = uneven()
    rows = torch.nn.functional.normalize(shifts, dim=-1).double().numpy()
    wanted, hasty = {}, {}
    for k in range(4, 11):
        wanted[k] = calinski_harabasz_score(rows, KMeans(k, n_init=10, random_state=0).fit_predict(rows))
        first = KMeans(k, init="random", n_init=1, max_iter=1, random_state=0)  # the control
        with warnings.catch_warnings(action="ignore"):
            hasty[k] = calinski_harabasz_score(rows, first.fit_predict(rows))
    runs, fit_once = [], KMeans.fit

    def counted(self, rows, *args, **kwargs):
        runs.append((len(rows), self.n_init))
        return fit_once(self, rows, *args, **kwargs)

    monkeypatch.setattr(KMeans, "fit", counted)
    fit = fit_experts(states, shifts, ExpertOptions(epochs=1))
    assert sorted(runs) == [(2000, RESTARTS)] * 7 + [(len(rows), 1)] * 7
    assert fit.cluster_scores == pytest.approx(wanted, rel=0.02)
    assert min(hasty[k] / wanted[k] for k in wanted) < 0.9
    assert len(fit.experts.prototypes) == max(wanted, key=wanted.__getitem__)
    fit = fit_experts(states, shifts, ExpertOptions(epochs=1, prototypes=(7, 7)))
    clusters = torch.from_numpy(fit.clusters)
    assert sum(int(which[clusters == k].bincount().max()) for k in range(7)) == len(rows)  # all of them, to the rarest
    centroids = [rows[fit.clusters == k].mean(0) for k in range(7)]
    np.testing.assert_allclose(fit.experts.prototypes.numpy(), centroids, atol=1e-5)


def test_of_many_shifts_the_silhouette_is_that_of_a_seeded_sample(monkeypatch):
    monkeypatch.setattr(fitting, "SILHOUETTE_SAMPLE", 150)
    states, shifts, _ = planted(noise=1.0)
    options = ExpertOptions(variant="orthogonal_residual", prototypes=(5, 5), epochs=1)
    first, second = (fit_experts(states, shifts, options, seed=seed) for seed in (0, 1))
    for seed, fit in enumerate((first, second)):
        wanted = silhouette_score(shifts.double().numpy(), fit.clusters, sample_size=150, random_state=seed)
        assert fit.criteria["silhouette"][5] == pytest.approx(wanted, rel=1e-5)
    assert first.criteria["silhouette"][5] != pytest.approx(second.criteria["silhouette"][5], rel=1e-4)


def test_where_the_error_falls_by_less_than_what_counts_training_stops_with_the_best_weights_all_the_same():
    states, shifts, _ = planted()
    patient = fit_experts(states, shifts, ExpertOptions(epochs=40, improvement=0.0))
    hasty = fit_experts(states, shifts, ExpertOptions(epochs=40, improvement=10.0))
    assert len(patient.curve) == 40 and len(hasty.curve) == 1 + ExpertOptions().patience + 1
    assert hasty.curve == patient.curve[: len(hasty.curve)]
    assert hasty.validation_error == pytest.approx(min(error for _, error in hasty.curve), rel=1e-5)
    assert hasty.curve[0][1] > 2 * hasty.validation_error  # it did go on falling


def test_where_the_query_tells_nothing_the_mixture_cannot_beat_the_mean_vector():
    _, shifts, _ = planted()
    fit = fit_experts(drawn(11, 400, 24), shifts[torch.randperm(400, generator=torch.Generator().manual_seed(0))])
    assert fit.validation_error > 0.9 * fit.mean_vector_error


def test_prototypes_are_the_means_of_the_normalised_shifts_and_the_curves_best_epoch_is_kept():
    states, shifts, _ = planted()
    fit = fit_experts(states, shifts, ExpertOptions(epochs=6))
    unit = shifts / shifts.norm(dim=-1, keepdim=True)
    wanted = torch.stack(
        [unit[torch.from_numpy(fit.clusters == k)].mean(0) for k in range(len(fit.experts.prototypes))]
    )
    torch.testing.assert_close(fit.experts.prototypes, wanted, atol=1e-5, rtol=0)
    assert fit.experts.shift_scale == pytest.approx(float(shifts.square().sum(-1).mean().sqrt()))
    assert fit.validation_error == pytest.approx(min(error for _, error in fit.curve), rel=1e-5)


def test_fitting_twice_gives_the_same_bits_and_leaves_the_global_generator_and_threads_alone():
    states, shifts, _ = planted(100)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = (fit_experts(states, shifts, ExpertOptions(epochs=3)).experts for _ in range(2))
    for key, value in vars(first).items():
        same = (
            torch.equal(value, getattr(second, key))
            if isinstance(value, torch.Tensor)
            else value == getattr(second, key)
        )
        assert same, key
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    other = fit_experts(states, shifts, ExpertOptions(epochs=3), seed=1).experts
    assert not torch.equal(first.query_projection, other.query_projection)


def test_too_few_pairs_and_no_shift_at_all_are_refused():
    states, shifts, _ = planted(100)
    with pytest.raises(TrainingDataError, match="at least 20 pairs"):
        fit_experts(states[:19], shifts[:19])
    with pytest.raises(TrainingDataError, match="nothing to learn"):
        fit_experts(states, torch.zeros_like(shifts))
