"""The human correction effort of a mask: how many clicks it is away from the truth."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from scipy import ndimage

from jaxpercept.errors import UserError


def human_correction_effort(
    pred: Bool[np.ndarray, "h w"],
    mask: Bool[np.ndarray, "h w"],
    *,
    relax: int = 5,
    epsilon: float = 2.0,
) -> int:
    """HCE of Qin et al. (ECCV 2022): the clicks that correcting the mask would take.

    Control points of the outlines, simplified by Ramer, Douglas and Peucker to `epsilon` pixels,
    of what must be removed and added, plus the regions to remove or fill at a click. Errors no
    wider than `relax` pixels along the object's outline are forgiven, except that missing parts of
    the truth's skeleton always count.

    Raises:
      UserError: OpenCV or scikit-image is missing.
    """
    cv2, skeletonize = import_tools()
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    right, excess, missing = mask & pred, pred & ~mask, mask & ~pred
    core = cv2.erode((mask | pred).astype(np.uint8), cross, iterations=relax).astype(bool)

    def relaxed(errors, barrier):
        grown = errors & core
        for _ in range(relax):
            grown = cv2.dilate(grown.astype(np.uint8), cross).astype(bool) & ~barrier
        return errors & grown

    excess_, missing_ = relaxed(excess, right | missing), relaxed(missing, right | excess)
    missing_ |= skeletonize(mask) & ~right
    effort = 0
    for errors, beside in (
        (excess_, right | missing_),
        (missing_, ~(right | excess_ | missing_)),
    ):
        near = cv2.dilate(beside.astype(np.uint8), cross).astype(bool)
        pieces, regions = _outlines(cv2, errors, near)
        effort += regions
        effort += sum(len(cv2.approxPolyDP(piece, epsilon, False)) for piece in pieces)
    return effort


def _outlines(
    cv2, errors: Bool[np.ndarray, "h w"], near: Bool[np.ndarray, "h w"]
) -> tuple[list[Int[np.ndarray, "n 1 2"]], int]:
    """The parts of the regions' outlines that lie in `near`, and how many regions have none."""
    contours, _ = cv2.findContours(errors.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE)
    labels, count = ndimage.label(errors, np.ones((3, 3)))
    untouched = np.ones(count + 1, bool)
    untouched[0] = False
    free = near.copy()  # A pixel belongs to one outline only.
    pieces = []
    for contour in contours:
        column, row = contour[:, 0].T
        place = row.astype(np.int64) * errors.shape[1] + column
        first = np.zeros(len(place), bool)
        first[np.unique(place, return_index=True)[1]] = True
        kept = free[row, column] & first
        free[row[kept], column[kept]] = False
        untouched[labels[row[kept], column[kept]]] = False
        (starts,) = np.nonzero(kept & ~np.r_[False, kept[:-1]])
        (ends,) = np.nonzero(kept & ~np.r_[kept[1:], False])
        runs = [contour[start : end + 1] for start, end in zip(starts, ends, strict=True)]
        # A piece that goes on across the contour's first pixel is one.
        if len(runs) > 1 and np.abs(runs[0][0] - runs[-1][-1]).max() == 1:
            runs[-1] = np.concatenate([runs[-1], runs[0][::-1]])
            del runs[0]
        pieces += runs
    return pieces, int(untouched.sum())


def import_tools() -> tuple[Any, Callable[..., Any]]:
    """OpenCV and scikit-image's `skeletonize`.

    Raises:
      UserError: one of them is missing.
    """
    try:
        import cv2
        from skimage.morphology import skeletonize
    except ImportError as error:
        raise UserError(
            "HCE needs the packages OpenCV and scikit-image; install them with "
            "`pip install 'jaxpercept[hce]'`."
        ) from error
    return cv2, skeletonize
