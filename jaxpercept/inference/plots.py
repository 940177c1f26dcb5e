"""Pictures of an analysis, drawn with matplotlib, an optional dependency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpercept.inference.analysis import Findings
from jaxpercept.inference.factors import CONFIDENCE, Band
from jaxpercept.inference.outputs import atomic

_SIZE, _DPI = (8.0, 5.0), 120
# Okabe and Ito's colours, which colour-blind people tell apart.
_BLUE, _ORANGE, _GREEN, _PINK, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"


def draw(
    folder: Path, findings: Findings, title: str, references: Mapping[str, Float[np.ndarray, " t"]]
) -> list[Path]:
    """Write quality.png, weights.png and, if there is a drift, drift.png.

    Args:
        folder: of the files.
        title: what was analyzed.
        references: other distributions over the training timesteps, by name.

    Returns:
        The paths written; none without matplotlib.
    """
    if find_spec("matplotlib") is None:
        return []
    paths = [
        _figure(folder / "quality.png", title, lambda axes: _quality(axes, findings)),
        _figure(folder / "weights.png", title, lambda axes: _weights(axes, findings, references)),
    ]
    if findings.drift is not None:
        paths.append(_figure(folder / "drift.png", title, lambda axes: _drift(axes, findings)))
    return paths


def _figure(path: Path, title: str, plot: Callable[[Any], None]) -> Path:
    from matplotlib.figure import Figure  # slow, and not always there

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    plot(axes)
    axes.legend(framealpha=0.9, edgecolor="none")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _quality(axes: Any, findings: Findings) -> None:
    """Figure 1(a) of ADDP: from noise on the left to the prediction on the right."""
    name = rf"$\hat x_0$ along the trajectory ({_percent()} over seeds)"
    _curve(axes, findings.timesteps, findings.trajectory, name, _BLUE)
    if findings.finished is not None:
        times = findings.timesteps[findings.starts]
        _curve(axes, times, findings.finished, "finished from the noised truth", _ORANGE)
    axes.axhline(findings.ceiling, color=_GREEN, ls="--", lw=1, label="truth, encoded and decoded")
    axes.axhline(findings.trivial, color=_GREY, ls=":", lw=1, label="trivial prediction")
    axes.set_ylabel(findings.quality)
    _over_time(axes)


def _drift(axes: Any, findings: Findings) -> None:
    name = f"drift of $x_t$ from training ({_percent()} over seeds)"
    _curve(axes, findings.timesteps, findings.drift, name, _BLUE)
    _curve(axes, findings.timesteps, findings.x0_error, r"error of $\hat x_0$", _ORANGE)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("RMS over the latent's values")
    _over_time(axes)


def _weights(
    axes: Any, findings: Findings, references: Mapping[str, Float[np.ndarray, " t"]]
) -> None:
    """Densities relative to uniform timesteps, so that tables of any number of bins compare."""
    colours = (_ORANGE, _GREEN, _PINK, _GREY)
    styles = ("-", "-", "--", ":")
    total = len(next(iter(references.values())))
    for (name, density), colour, style in zip(references.items(), colours, styles, strict=False):
        axes.stairs(density * total, np.arange(total + 1), color=colour, ls=style, label=name)
    bins = len(findings.table.weights)
    edges = np.arange(bins + 1) * total // bins
    # A weight in per cent as a density.
    relative = [values / 100 * total / np.diff(edges) for values in findings.table]
    weights, low, high = relative
    axes.stairs(weights, edges, color=_BLUE, lw=2.5, label=f"fitted ({findings.quality})")
    if np.isfinite(low).all():
        axes.fill_between(
            edges, [*low, low[-1]], [*high, high[-1]], step="post", color=_BLUE, alpha=0.2, lw=0
        )
    # A closed form's peak at a single step is cut off.
    shown = [np.quantile(density * total, 0.99) for density in references.values()]
    axes.set_xlim(0, total)
    axes.set_ylim(0, 1.1 * max(*shown, weights.max(), np.nan_to_num(high).max()))
    axes.set_xlabel("timestep t")
    axes.set_ylabel("weight, uniform = 1")


def _curve(axes: Any, times: np.ndarray, values: Band, name: str, colour: str) -> None:
    axes.plot(times, values.mean, color=colour, marker=".", ms=4, label=name)
    if np.isfinite(values.low).all():
        axes.fill_between(times, values.low, values.high, color=colour, alpha=0.2, lw=0)


def _over_time(axes: Any) -> None:
    axes.invert_xaxis()
    axes.set_xlabel("timestep t, from noise to prediction")


def _percent() -> str:
    return f"{CONFIDENCE:.0%} band"
