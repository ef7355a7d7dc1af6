"""Figures for papers, PNG and SVG, from the same numbers as the page: loss against rate, sensitivity, attention logits.

matplotlib (extra `plots`) is imported inside the functions; its global state is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aftershock.report.words import count, number, rate

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito 2008: distinct for every common kind of colour vision."""
MARKERS, DASHES = "os^Dv", ("-", "--", ":", "-.", (0, (5, 1)))

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "aftershock",
}


def write_figures(numbers: Mapping[str, Any], folder: str | Path) -> tuple[Path, ...]:
    """Draw `study_numbers` into `folder` as loss.png, loss.svg, sensitivity.png, ..; returns the files written.

    A figure without data (no run has ended, no attention logits measured) is not drawn. SVG text stays text.
    Raises ValueError when matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ValueError("figures need matplotlib, which is not installed: pip install 'aftershock[plots]'") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with matplotlib.rc_context(STYLE):
        for name, draw in (("loss", _loss), ("sensitivity", _sensitivity), ("logits", _logits)):
            figure = draw(numbers)
            if figure is None:
                continue
            FigureCanvasAgg(figure)
            for suffix in ("png", "svg"):
                path = folder / f"{name}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else {"Software": None}
                figure.savefig(path, dpi=200, bbox_inches="tight", metadata=metadata)
                written.append(path)
    return tuple(written)


def _loss(numbers: Mapping[str, Any]) -> Any:
    """Final loss against rate, one panel per size, shared axes."""
    from matplotlib.figure import Figure

    groups = [g for g in numbers["groups"] if any(p["loss"] is not None for p in g["points"])]
    sizes = [s["size"] for s in numbers["sizes"] if any(g["size"] == s["size"] for g in groups)]
    if not sizes:
        return None
    columns = min(len(sizes), 4)
    rows = math.ceil(len(sizes) / columns)
    figure = Figure(figsize=(0.6 + 2.6 * columns, 0.5 + 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for spare in axes.flat[len(sizes) :]:
        spare.set_visible(False)
    for ax, size in zip(axes.flat, sizes, strict=False):
        ax.set_xscale("log")
        ax.set_title(size)
        for group in (g for g in groups if g["size"] == size):
            _curve(ax, group, _arm_index(numbers, group["arm"]))
        l0 = next((g["l0"] for g in groups if g["size"] == size and g["l0"] is not None), None)
        if l0 is not None:
            ax.axhline(l0, color="#888888", linestyle=":", linewidth=1)
        _rate_ticks(ax, numbers["rates"])
    for ax in axes[:, 0]:
        ax.set_ylabel("final loss [nats]")
    for ax in axes[-1, :]:
        ax.set_xlabel("learning rate")
    _legend(figure, numbers)
    return figure


def _curve(ax: Any, group: Mapping[str, Any], index: int) -> None:
    points = [p for p in group["points"] if p["loss"] is not None]
    rates, colour = [p["lr"] for p in points], COLOURS[index % len(COLOURS)]
    ax.fill_between(rates, [p["low"] for p in points], [p["high"] for p in points], color=colour, alpha=0.15, lw=0)
    ax.plot(rates, [p["loss"] for p in points], color=colour, linestyle=DASHES[index % len(DASHES)], label=group["arm"])
    alive = [p for p in points if p["num_diverged"] < p["num_judged"]]
    dead = [p for p in points if p["num_diverged"] == p["num_judged"]]
    ax.plot([p["lr"] for p in alive], [p["loss"] for p in alive], MARKERS[index % len(MARKERS)], color=colour)
    ax.plot([p["lr"] for p in dead], [p["loss"] for p in dead], "x", color=colour, markersize=6, markeredgewidth=1.6)


def _sensitivity(numbers: Mapping[str, Any]) -> Any:
    """LR sensitivity against block parameters with its interval."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    groups = [g for g in numbers["groups"] if g["lr_sensitivity"] is not None and g["num_block_params"]]
    if not groups:
        return None
    figure = Figure(figsize=(3.6, 2.7), layout="constrained")
    ax = figure.subplots()
    ax.set_xscale("log")
    for arm in numbers["arms"]:
        own = [g for g in groups if g["arm"] == arm["arm"]]
        index = _arm_index(numbers, arm["arm"])
        values = [g["lr_sensitivity"] for g in own]
        spans = [g["interval"] or (g["lr_sensitivity"], g["lr_sensitivity"]) for g in own]
        down = [max(value - low, 0.0) for value, (low, _) in zip(values, spans, strict=True)]
        up = [max(high - value, 0.0) for value, (_, high) in zip(values, spans, strict=True)]
        ax.errorbar(
            [g["num_block_params"] for g in own],
            values,
            yerr=[down, up],
            **_look(index),
            capsize=2,
            label=arm["arm"],
        )
    ax.set_ylim(bottom=0)
    params = sorted({g["num_block_params"] for g in groups})
    ax.set_xticks(params, [count(value) for value in params])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("parameters in blocks")
    ax.set_ylabel("LR sensitivity [nats]")
    ax.legend()
    return figure


def _logits(numbers: Mapping[str, Any]) -> Any:
    """Largest block-0 attention logit, size by rate, one map per arm, log colours from 1 to at least 1e4."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    peaks = [p["peak_logit"] for g in numbers["groups"] for p in g["points"] if p["peak_logit"] is not None]
    if not peaks or max(peaks) <= 0:
        return None
    arms, sizes, rates = numbers["arms"], [s["size"] for s in numbers["sizes"]], numbers["rates"]
    width = 0.9 + len(arms) * (0.5 + 0.42 * len(rates))
    figure = Figure(figsize=(width, 1.1 + 0.36 * len(sizes)), layout="constrained")
    axes = figure.subplots(1, len(arms), sharey=True, squeeze=False)
    norm = LogNorm(vmin=1.0, vmax=max(1e4, max(peaks)))
    for ax, arm in zip(axes.flat, arms, strict=True):
        grid = np.full((len(sizes), len(rates)), np.nan)
        for group in (g for g in numbers["groups"] if g["arm"] == arm["arm"]):
            for point in (p for p in group["points"] if p["peak_logit"] is not None):
                row, column = sizes.index(group["size"]), rates.index(point["lr"])
                grid[row, column] = max(point["peak_logit"], 1e-9)
                hot = norm(point["peak_logit"]) > 0.55
                ax.text(column, row, number(point["peak_logit"], 2), ha="center", va="center", fontsize=6,
                        color="black" if hot else "white")  # fmt: skip
        ax.imshow(grid, norm=norm, cmap="viridis", aspect="auto")
        ax.grid(visible=False)
        ax.set_title(arm["arm"])
        ax.set_xticks(range(len(rates)), [rate(lr) for lr in rates], rotation=45, ha="right")
        ax.set_yticks(range(len(sizes)), sizes)
        ax.set_xlabel("learning rate")
    figure.colorbar(axes.flat[0].images[0], ax=axes.ravel().tolist(), label="max logit, block 0")
    return figure


def _legend(figure: Any, numbers: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = [Line2D([], [], **_look(i)) for i in range(len(numbers["arms"]))]
    labels = [arm["arm"] for arm in numbers["arms"]]
    if any(p["num_diverged"] for g in numbers["groups"] for p in g["points"]):
        handles.append(Line2D([], [], color="#444444", marker="x", linestyle="none", markeredgewidth=1.6))
        labels.append("diverged (at the initial loss)")
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _rate_ticks(ax: Any, rates: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    shown = rates if len(rates) < 9 else rates[:: math.ceil(len(rates) / 8)]
    ax.set_xticks(shown, [rate(lr) for lr in shown], rotation=45, ha="right")
    ax.xaxis.set_minor_locator(NullLocator())


def _arm_index(numbers: Mapping[str, Any], arm: str) -> int:
    return [a["arm"] for a in numbers["arms"]].index(arm)
