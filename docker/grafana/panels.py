"""The kinds of panel that the dashboards are made of, and the PromQL that they share.

Every panel has a title, a description, a unit and a legend. `$__rate_interval` is Grafana's: four scrapes or more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as c
from grafana_foundation_sdk.models import dashboard as d
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.units import NoUnit

Panel = Builder[d.Panel]
SOURCE = d.DataSourceRef(type_val="prometheus", uid="${datasource}")
SERVER = 'model_name=~"$model", instance=~"$instance"'
PROFILE = 'instance=~"$instance", profile=~"$profile"'
HEIGHT = 8
REF_IDS = "ABCDEFGH"


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the legend of its series."""

    expr: str
    legend: str


def rate(metric: str, where: str, by: str = "") -> str:
    """sum by (`by`) of the metric's rate."""
    return f"sum{_by(by)} (rate({metric}{{{where}}}[$__rate_interval]))"


def ratio(part: str, whole: str) -> str:
    """`part` / `whole`, and nothing where the whole is 0."""
    return f"{part} / ({whole} > 0)"


def mean(histogram: str, where: str, by: str = "") -> str:
    """The mean of what a histogram observed."""
    return ratio(rate(f"{histogram}_sum", where, by), rate(f"{histogram}_count", where, by))


def quantile(q: float, histogram: str, where: str, by: str = "") -> str:
    """The `q` quantile of what a histogram observed."""
    return f"histogram_quantile({q:g}, {rate(f'{histogram}_bucket', where, f'{by}, le' if by else 'le')})"


def quantiles(qs: Iterable[float], histogram: str, where: str, by: str = "") -> list[Query]:
    """One query for each quantile; the legend holds `by` and the percentile."""
    label = "".join(f"{{{{{name.strip()}}}}} " for name in by.split(",") if name)
    return [Query(quantile(q, histogram, where, by), f"{label}p{100 * q:g}") for q in qs]


def lines(
    title: str,
    description: str,
    unit: str,
    queries: Iterable[Query],
    *,
    span: int = 12,
    stacked: bool = False,
    limit: float | None = None,
    dashed: str | None = None,
    low: float | None = 0,
    high: float | None = None,
) -> Panel:
    """Series over time. `limit` draws a red line; `dashed` is a regular expression for the legends of references."""
    panel = (
        timeseries.Panel()
        .legend(
            common.VizLegendOptions()
            .display_mode(c.LegendDisplayMode.TABLE)
            .placement(c.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(common.VizTooltipOptions().mode(c.TooltipDisplayMode.MULTI).sort(c.SortOrder.DESCENDING))
        .fill_opacity(40 if stacked else 8)
        .line_width(1 if stacked else 2)
        .show_points(c.VisibilityMode.NEVER)
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(c.StackingMode.NORMAL).group("A"))
    if limit is not None:
        panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(c.GraphThresholdsStyleMode.DASHED))
        panel = panel.thresholds(
            dashboard.ThresholdsConfig()
            .mode(d.ThresholdsMode.ABSOLUTE)
            .steps([d.Threshold(value=None, color="green"), d.Threshold(value=limit, color="red")])
        )
    if dashed is not None:
        style = {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 8]}}
        colour = {"id": "color", "value": {"mode": "fixed", "fixedColor": "red"}}
        properties = [d.DynamicConfigValue(id_val=p["id"], value=p["value"]) for p in (style, colour)]
        panel = panel.override_by_regexp(dashed, properties)
    if low is not None:
        panel = panel.min(low)
    if high is not None:
        panel = panel.max(high)
    return _described(panel, title, description, unit, queries).span(span).height(HEIGHT)


def heat(title: str, description: str, histogram: str, where: str, *, span: int = 8) -> Panel:
    """A histogram's buckets over time."""
    expr = f"sum by (le) (increase({histogram}_bucket{{{where}}}[$__rate_interval]))"
    panel = (
        heatmap.Panel()
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .cell_gap(1)
        .y_axis(heatmap.YAxisConfig().axis_placement(c.AxisPlacement.LEFT).unit(NoUnit).min(0).max(1))
        .rows_frame(heatmap.RowsHeatmapOptions().layout(c.HeatmapCellLayout.AUTO))
        .show_legend()
        .show_y_histogram()
    )
    found = _described(panel, title, description, NoUnit, [Query(expr, "{{le}}")], PromQueryFormat.HEATMAP)
    return found.span(span).height(HEIGHT)


def number(
    title: str, description: str, unit: str, query: Query, *, span: int = 4, limit: float | None = None
) -> Panel:
    """The latest value, over a sparkline; red from `limit` on."""
    steps = [d.Threshold(value=None, color="green")]
    if limit is not None:
        steps.append(d.Threshold(value=limit, color="red"))
    panel = (
        stat.Panel()
        .graph_mode(c.BigValueGraphMode.AREA)
        .color_mode(c.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboard.ThresholdsConfig().mode(d.ThresholdsMode.ABSOLUTE).steps(steps))
    )
    return _described(panel, title, description, unit, [query]).span(span).height(4)


def rows(title: str, description: str, query: Query, hidden: Iterable[str]) -> Panel:
    """An instant query's series as a table, a label a column, without the `hidden` ones."""
    organize = d.DataTransformerConfig(id_val="organize", options={"excludeByName": dict.fromkeys(hidden, True)})
    panel = table.Panel().with_transformation(organize)
    found = _described(panel, title, description, NoUnit, [query], PromQueryFormat.TABLE)
    return found.span(24).height(5)


def page(
    title: str, uid: str, description: str, variables: Iterable[Builder[d.VariableModel]], link: str
) -> dashboard.Dashboard:
    """An empty dashboard; `link` is the tag of those to link to."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["finesteer"])
        .link(
            dashboard.DashboardLink("FineSteer")
            .type(d.DashboardLinkType.DASHBOARDS)
            .tags([link])
            .keep_time(True)
            .include_vars(True)
        )
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(d.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .variables(list(variables))
    )


def source() -> Builder[d.VariableModel]:
    """The variable that chooses a Prometheus."""
    return dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")


def choice(name: str, label: str, values: str) -> Builder[d.VariableModel]:
    """A variable of which several values may be chosen, all of them at first. `values`: a `label_values` query."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(values)
        .refresh(d.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(d.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(d.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


MODEL = choice("model", "Model", "label_values(finesteer:num_requests_running, model_name)")
INSTANCE = choice("instance", "Server", 'label_values(finesteer:num_requests_running{model_name=~"$model"}, instance)')


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def _described(panel, title: str, description: str, unit: str, queries, format_val=PromQueryFormat.TIME_SERIES):
    panel = panel.title(title).description(description).unit(unit).datasource(SOURCE)
    for ref_id, query in zip(REF_IDS, queries, strict=False):
        asked = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref_id).format(format_val)
        panel = panel.with_target(asked.instant() if format_val == PromQueryFormat.TABLE else asked.range())
    return panel
