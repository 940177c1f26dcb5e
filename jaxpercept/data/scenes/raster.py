"""Exact ray casting of convex solids into an inverse-depth buffer.

With planar depth z, a pixel's ray is p = z (u, v, 1); with w = 1/z, every half-space n.p <= e is
a bound on w that is *affine in the pixel*: w <= n.(u,v,1)/e where the camera is outside of it
(e < 0), w >= n.(u,v,1)/e where it is inside. A box is six such bounds, a quadric adds an
interval [w1, w2]; the visible depth of a convex solid is the least upper bound, if it is not
below the greatest lower bound. So a box costs one broadcast sum over its bounding rectangle,
and no division per pixel.

Frames: camera coordinates are x right, y up, z forward; the rays have z component 1.
Quadrics (local coordinates scaled by the half extents): X^2 + Z^2 + k2 Y^2 + k1 Y + k0 <= 0.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

FACES = 7  # face numbers per solid: -x, +x, -y, +y, -z, +z, curved
CURVED = 6
OPENING = 5  # a recess opens with its +z face
NEAR = 0.05  # metres; edges of the bounding boxes are clipped here
_MARGIN = np.array([[-1.0], [2.0], [-1.0], [2.0]])  # pixels around a rectangle
_CORNER = np.arange(8)
_SIGNS = np.stack([(_CORNER >> bit & 1) * 2.0 - 1.0 for bit in range(3)])[:, :, None]
_FROM, _TO = np.array(
    [(a, b) for a in range(8) for b in range(a + 1, 8) if (a ^ b) in (1, 2, 4)]
).T  # the twelve edges


class View(NamedTuple):
    """A pinhole camera: ray of pixel (row i, column j) = (u[j], v[i], 1) in camera coordinates.

    `rotation` has the camera's right, up and forward directions as rows (world coordinates).
    """

    position: Float[np.ndarray, " 3"]
    rotation: Float[np.ndarray, "3 3"]
    u: Float[np.ndarray, " w"]
    v: Float[np.ndarray, " h"]
    focal: tuple[float, float]
    centre: tuple[float, float]


class Solids(NamedTuple):
    """n convex solids in camera coordinates."""

    centre: Float[np.ndarray, "n 3"]
    axes: Float[np.ndarray, "n 3 3"]  # rows: local x, y, z directions
    half: Float[np.ndarray, "n 3"]
    radii: Float[np.ndarray, "n 3"]  # scale of the quadric's local coordinates
    quadric: Float[np.ndarray, "n 4"]  # (used, k2, k1, k0)


class Bounds(NamedTuple):
    """The six plane bounds of each solid, upper bounds (front faces) first."""

    plane: Float[np.ndarray, "n 6 3"]  # bound on w = plane . (u, v, 1)
    face: Int[np.ndarray, "n 6"]  # 0..5 = -x, +x, -y, +y, -z, +z
    front: Int[np.ndarray, " n"]  # how many are upper bounds
    rect: Int[np.ndarray, "n 4"]  # row0, row1, column0, column1; empty if row0 >= row1


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a [..., n, 3] times b^T [3, 3] by explicit sums: no BLAS, so no machine-dependent order."""
    return a[..., 0:1] * b[:, 0] + a[..., 1:2] * b[:, 1] + a[..., 2:3] * b[:, 2]


def to_camera(solids: Solids, view: View) -> Solids:
    """Solids in world coordinates -> the same solids in the view's coordinates."""
    centre = multiply(solids.centre - view.position, view.rotation)
    return solids._replace(centre=centre, axes=multiply(solids.axes, view.rotation))


def bound(solids: Solids, view: View) -> Bounds:
    """Plane bounds and clipped bounding rectangles of solids in camera coordinates (float64)."""
    # Solids run along the last axis here: long inner loops.
    axes = np.ascontiguousarray(solids.axes.transpose(1, 2, 0))
    centre, half = solids.centre.T.copy(), solids.half.T.copy()
    along = axes[:, 0] * centre[0] + axes[:, 1] * centre[1] + axes[:, 2] * centre[2]
    offset = np.stack([half - along, half + along], axis=1)
    offset[np.abs(offset) < 1e-4] = 1e-4
    inverse = 1.0 / offset
    plane = np.empty((3, 2, *axes.shape[1:]))
    np.multiply(axes, -inverse[:, 0, None], out=plane[:, 0])
    np.multiply(axes, inverse[:, 1, None], out=plane[:, 1])
    inside = offset.reshape(6, -1).T > 0
    face = np.argsort(inside, axis=1, kind="stable")
    ordered = plane.reshape(6, 3, -1)[face, :, np.arange(len(face))[:, None]]
    return Bounds(ordered, face, 6 - inside.sum(1), _rectangles(axes, centre, half, view))


def _rectangles(
    axes: Float[np.ndarray, "3 3 n"], centre: Float[np.ndarray, "3 n"],
    half: Float[np.ndarray, "3 n"], view: View,
) -> Int[np.ndarray, "n 4"]:  # fmt: skip
    """Pixel rectangles around the part of every solid that lies beyond the near plane."""
    reach = axes * half[:, None]
    x, y, z = (
        centre[k] + _SIGNS[0] * reach[0, k] + _SIGNS[1] * reach[1, k] + _SIGNS[2] * reach[2, k]
        for k in range(3)
    )
    ahead = z >= NEAR
    rect = _extent(x, y, np.maximum(z, NEAR), ahead, view)
    some = np.flatnonzero(ahead.any(0) & ~ahead.all(0))
    if some.size:
        # Where an edge crosses the near plane, its crossing replaces the end behind it.
        x, y, z = x[:, some], y[:, some], z[:, some]
        za, zb = z[_FROM], z[_TO]
        crosses = (za < NEAR) != (zb < NEAR)
        part = (NEAR - za) / np.where(crosses, zb - za, 1.0)
        xa, ya = x[_FROM], y[_FROM]
        cut = _extent(xa + (x[_TO] - xa) * part, ya + (y[_TO] - ya) * part, NEAR, crosses, view)
        rect[0::2, some] = np.minimum(rect[0::2, some], cut[0::2])
        rect[1::2, some] = np.maximum(rect[1::2, some], cut[1::2])
    rect += _MARGIN
    height, width = len(view.v), len(view.u)
    np.maximum(rect, 0, out=rect)
    np.minimum(rect[:2], height, out=rect[:2])
    np.minimum(rect[2:], width, out=rect[2:])
    rect[1, rect[2] >= rect[3]] = 0
    return rect.T.astype(np.int64)


def _extent(x, y, z, seen: Bool[np.ndarray, "p n"], view: View) -> Float[np.ndarray, "4 n"]:
    """Least and greatest row, least and greatest column of the points that are `seen`."""
    column = x / z * view.focal[0] + view.centre[0]
    row = view.centre[1] - y / z * view.focal[1]
    rect = np.empty((4, x.shape[1]))
    for at, value in ((0, row), (2, column)):
        low, high = value, value
        if not seen.all():
            low, high = np.where(seen, value, 1e6), np.where(seen, value, -1e6)
        np.minimum.reduce(low, out=rect[at])
        np.maximum.reduce(high, out=rect[at + 1])
    return rect


class Buffers:
    """Inverse depth `w` and the number of the visible face (solid * FACES + face) per pixel."""

    def __init__(self, view: View):
        self.view = view
        self.w = np.zeros((len(view.v), len(view.u)), np.float32)
        self.face = np.zeros(self.w.shape, np.int32)

    def _sides(self, bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
        """The row part [n,6,h,1] and the column part [n,6,1,w] of every plane bound."""
        plane = bounds.plane.astype(np.float32)
        rows = plane[:, :, 1:2] * self.view.v + plane[:, :, 2:3]
        columns = plane[:, :, 0:1] * self.view.u
        return rows[:, :, :, None], columns[:, :, None, :]

    def room(self, bounds: Bounds, first: int) -> None:
        """Fill the buffers with the inside of solid 0 of `bounds`, which holds the camera."""
        rows, columns = self._sides(Bounds(*(part[:1] for part in bounds)))
        ahead = (rows[0].max((1, 2)) + columns[0].max((1, 2)) > 0).tolist()
        for number in range(6):
            if ahead[number]:
                w = rows[0, number] + columns[0, number]
                face = first * FACES + int(bounds.face[0, number])
                np.copyto(self.face, face, where=w > self.w)
                np.maximum(self.w, w, out=self.w)

    def recesses(self, bounds: Bounds, first: int, walls: list[int]) -> None:
        """Cut boxes into walls: the +z face of box k opens on room face `walls[k]`.

        A ray that enters the box through that face ends at the box's inside.
        """
        rows, columns = self._sides(bounds)
        for number, (row0, row1, col0, col1) in enumerate(bounds.rect.tolist()):
            front, faces = int(bounds.front[number]), bounds.face[number].tolist()
            if row0 >= row1 or OPENING not in faces[:front]:
                continue
            w = rows[number, :, row0:row1] + columns[number, :, :, col0:col1]
            entry = w[faces.index(OPENING)]
            high = w[:front].min(0)
            lower = w[front:]
            low = lower.max(0)
            inside = (
                (entry <= high) & (high > low) & (self.face[row0:row1, col0:col1] == walls[number])
            )
            np.copyto(self.w[row0:row1, col0:col1], np.maximum(low, 0.02), where=inside)
            for order, face in enumerate(faces[front:]):
                np.copyto(
                    self.face[row0:row1, col0:col1],
                    (first + number) * FACES + face,
                    where=inside & (lower[order] == low),
                )

    def solids(self, bounds: Bounds, solids: Solids, first: int, faces: bool = True) -> None:
        """Cast all solids; nearer surfaces (greater w) win."""
        rows, columns = self._sides(bounds)
        curved = (solids.quadric[:, 0] > 0).tolist()
        fronts, all_faces = bounds.front.tolist(), bounds.face.tolist()
        for number, (row0, row1, col0, col1) in enumerate(bounds.rect.tolist()):
            front = fronts[number]
            if row0 >= row1 or front == 0:
                continue
            w = rows[number, :, row0:row1] + columns[number, :, :, col0:col1]
            target = self.w[row0:row1, col0:col1]
            high, low = w[0], np.maximum.reduce(w[front:])
            for other in w[1:front]:
                high = np.minimum(high, other)
            np.maximum(low, target, out=low)
            if curved[number]:
                near, far = self._quadric(solids, number, row0, row1, col0, col1)
                flat = high
                high, low = np.minimum(high, near), np.maximum(low, far)
            hit = high > low
            if not hit.any():
                continue
            np.copyto(target, high, where=hit)
            if not faces:
                continue
            names, base = self.face[row0:row1, col0:col1], (first + number) * FACES
            np.copyto(names, base + all_faces[number][0], where=hit)
            for order in range(1, front):
                np.copyto(names, base + all_faces[number][order], where=hit & (w[order] == high))
            if curved[number]:
                np.copyto(names, base + CURVED, where=hit & (near <= flat))

    def _quadric(
        self, solids: Solids, number: int, row0: int, row1: int, col0: int, col1: int
    ) -> tuple[Float[np.ndarray, "a b"], Float[np.ndarray, "a b"]]:
        """The interval of w inside the quadric: (greatest, least), NaN if empty."""
        scaled = solids.axes[number] / solids.radii[number][:, None]
        origin = -(scaled * solids.centre[number]).sum(-1)
        _, k2, k1, k0 = solids.quadric[number].tolist()
        ox, oy, oz = origin.tolist()
        constant = ox * ox + oz * oz + k2 * oy * oy + k1 * oy + k0
        if abs(constant) < 1e-6:
            constant = 1e-6
        linear = ox * scaled[0] + oz * scaled[2] + (k2 * oy + 0.5 * k1) * scaled[1]
        b = (linear / constant).tolist()
        # The discriminant is a quadratic polynomial of (u, v): its six coefficients, exactly.
        (x0, x1, x2), (y0, y1, y2), (z0, z1, z2) = scaled.tolist()
        c = 1.0 / constant
        uu = b[0] * b[0] - c * (x0 * x0 + z0 * z0 + k2 * y0 * y0)
        vv = b[1] * b[1] - c * (x1 * x1 + z1 * z1 + k2 * y1 * y1)
        uv = 2.0 * (b[0] * b[1] - c * (x0 * x1 + z0 * z1 + k2 * y0 * y1))
        u1 = 2.0 * (b[0] * b[2] - c * (x0 * x2 + z0 * z2 + k2 * y0 * y2))
        v1 = 2.0 * (b[1] * b[2] - c * (x1 * x2 + z1 * z2 + k2 * y1 * y2))
        one = b[2] * b[2] - c * (x2 * x2 + z2 * z2 + k2 * y2 * y2)
        f = np.float32
        u, v = self.view.u[col0:col1], self.view.v[row0:row1, None]
        half = (f(b[1]) * v + f(b[2])) + f(b[0]) * u
        inner = v * (f(uv) * u)
        inner += (f(vv) * v + f(v1)) * v + f(one)
        inner += (f(uu) * u + f(u1)) * u
        root = np.sqrt(inner)  # not a number, and so never a hit, where the ray misses
        # A camera inside the cone's other half (constant < 0): only the far sheet is an entry.
        if constant > 0:
            return root - half, -root - half
        return -root - half, np.zeros_like(root)
