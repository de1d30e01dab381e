"""*Steering*: whether gates open, on what, how hard it is steered, who overrides it, and what it costs."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.models import units
from panels import (
    INSTANCE,
    MODEL,
    PROFILE,
    SERVER,
    Query,
    choice,
    heat,
    lines,
    mean,
    number,
    page,
    quantiles,
    rate,
    ratio,
    rows,
    source,
)

EVALUATED, FIRED = "finesteer:gate_evaluations_total", "finesteer:gate_fired_total"
RANK = "finesteer:calibration_rank"


def build() -> Dashboard:
    """The dashboard."""
    profile = choice("profile", "Profile", 'label_values(finesteer:profile_info{instance=~"$instance"}, profile)')
    board = page(
        "FineSteer: Steering",
        "finesteer-steering",
        "Whether gates open, on what, how hard it is steered, who overrides it, and what it costs.",
        [source(), MODEL, INSTANCE, profile],
        "finesteer",
    )
    for row, panels in (
        (Row("Steering"), _overview()),
        (Row("Gate of $profile").repeat("profile"), _gate()),
        (Row("Vectors"), _vectors()),
        (Row("Overrides and skips"), _exceptions()),
        (Row("Cost"), _cost()),
    ):
        board = board.with_row(row)
        for panel in panels:
            board = board.with_panel(panel)
    return board


def _overview():
    by_profile = "profile"
    yield number(
        "Decisions",
        "Decisions of gates in a second: prompts times active profiles.",
        units.RequestsPerSecond,
        Query(rate(EVALUATED, PROFILE), "decisions"),
        span=6,
    )
    yield number(
        "Gate-fire rate",
        "Share of the decisions whose gate opened, all chosen profiles together.",
        units.PercentUnit,
        Query(ratio(rate(FIRED, PROFILE), rate(EVALUATED, PROFILE)), "fired"),
        span=6,
    )
    yield number(
        "Steered requests",
        "Requests in a second whose numbers a chosen profile changed.",
        units.RequestsPerSecond,
        Query(rate("finesteer:steered_requests_total", PROFILE), "steered"),
        span=6,
    )
    yield number(
        "Steered tokens",
        "Tokens in a second that were generated under a vector of a chosen profile.",
        "tokens/s",
        Query(rate("finesteer:steered_tokens_total", PROFILE), "steered"),
        span=6,
    )
    yield lines(
        "Gate-fire rate by profile",
        "Share of the decisions whose gate opened. Dashed: the mean of the last week's hourly rates, over all servers of a job. "
        "An alert compares the two.",
        units.PercentUnit,
        [
            Query(ratio(rate(FIRED, PROFILE, by_profile), rate(EVALUATED, PROFILE, by_profile)), "{{profile}}"),
            Query('profile:finesteer_gate_fire:ratio_mean1w{profile=~"$profile"}', "{{profile}}, week's mean"),
        ],
        dashed="/week's mean/",
        high=1,
    )
    yield lines(
        "Decisions by profile",
        "Decisions of each profile's gate in a second, forced and shadow ones too.",
        units.RequestsPerSecond,
        [Query(rate(EVALUATED, PROFILE, by_profile), "{{profile}}")],
        stacked=True,
    )
    yield rows(
        "Loaded profiles",
        "One row for each loaded profile and server: version, method, layer, positions, kind of gate.",
        Query(f"finesteer:profile_info{{{PROFILE}}}", "{{profile}}"),
        ("Time", "Value", "__name__", "job"),
    )


def _gate():
    yield heat(
        "Energy ratio",
        "How much of each query's state lies in the profile's subspace. Grafana's heat maps draw no lines: the threshold is the "
        "dashed line of the next panel.",
        "finesteer:energy_ratio",
        PROFILE,
    )
    yield lines(
        "Energy ratio and threshold",
        "Percentiles of the energy ratio of all queries; where the dashed threshold is reached the gate opens fully. Two crowds, "
        "one on each side, are a healthy gate; a crowd at the threshold is not. Buckets are 0.05 wide.",
        units.NoUnit,
        [
            *quantiles((0.1, 0.5, 0.9), "finesteer:energy_ratio", PROFILE, "profile"),
            Query(f"max by (profile) (finesteer:gate_threshold{{{PROFILE}}})", "{{profile}} threshold"),
        ],
        span=8,
        dashed="/threshold/",
        high=1,
    )
    yield heat(
        "Gate",
        "The gate's value: 0 leaves the numbers as they are, 1 adds the whole vector. Values between are queries just below the "
        "threshold.",
        "finesteer:gate_value",
        PROFILE,
    )
    yield heat(
        "Rank in the calibration",
        "Of the calibration's queries that open the gate fully, the share with a lower energy ratio, for each decision that "
        "reaches the threshold. An even column is no drift; a crowd at the bottom is traffic nearer to the threshold than the "
        "calibration was, of which more will be missed than promised.",
        RANK,
        PROFILE,
        span=12,
    )
    yield lines(
        "Drift against calibration",
        "The mean rank, less 0.5: 0 is no drift, -0.5 means that all that opens the gate is at its threshold, +0.5 above all of the "
        "calibration. The hourly mean is over all servers of a job; an alert has it beyond 0.15 either way.",
        units.NoUnit,
        [
            Query(f"{mean(RANK, PROFILE, 'profile')} - 0.5", "{{profile}}"),
            Query('profile:finesteer_calibration_rank:mean1h{profile=~"$profile"} - 0.5', "{{profile}}, 1 h"),
        ],
        low=-0.5,
        high=0.5,
    )


def _vectors():
    yield lines(
        "Strength",
        "Size of the strength in force, by who set it: percentiles, interpolated between buckets.",
        units.NoUnit,
        quantiles((0.5, 0.95), "finesteer:steer_strength", PROFILE, "profile, source"),
    )
    yield lines(
        "Dose",
        "|λ|·g·‖v‖/‖h‖ of the vectors that were added: how long they are beside the states they change. An alert has the 95th "
        "percentile beyond 0.7.",
        units.NoUnit,
        quantiles((0.5, 0.95), "finesteer:steering_relative_norm", PROFILE, "profile"),
        limit=0.7,
    )
    weight = "finesteer:expert_weight_total"
    yield lines(
        "Expert shares",
        "How much of the routing each expert gets, of all decisions of its profile. One that takes all is a mixture in name only.",
        units.PercentUnit,
        [
            Query(
                f"{rate(weight, PROFILE, 'profile, expert')} / on (profile) group_left () "
                f"({rate(weight, PROFILE, 'profile')} > 0)",
                "{{profile}} expert {{expert}}",
            )
        ],
        stacked=True,
    )
    yield lines(
        "Entropy of the routing",
        "In nats: 0 where one expert has all the weight, ln K where K share it evenly.",
        units.NoUnit,
        quantiles((0.1, 0.5, 0.9), "finesteer:routing_entropy", PROFILE, "profile"),
    )


def _exceptions():
    yield lines(
        "Overrides",
        "Requests in a second that set a steering option, by kind. Of all clients and profiles.",
        units.RequestsPerSecond,
        [Query(rate("finesteer:steering_overrides_total", 'instance=~"$instance"', "kind"), "{{kind}}")],
    )
    yield lines(
        "Skips by reason",
        "Decisions in a second that changed nothing. gate_closed is the rule; strength_zero and forced_closed are clients' doing; "
        "non_finite is a defect. Without a profile: opted_out, no_profile.",
        units.RequestsPerSecond,
        [
            Query(rate("finesteer:steering_skipped_total", PROFILE, "profile, reason"), "{{profile}} {{reason}}"),
            Query(
                rate("finesteer:steering_skipped_total", 'instance=~"$instance", profile=""', "reason"), "{{reason}}"
            ),
        ],
    )


def _cost():
    first, between = "finesteer:time_to_first_token_seconds", "finesteer:inter_token_latency_seconds"
    yield lines(
        "Time to first token, steered against plain",
        "Percentiles, by whether a vector acted. Prompts differ between the two, so compare trends.",
        units.Seconds,
        quantiles((0.5, 0.95), first, SERVER, "steered"),
    )
    yield lines(
        "Between tokens, steered against plain",
        "Percentiles of the time between two tokens of a completion, by whether a vector acted.",
        units.Seconds,
        quantiles((0.5, 0.95), between, SERVER, "steered"),
    )
    steered, plain = (f'{SERVER}, steered="{value}"' for value in ("true", "false"))
    yield lines(
        "Time per token, steered over plain",
        "Mean time between tokens of steered completions, as a multiple of plain ones'. 1 is no cost. Shown while there are both.",
        "suffix:×",
        [Query(f"{mean(between, steered)} / ({mean(between, plain)})", "steered / plain")],
        low=None,
    )
    yield lines(
        "Gates and vectors",
        "Time that a step spent on gates, routing and vectors, for each prompt that it decided on.",
        units.Seconds,
        quantiles((0.5, 0.95), "finesteer:steering_compute_seconds", 'instance=~"$instance"'),
    )
