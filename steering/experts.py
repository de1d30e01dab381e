"""MoSE, the mixture of steering experts: synthesizes a vector for each query; and the baselines' vectors. Frozen here; fitted
in `steering.training`.

Everything runs in float32, whatever the model's dtype; the vector is cast once, where it is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steering.operator import Operator, check_width


class Synthesis(NamedTuple):
    """`vector`: (N, d) float32. `routing`: (N, K), rows sum to 1, and `residual_norm`: (N,); None where experts have none."""

    vector: Tensor
    routing: Tensor | None
    residual_norm: Tensor | None


@dataclass(frozen=True)
class MixtureOfSteeringExperts(Operator):
    """v(h) = σ·(Σ_k α_k(h) c_k + U_res β(h)) (FineSteer, MoSE).

    Deviations (ours): h is standardised first, z = (h − input_mean)/input_std; the sum is in units of σ = `shift_scale`,
    the root mean square norm of the training shifts, which is what makes the unit-length prototypes commensurate.

    Variant `orthogonal_residual` (the authors' code): the values that routing mixes are W_V c_k, a learned projection of the
    prototypes, which stay the keys. All that W_V ever does is (W_V − I)C, so that is what is stored and trained: K·d numbers
    instead of d² and, as long as the prototypes are linearly independent, every W_V can be had so.

    Attributes:
        prototypes: (K, d), C: centroids of the length-normalised shifts (of the raw ones over σ in `orthogonal_residual`).
        residual_basis: (d, m), U_res, orthonormal columns (m may be 0).
        query_projection, key_projection: (d_k, d), W_Q and W_K.
        hidden_weight (f, d), hidden_bias (f,), output_weight (m, f), output_bias (m,): the two-layer ReLU MLP of β.
        input_mean, input_std: (d,).
        shift_scale: σ > 0.
        value_projection: (K, d), (W_V − I)C by rows; zero is the identity W_V, None the standard variant, which has none.
    """

    prototypes: Tensor
    residual_basis: Tensor
    query_projection: Tensor
    key_projection: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    input_mean: Tensor
    input_std: Tensor
    shift_scale: float
    value_projection: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """What routing mixes, W_V C: (K, d)."""
        return self.prototypes if self.value_projection is None else self.prototypes + self.value_projection

    def __call__(self, states: Tensor) -> Synthesis:
        """Synthesize vectors for (N, d) states of any float dtype. Raises ShapeError if d is not the experts'."""
        standardised = self._standardise(states)
        routing = self._route(standardised)
        residual = self._coefficients(standardised) @ self.residual_basis.T  # (N, d)
        vector = self.shift_scale * (routing @ self.values + residual)
        return Synthesis(vector, routing, self.shift_scale * residual.norm(dim=-1))

    def routing(self, states: Tensor) -> Tensor:
        """α(h) = softmax((W_K C)ᵀ(W_Q z) / √d_k) over all prototypes: (N, d) → (N, K) float32, rows sum to 1."""
        return self._route(self._standardise(states))

    def residual_coefficients(self, states: Tensor) -> Tensor:
        """β(h) = MLP(z): (N, d) → (N, m) float32."""
        return self._coefficients(self._standardise(states))

    def _standardise(self, states: Tensor) -> Tensor:
        check_width(states, self.input_mean.shape[0], "experts")
        return (states.float() - self.input_mean) / self.input_std

    def _route(self, standardised: Tensor) -> Tensor:
        keys = self.prototypes @ self.key_projection.T  # (K, d_k)
        scores = (standardised @ self.query_projection.T) @ keys.T
        return torch.softmax(scores / math.sqrt(keys.shape[-1]), dim=-1)

    def _coefficients(self, standardised: Tensor) -> Tensor:
        hidden = torch.relu(standardised @ self.hidden_weight.T + self.hidden_bias)
        return hidden @ self.output_weight.T + self.output_bias


@dataclass(frozen=True)
class ConstantVector(Operator):
    """The same vector for every query: the `caa` and `refusal_vector` baselines. `vector`: (d,) float32."""

    vector: Tensor

    def __call__(self, states: Tensor) -> Synthesis:
        """The vector, once for each of (N, d) states. Raises ShapeError if d is not the vector's."""
        check_width(states, self.vector.shape[0], "vector")
        return Synthesis(self.vector.expand(states.shape[0], -1), None, None)


@dataclass(frozen=True)
class LayeredVectors(Operator):
    """A vector of its own for each of several layers, the same for every query: control vectors of other tools.

    Attributes:
        vectors: (L, d) float32, L ≥ 2, in the order of the profile's layers. The first is the one that is reported.
    """

    vectors: Tensor

    def __call__(self, states: Tensor) -> Synthesis:
        """The first layer's vector, once for each of (N, d) states. Raises ShapeError if d is not the vectors'."""
        return self.at(0)(states)

    def at(self, index: int) -> ConstantVector:
        """What the `index`-th layer gets."""
        return ConstantVector(self.vectors[index])


@dataclass(frozen=True)
class LinearMap(Operator):
    """v(h) = W h with W = `left` @ `right`: the `alphasteer` baseline, whose W = Δ P vanishes on general queries' states.

    W is kept as its factors: AlphaSteer's has as many independent columns as the regression has targets, in its published
    form one.

    Attributes:
        left: (d, k) float32; right: (k, d) float32.
    """

    left: Tensor
    right: Tensor

    def __call__(self, states: Tensor) -> Synthesis:
        """W h for (N, d) states of any float dtype. Raises ShapeError if d is not the map's."""
        check_width(states, self.right.shape[1], "map")
        return Synthesis((states.float() @ self.right.T) @ self.left.T, None, None)

    @property
    def gain(self) -> float:
        """‖W‖₂, the most that ‖W h‖/‖h‖ can be. Waits for the device."""
        inner = torch.linalg.qr(self.left.double()).R @ torch.linalg.qr(self.right.T.double()).R.T  # (k, k)
        return float(torch.linalg.matrix_norm(inner, 2))


Experts = MixtureOfSteeringExperts | ConstantVector | LayeredVectors | LinearMap
