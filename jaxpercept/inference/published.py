"""What papers report on the datasets of the suites, to be shown beside one's own figures.

Only E2E-FT's own tables (its README) were at hand; the others are copies in later papers, as each
row says. Protocols differ in details (crop, resolution, ensembles): a difference of a per cent of a
figure means nothing.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """One model's figures.

    Attributes:
        model: its name and settings.
        source: where the figures are from.
        figures: dataset of the suite -> values, in the order of `REPORTED`; None where
            a value is not known.
    """

    model: str
    source: str
    figures: Mapping[str, tuple[float | None, ...]]


REPORTED = {
    "depth": ("abs_rel", "delta1"),
    "normals": ("pooled_mean",),
    "dis": ("max_f",),
    "matting": ("sad",),
    "seg": ("miou",),
}
"""Of each suite: the metrics, named and scaled as in our reports."""

_COPIES = "copies in later papers"
_ONE_COPY = "one copy in a later paper"
_E2E_FT = "E2E-FT's README"


def _depth(*figures: tuple[float | None, ...]) -> dict[str, tuple[float | None, ...]]:
    return dict(zip(("kitti_eigen", "nyuv2", "scannet", "diode", "eth3d"), figures, strict=True))


def _normals(*figures: float) -> dict[str, tuple[float]]:
    return {
        name: (value,)
        for name, value in zip(("nyuv2", "scannet", "ibims1", "sintel"), figures, strict=True)
    }


PUBLISHED: dict[str, list[Published]] = {
    "depth": [
        Published(
            "Marigold v1-0, 50 steps, ensemble of 10",
            _COPIES,
            _depth((0.099, 0.916), (0.055, 0.964), (0.064, 0.951), (0.308, 0.773), (0.065, 0.960)),
        ),
        Published(
            "Marigold v1-0, single",
            _COPIES,
            _depth((0.105, 0.904), (0.060, 0.959), (0.069, 0.945), (0.310, 0.772), (0.071, 0.951)),
        ),
        Published(
            "GenPercept, depth",
            _COPIES,
            _depth((0.094, 0.923), (0.052, 0.967), (0.056, 0.965), (0.302, 0.767), (0.066, 0.957)),
        ),
        Published(
            "GenPercept, disparity",
            _ONE_COPY,
            _depth((0.080, None), (0.058, None), (0.063, None), (0.226, None), (0.096, None)),
        ),
        Published(
            "GenPercept, disparity, DPT head",
            _ONE_COPY,
            _depth((0.078, None), (0.059, None), (0.064, None), (0.228, None), (0.094, None)),
        ),
        Published(
            "Stable Diffusion + E2E-FT",
            _E2E_FT,
            _depth((0.096, None), (0.054, None), (0.058, None), (0.303, None), (0.064, None)),
        ),
        Published(
            "Marigold + E2E-FT",
            _E2E_FT,
            _depth((0.096, None), (0.052, None), (0.058, None), (0.302, None), (0.062, None)),
        ),
        Published(
            "Lotus-D, disparity",
            _COPIES,
            _depth((0.081, 0.931), (0.051, 0.972), (0.055, 0.965), (0.228, None), (0.061, 0.970)),
        ),
    ],
    "normals": [
        Published("Stable Diffusion + E2E-FT", _E2E_FT, _normals(16.5, 15.3, 16.1, 33.5)),
        Published("Marigold + E2E-FT", _E2E_FT, _normals(16.2, 14.7, 15.8, 33.5)),
        Published("GenPercept", _COPIES, _normals(16.4, 15.2, 16.3, 34.6)),
    ],
    "dis": [Published("GenPercept", _ONE_COPY, {"dis5k_val": (0.857,)})],
    "matting": [Published("GenPercept", _ONE_COPY, {"p3m10k_np": (12.77,), "aim500": (75.5,)})],
    "seg": [Published("GenPercept, zero-shot", _ONE_COPY, {"ade20k": (0.383,)})],
}
"""By suite; datasets by the names of its entries."""
