"""A new threshold for a trained profile, from new traffic: subspace, centre and experts stay as they are.

Either a wanted miss rate ε on intervention-required (IR) traffic, or a wanted fire rate f on general traffic. Both are split
conformal: they hold where new traffic is exchangeable with the files', and a shift of source breaks them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steering.errors import TrainingDataError
from steering.gate import QuantileGate
from steering.profile import SteeringProfile
from steering.training.cross_fitting import Rule, judged_by_other_half
from steering.training.data import LabelledQuery, bare, file_record, file_sha256, read_queries, refuse_overlap
from steering.training.extraction import DEFAULT_BATCH_TOKENS, query_states
from steering.training.fit_gate import energy_ratios, missed_out_of_sample
from steering.training.on_disk import Rows
from steering.training.statistics import auc, share

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Guarantee:
    """What `rank` of `count` exchangeable rows on the wrong side of a threshold set at one of them promises.

    `expected` = rank/(count + 1) bounds the rate over all draws of the rows; where no ratios tie it is exact. `realised`:
    in 95 % of draws the rate of the one threshold that was drawn is at most this: the 95 % point of
    Beta(rank, count + 1 − rank), which is that rate's distribution.
    """

    wanted: float
    rank: int
    count: int

    @property
    def expected(self) -> float:
        return self.rank / (self.count + 1)

    @property
    def realised(self) -> float:
        return float(beta.ppf(CONFIDENCE, self.rank, self.count + 1 - self.rank))

    def sentence(self, what: str) -> str:
        return (
            f"Of queries exchangeable with these {self.count}, at most {self.expected:.4g} {what} on average over "
            f"calibrations ({self.rank}/{self.count + 1}; wanted {self.wanted:g}), and in {CONFIDENCE:.0%} of calibrations "
            f"at most {self.realised:.4g}. Traffic from another source is not covered."
        )


@dataclass(frozen=True)
class Calibration:
    """The profile with its new gate, what is promised, and each group's shares before and after.

    `rates`: {"misses of SOURCE" or "fires on SOURCE": (before, after)}, as `statistics.share` gives them. Those before are by
    a threshold that knew nothing of the rows; those after by one that the row's own half did not set.
    """

    profile: SteeringProfile
    guarantee: Guarantee
    sentence: str
    rates: dict[str, tuple[dict, dict]]


def calibrate_miss_rate(gate: QuantileGate, ir_ratios: Tensor, miss_rate: float) -> tuple[QuantileGate, Guarantee]:
    """τ = the ⌊ε(M+1)⌋-th smallest of (M,) IR ratios. Raises TrainingDataError where that is less than one."""
    rank = int(miss_rate * (len(ir_ratios) + 1))
    if rank < 1:
        raise TrainingDataError(_too_few("--miss-rate", miss_rate, "IR", len(ir_ratios)))
    calibrated = replace(gate, calibration=ir_ratios.float().sort().values.contiguous(), tail=miss_rate)
    return calibrated, Guarantee(miss_rate, rank, len(ir_ratios))


def calibrate_fire_rate(
    gate: QuantileGate, ir_ratios: Tensor, general_ratios: Tensor, fire_rate: float
) -> tuple[QuantileGate, Guarantee]:
    """τ = the lowest IR ratio above u, the ⌈(1−f)(N+1)⌉-th smallest of (N,) general ratios, and no soft tail below it.

    An exchangeable general query lies above u with probability at most f. A soft gate fires, too, so the floor is raised
    until the gate is exactly 0 up to u: of the gates that keep the promise this is the one that misses fewest. F stays the
    IR ratios' distribution, and ε becomes the k/(M+1) whose quantile τ is, so that the threshold is still the tail's
    quantile. The miss rate is what it is.
    Raises TrainingDataError with too few general queries, or where no IR ratio lies above u.
    """
    count = len(general_ratios)
    rank = int(fire_rate * (count + 1))
    if rank < 1:
        raise TrainingDataError(_too_few("--fire-rate", fire_rate, "general", count))
    upper = general_ratios.float().sort().values[count - rank]  # ⌈(1−f)(N+1)⌉ = N + 1 − ⌊f(N+1)⌋
    ordered = ir_ratios.float().sort().values.contiguous()
    k = int((ordered <= upper).sum()) + 1
    if k > len(ordered):
        raise TrainingDataError(
            f"--fire-rate {fire_rate:g}: a share of more than that of the general queries scores as high as every IR query, so "
            "no threshold is left. Ask for more, or train a gate that tells the two apart better."
        )
    tail = k / (len(ordered) + 1)
    while int(tail * (len(ordered) + 1)) < k:  # rounding
        tail = math.nextafter(tail, 1)
    soft = replace(gate, calibration=ordered, tail=tail, floor=0.0).soft_gate(upper.reshape(1))
    least = float(torch.nextafter(soft, torch.ones(1))) if soft > 0 else 0.0
    calibrated = replace(gate, calibration=ordered, tail=tail, floor=max(gate.floor, least))
    return calibrated, Guarantee(fire_rate, rank, count)


def fired_out_of_sample(gate: QuantileGate, ir_ratios: Tensor, general_ratios: Tensor, fire_rate: float) -> Tensor:
    """Whether each general query fires a gate calibrated on the other half of them: (N,) bool."""

    def fires(others: Tensor) -> Rule:
        calibrated, _ = calibrate_fire_rate(gate, ir_ratios, others, fire_rate)
        return lambda mine: calibrated.soft_gate(mine) > 0

    return judged_by_other_half(fires, general_ratios)[0]


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    profile: SteeringProfile,
    queries: Sequence[Path],
    general: Sequence[Path] = (),
    *,
    miss_rate: float | None = None,
    fire_rate: float | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    command: str = "",
    progress: bool = False,
) -> Calibration:
    """Calibrate a profile on JSONL files of IR (`queries`) and general traffic, for just one of the two rates.

    What the manifest's `metrics` said of the old gate is renewed where the files can tell and dropped where not;
    `training.calibration` remembers the old version, the files and the guarantee.
    Raises ProfileError, TrainingDataError (also where a file trained the profile).
    """
    profile.check_model(model)
    gate = profile.gate
    if not isinstance(gate, QuantileGate):
        raise TrainingDataError(
            f"profile {profile.name!r} has no quantile gate, so there is no threshold to calibrate."
        )
    if (miss_rate is None) == (fire_rate is None):
        raise TrainingDataError("give just one of --miss-rate and --fire-rate: each sets the threshold by itself.")
    if fire_rate is not None and not general:
        raise TrainingDataError("--fire-rate needs --general: the queries on which the gate should hardly fire.")
    _refuse_training_files(profile, [*queries, *general])
    ir_rows, general_rows = read_queries(queries), read_queries(general)
    refuse_overlap({"IR": ir_rows, "general": general_rows})

    def ratios(rows: Rows[LabelledQuery], label: str) -> Tensor:
        states = query_states(
            model, tokenizer, bare(rows), profile.layer, batch_tokens=batch_tokens, label=label, progress=progress
        )
        return energy_ratios(states, gate.mean, gate.basis)

    ir = ratios(ir_rows, "IR queries")
    others = ratios(general_rows, "general queries") if general_rows else torch.empty(0)
    if fire_rate is None:
        soft = profile.manifest.training.get("calibration", {}).get("floor_in_training", gate.floor)
        new, guarantee = calibrate_miss_rate(replace(gate, floor=soft), ir, miss_rate)
        sentence = guarantee.sentence("fall under the threshold")
        fired = new.soft_gate(others) > 0
    else:
        new, guarantee = calibrate_fire_rate(gate, ir, others, fire_rate)
        sentence = guarantee.sentence("fire the gate, softly or fully,")
        fired = fired_out_of_sample(gate, ir, others, fire_rate)
    missed = missed_out_of_sample(ir, new.tail)

    rates = _by_source("misses of", ir_rows, ir < gate.threshold, missed)
    rates |= _by_source("fires on", general_rows, gate.soft_gate(others) > 0, fired)
    old = profile.manifest
    metrics = {k: v for k, v in old.metrics.items() if k == "experts"}
    if general_rows:
        metrics["gate"] = {
            "auc": round(auc(ir, others), 4),
            "held_out": "new traffic",
            "general_fired": share(int(fired.sum()), len(fired)),
            "general_fully_open": share(int((new.soft_gate(others) == 1).sum()), len(others)),
            "missed_by_source": {
                source: share(int(missed[mine].sum()), int(mine.sum())) for source, mine in _sources(ir_rows).items()
            },
            "comparison": old.metrics.get("gate", {}).get("comparison", []),
        }
    record: dict[str, Any] = {
        "command": command,
        "from_version": profile.version,
        "from_threshold": old.gate.threshold,
        "floor_in_training": old.training.get("calibration", {}).get("floor_in_training", old.gate.floor),
        "wanted": {"miss_rate": miss_rate} if fire_rate is None else {"fire_rate": fire_rate},
        "guarantee": {"expected": guarantee.expected, "realised_95": guarantee.realised, "in_words": sentence},
        "queries": file_record(queries, len(ir_rows)),
        "general": file_record(general, len(general_rows)),
        "rates": {name: {"before": before, "after": after} for name, (before, after) in rates.items()},
    }
    spec = replace(
        old.gate, tail=new.tail, floor=new.floor, threshold=float(new.threshold), num_calibration=len(new.calibration)
    )
    manifest = replace(old, gate=spec, metrics=metrics, training=old.training | {"calibration": record})
    return Calibration(replace(profile, manifest=manifest, gate=new), guarantee, sentence, rates)


def _too_few(option: str, rate: float, kind: str, count: int) -> str:
    needed = math.ceil(1 / rate) - 1
    return f"{option} {rate:g} needs at least {needed} {kind} queries; there are {count}. Add queries, or ask for a higher rate."


def _refuse_training_files(profile: SteeringProfile, paths: Sequence[Path]) -> None:
    """Files kept for calibration at training shaped neither subspace nor experts, and may serve again."""
    trained = {
        digest: name
        for name, record in profile.manifest.training.get("data", {}).items()
        if name != "calibration"
        for digest in record["sha256"]
    }
    for path in paths:
        digest = file_sha256(path)
        if digest in trained:
            raise TrainingDataError(
                f"{path}: this file trained profile {profile.name!r} (its {trained[digest]} data), so its energy ratios are "
                "too good to calibrate on. Give queries that trained nothing."
            )


def _sources(rows: Rows[LabelledQuery]) -> dict[str, Tensor]:
    sources = rows.labels("source")
    return {name: torch.tensor([source == name for source in sources]) for name in sorted(set(sources))}


def _by_source(
    what: str, rows: Rows[LabelledQuery], before: Tensor, after: Tensor
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    return {
        f"{what} {source}": tuple(share(int(flags[mine].sum()), int(mine.sum())) for flags in (before, after))
        for source, mine in _sources(rows).items()
    }
