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
_SIGNS = np.array(
    [[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]
)  # fmt: skip
_EDGES = np.array(
    [(a, b) for a in range(8) for b in range(a + 1, 8) if (a ^ b) in (1, 2, 4)]
)  # fmt: skip


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
    along = (solids.axes * solids.centre[:, None, :]).sum(-1)
    offset = np.empty((len(along), 6))
    offset[:, 0::2] = solids.half - along
    offset[:, 1::2] = solids.half + along
    offset = np.where(np.abs(offset) < 1e-4, 1e-4, offset)
    plane = np.repeat(solids.axes, 2, axis=1)
    plane[:, 0::2] *= -1.0
    plane /= offset[:, :, None]
    inside = offset > 0
    face = np.argsort(inside, axis=1, kind="stable")
    plane = np.take_along_axis(plane, face[:, :, None], axis=1)
    return Bounds(plane, face, 6 - inside.sum(1), _rectangles(solids, view))


def _rectangles(solids: Solids, view: View) -> Int[np.ndarray, "n 4"]:
    scaled = solids.axes * solids.half[:, :, None]
    corners = solids.centre[:, None, :] + (
        _SIGNS[:, 0:1] * scaled[:, None, 0]
        + _SIGNS[:, 1:2] * scaled[:, None, 1]
        + _SIGNS[:, 2:3] * scaled[:, None, 2]
    )
    behind = corners[:, :, 2] < NEAR
    if behind.any():
        # Where an edge crosses the near plane, its crossing replaces the end behind it.
        a, b = corners[:, _EDGES[:, 0]], corners[:, _EDGES[:, 1]]
        depth_a, depth_b = a[:, :, 2:], b[:, :, 2:]
        crosses = (depth_a < NEAR) != (depth_b < NEAR)
        part = (NEAR - depth_a) / np.where(crosses, depth_b - depth_a, 1.0)
        cut = a + (b - a) * part
        points = np.concatenate([corners, cut], axis=1)
        seen = np.concatenate([~behind, crosses[:, :, 0]], axis=1)
    else:
        points, seen = corners, ~behind
    depth = np.maximum(points[:, :, 2], NEAR * 0.999)
    column = points[:, :, 0] / depth * view.focal[0] + view.centre[0]
    row = view.centre[1] - points[:, :, 1] / depth * view.focal[1]
    height, width = len(view.v), len(view.u)
    rect = np.empty((len(points), 4))
    rect[:, 0] = np.where(seen, row, 1e6).min(1) - 1.0
    rect[:, 1] = np.where(seen, row, -1e6).max(1) + 2.0
    rect[:, 2] = np.where(seen, column, 1e6).min(1) - 1.0
    rect[:, 3] = np.where(seen, column, -1e6).max(1) + 2.0
    rect[:, :2] = np.clip(rect[:, :2], 0, height)
    rect[:, 2:] = np.clip(rect[:, 2:], 0, width)
    rect[rect[:, 2] >= rect[:, 3], 1] = 0
    return rect.astype(np.int64)


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
        for number in range(6):
            w = rows[0, number] + columns[0, number]
            nearer = w > self.w
            np.copyto(self.w, w, where=nearer)
            np.copyto(self.face, first * FACES + int(bounds.face[0, number]), where=nearer)

    def recesses(self, bounds: Bounds, first: int, walls: list[int]) -> None:
        """Cut the insides of boxes into walls: box k opens with its +z face on room face `walls[k]`.

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
            high, low = w[0], np.maximum.reduce(w[front:])
            for other in w[1:front]:
                high = np.minimum(high, other)
            base = (first + number) * FACES
            if curved[number]:
                near, far = self._quadric(solids, number, row0, row1, col0, col1)
                flat = high
                high, low = np.minimum(high, near), np.maximum(low, far)
            target = self.w[row0:row1, col0:col1]
            hit = high >= low
            hit &= high > target
            np.copyto(target, high, where=hit)
            if not faces:
                continue
            names = self.face[row0:row1, col0:col1]
            np.copyto(names, base + all_faces[number][0], where=hit)
            for order in range(1, front):
                np.copyto(names, base + all_faces[number][order], where=hit & (w[order] == high))
            if curved[number]:
                np.copyto(names, base + CURVED, where=hit & (near <= flat))

    def _quadric(
        self, solids: Solids, number: int, row0: int, row1: int, col0: int, col1: int
    ) -> tuple[Float[np.ndarray, "a b"], Float[np.ndarray, "a b"]]:
        """The interval of w inside the quadric: (greatest, least); empty = (-1, 1)."""
        scaled = solids.axes[number] / solids.radii[number][:, None]
        origin = -(scaled * solids.centre[number]).sum(-1)
        _, k2, k1, k0 = solids.quadric[number].tolist()
        u, v = self.view.u[col0:col1], self.view.v[row0:row1, None]
        s = scaled.astype(np.float32)
        dx = (s[0, 1] * v + s[0, 2]) + s[0, 0] * u
        dy = (s[1, 1] * v + s[1, 2]) + s[1, 0] * u
        dz = (s[2, 1] * v + s[2, 2]) + s[2, 0] * u
        ox, oy, oz = origin.tolist()
        constant = ox * ox + oz * oz + k2 * oy * oy + k1 * oy + k0
        if abs(constant) < 1e-6:
            constant = 1e-6
        linear = ox * scaled[0] + oz * scaled[2] + (k2 * oy + 0.5 * k1) * scaled[1]
        q = (linear / constant).astype(np.float32)
        half = (q[1] * v + q[2]) + q[0] * u
        square = dx * dx + dz * dz
        if k2:
            square += np.float32(k2) * (dy * dy)
        inner = half * half - square * np.float32(1.0 / constant)
        root = np.sqrt(np.maximum(inner, 0))
        missed = inner < 0
        # A camera inside the cone's other half (constant < 0): only the far sheet is an entry.
        if constant > 0:
            near, far = root - half, -root - half
        else:
            near, far = -root - half, np.zeros_like(root)
        np.copyto(near, np.float32(-1.0), where=missed)
        np.copyto(far, np.float32(1.0), where=missed)
        return near, far


def hidden(w: Float[np.ndarray, "h w"], at_w: np.ndarray) -> Bool[np.ndarray, "..."]:
    """Whether a surface at inverse depth `at_w` lies behind the buffer's."""
    return w > at_w
