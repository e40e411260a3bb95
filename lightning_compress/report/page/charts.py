"""The charts of a page as Vega-Lite specifications: plain dicts, which the browser draws."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lightning_compress.report.figure import vertical_range
from lightning_compress.report.metric import Metric
from lightning_compress.report.page.points import FEW, KINDS, Place, front
from lightning_compress.report.summary import Epoch

Spec = dict[str, Any]

COSTS = {
    "file_bytes": ("Size of the file", "bytes", "log"),
    "macs": ("Multiply-accumulates", "MACs per sample", "log"),
    "latency_ms": ("Measured latency", "ms per batch", "linear"),
}
# Colours are variables of the page's style sheet, so that charts follow light, dark and print without being drawn anew.
CONFIG: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "gridColor": "var(--line)",
        "domainColor": "var(--rule)",
        "tickColor": "var(--rule)",
        "labelFontSize": 11,
        "titleFontSize": 11.5,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelPadding": 5,
        "tickSize": 4,
    },
    "axisY": {"domain": False, "ticks": False},
    "axisX": {"grid": False},
    "text": {"color": "var(--soft)", "fontSize": 11},
}
COLORS = {"dense": "var(--dense)", "compressed": "var(--accent)", "point": "var(--accent)", "control": "var(--other)"}
SHAPES = {"dense": "diamond", "compressed": "circle", "point": "triangle-up", "control": "square"}


def trade_off(places: Sequence[Place], cost: str, metric: Metric, *, single: bool) -> Spec:
    """Return the chart of the metric against a cost, with the front if it is known which direction is better.

    Args:
        places: The networks.
        cost: A key of `COSTS`.
        metric: The metric.
        single: Whether all networks belong to one run, so that they have names and no numbers.
    """
    _, title, scale = COSTS[cost]
    shown = [one for one in places if getattr(one, cost) is not None]
    values = [_values(one, cost, metric, single=single) for one in shown]
    pairs = [(value["x"], value["y"]) for value in values]
    kept = front(pairs, metric.mode) if metric.mode is not None else []
    for i, value in enumerate(values):
        value["front"] = i in kept
    if scale == "log" and any(x <= 0 for x, _ in pairs):
        scale = "symlog"
    x: Spec = {"field": "x", "type": "quantitative", "title": title}
    x["scale"] = {"type": scale, "nice": False, "padding": 18} if scale != "linear" else {"zero": True, "padding": 18}
    x["axis"] = {"format": ".3~s" if scale != "linear" else "~g", "labelOverlap": True, "tickCount": 5}
    y: Spec = {"field": "y", "type": "quantitative", "title": metric.label, "axis": {"tickCount": 5}}
    y["scale"] = {"zero": False, "nice": False, "domain": _range([value for _, value in pairs], metric)}
    kinds = list(dict.fromkeys(one.kind for one in shown))
    named = "true" if len(values) <= FEW else "datum.front"
    line = {
        "data": {"values": [values[i] for i in kept]},
        "mark": {"type": "line", "interpolate": "step-after", "color": "var(--accent)", "opacity": 0.45},
        "encoding": {"x": x, "y": y},
    }
    points = {
        "mark": {"type": "point", "filled": True, "opacity": 0.9, "cursor": "default" if single else "pointer"},
        "encoding": {
            "x": x,
            "y": y,
            "color": {
                "field": "kind",
                "scale": {"domain": kinds, "range": [COLORS.get(kind, "var(--other)") for kind in kinds]},
                "legend": None,
            },
            "shape": {
                "field": "kind",
                "scale": {"domain": kinds, "range": [SHAPES.get(kind, "cross") for kind in kinds]},
                "legend": None,
            },
            "size": {"condition": {"test": "datum.front", "value": 90}, "value": 55},
            "tooltip": [
                {"field": field, "title": text} for field, text in _tooltip(metric, single=single, recipe=shown)
            ],
        },
    }
    chosen = {"condition": {"test": "datum.run === chosen", "value": 1}, "value": 0}
    ring = {
        "mark": {"type": "point", "filled": False, "size": 260, "stroke": "var(--ink)", "strokeWidth": 1.5},
        "encoding": {
            "x": x,
            "y": y,
            "opacity": chosen,
        },
    }
    names = {
        "transform": [{"filter": f"({named}) && (datum.kind !== 'dense' || {str(single).lower()})"}],
        "mark": {"type": "text", "dy": {"expr": "datum.kind === 'dense' ? 14 : -13"}, "limit": 110},
        "encoding": {"x": x, "y": y, "text": {"field": "label"}},
    }
    return {
        "width": "container",
        "height": 230,
        "params": [{"name": "chosen", "value": -1}],
        "data": {"values": values},
        "layer": [line, *([] if single else [ring]), points, names],
    }


def _values(place: Place, cost: str, metric: Metric, *, single: bool) -> Spec:
    return {
        "run": place.run,
        "kind": place.kind,
        "x": getattr(place, cost),
        "y": metric.scaled(place.test_metric),
        "label": place.name if single else str(place.run) if place.kind == "compressed" else place.name,
        "name": place.name if single or place.kind == "dense" else f"{place.run}: {place.name}",
        "recipe": place.recipe,
        "metric": metric.show(place.test_metric),
        "file": "-" if place.file_bytes is None else f"{place.file_bytes:,.0f} bytes",
        "macs": f"{place.macs:,.0f}",
        "latency": "the machine was busy" if place.latency_ms is None else f"{place.latency_ms:,.3f} ms",
    }


def _range(values: Sequence[float], metric: Metric) -> list[float]:
    margin = max(0.12 * (max(values) - min(values)), 0.3 if metric.share else 0.01 * abs(max(values)), 1e-9)
    return [min(values) - margin, max(values) + margin]


def _tooltip(metric: Metric, *, single: bool, recipe: Sequence[Place]) -> list[tuple[str, str]]:
    first = [("name", "network" if single else "run")]
    if any(one.recipe for one in recipe):
        first.append(("recipe", "recipe"))
    return [*first, ("metric", metric.name), ("file", "file"), ("macs", "MACs"), ("latency", "latency")]


def over_epochs(history: Sequence[Epoch], metric: Metric) -> dict[str, Spec]:
    """Return one chart over the epochs for the validation metric, and one for each number of a technique, by title."""
    charts = {}
    validated = [None if one.val_metric is None else metric.scaled(one.val_metric) for one in history]
    if any(value is not None for value in validated):
        charts[metric.label] = _over_epochs(history, validated, vertical_range(history, metric), line="linear")
    for name in dict.fromkeys(name for one in history for name in one.numbers):
        numbers = [one.numbers.get(name) for one in history]
        charts[name] = _over_epochs(history, numbers, None, line="step")
    return charts


def _over_epochs(
    history: Sequence[Epoch], values: Sequence[float | None], limits: tuple[float, float] | None, *, line: str
) -> Spec:
    data: list[Spec] = []
    phases: list[Spec] = []
    for epoch, (one, value) in enumerate(zip(history, values, strict=True), start=1):
        data.append({"epoch": epoch, "value": value, "phase": one.phase})
    for number, (phase, members) in enumerate(groupby(data, key=lambda one: one["phase"])):
        epochs = [one["epoch"] for one in members]
        phases.append({"from": epochs[0] - 0.5, "to": epochs[-1] + 0.5, "phase": phase, "odd": number % 2 == 1})
    x: Spec = {"type": "quantitative", "scale": {"domain": [0.5, len(data) + 0.5], "nice": False}, "title": "epoch"}
    x["axis"] = {"tickMinStep": 1, "format": "d", "labelFlush": False, "tickCount": 6}
    y: Spec = {"field": "value", "type": "quantitative", "title": None, "axis": {"tickCount": 4}}
    y["scale"] = {"zero": True} if limits is None else {"domain": list(limits), "nice": False, "zero": False}
    metric = line == "linear"
    mark: Spec = {"type": "line", "color": "var(--accent)" if metric else "var(--soft)", "strokeWidth": 1.8}
    mark |= {"interpolate": line, "clip": True}
    tooltip = [{"field": "epoch"}, {"field": "phase"}, {"field": "value", "format": ".5~g"}]
    dots = {"type": "point", "filled": True, "clip": True, "color": mark["color"], "size": 14 if metric else 8}
    return {
        "width": "container",
        "height": 150,
        "data": {"values": data},
        "layer": [
            {
                "data": {"values": phases},
                "transform": [{"filter": "datum.odd"}],
                "mark": {"type": "rect", "color": "var(--band)"},
                "encoding": {"x": x | {"field": "from"}, "x2": {"field": "to"}},
            },
            {
                "data": {"values": phases},
                "transform": [{"calculate": "(datum.from + datum.to) / 2", "as": "middle"}],
                "mark": {"type": "text", "y": -8, "fontSize": 10.5},
                "encoding": {"x": x | {"field": "middle"}, "text": {"field": "phase"}},
            },
            {"mark": mark, "encoding": {"x": x | {"field": "epoch"}, "y": y}},
            {"mark": dots, "encoding": {"x": x | {"field": "epoch"}, "y": y, "tooltip": tooltip}},
        ],
    }


def kinds_of(places: Sequence[Place]) -> dict[str, str]:
    """Return what the legend says about each kind of network in the charts."""
    return {kind: KINDS.get(kind, kind) for kind in dict.fromkeys(one.kind for one in places)}
