"""Captions and referring phrases from the visible objects of a scene."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxpercept.data.scenes.builder import Thing
from jaxpercept.data.scenes.palette import Draws

MAX_WORDS = 25
SEEN = 0.004  # share of the picture above which an object is worth a phrase
TRACE = 0.0006  # share above which an object of the same name makes a phrase ambiguous


class Sight(NamedTuple):
    """A thing as the picture shows it."""

    id: int
    thing: Thing
    share: float  # of the picture's pixels
    x: float  # centroid, 0 left .. 1 right
    depth: float  # mean, metres


@functools.lru_cache(4)
def _columns(height: int, width: int) -> Float[np.ndarray, " n"]:
    """The columns of every second pixel of every second row, in float64 for bincount."""
    return np.tile(np.arange(0.0, width, 2.0), (height + 1) // 2)


def sights(
    things: Sequence[Thing], instance: Int[np.ndarray, "h w"], depth: np.ndarray
) -> list[Sight]:
    """Visible things, largest first."""
    height, width = instance.shape
    flat = instance.ravel().astype(np.intp)
    count = np.bincount(flat, minlength=len(things) + 1).tolist()
    # Centroid and depth from a quarter of the pixels; integer sums (in millimetres) are exact.
    some = instance[::2, ::2].ravel().astype(np.intp)
    millimetres = np.floor(depth[::2, ::2].ravel() * np.float32(1000.0))
    columns = _columns(height, width)
    rows, x, z = (
        np.bincount(some, weights=part, minlength=len(things) + 1).tolist()
        for part in (None, columns, millimetres)
    )
    total = float(flat.size)
    for n in range(1, len(things) + 1):
        if not rows[n] and count[n] >= TRACE * total:  # all of it lies between those pixels
            where = np.nonzero(instance == n)
            rows[n], x[n] = count[n], float(where[1].sum())
            z[n] = float(np.floor(depth[where] * np.float32(1000.0)).sum())
    found = [
        Sight(n, things[n - 1], count[n] / total, (x[n] / rows[n] + 0.5) / width,
              0.001 * z[n] / rows[n])
        for n in range(1, len(things) + 1)
        if rows[n]
    ]  # fmt: skip
    return sorted(found, key=lambda sight: (-sight.share, sight.id))


def _name(thing: Thing) -> str:
    return f"{thing.word} {thing.kind}" if thing.word else thing.kind


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _size(sight: Sight) -> str:
    if sight.thing.kind in ("lamp", "cabinet", "shelf", "plant") and sight.thing.height > 1.4:
        return "tall "
    if sight.share > 0.16:
        return "large "
    if sight.share < 0.012:
        return "small "
    return ""


def _where(sight: Sight) -> str:
    if sight.thing.on not in ("floor", "wall", "ceiling"):
        return f" on the {sight.thing.on}"
    if sight.thing.on == "wall" and sight.thing.kind == "picture":
        return " on the wall"
    if sight.x < 0.3:
        return " on the left"
    if sight.x > 0.7:
        return " on the right"
    if sight.depth < 1.4:
        return " in front"
    return ""


def caption(room: str, seen: list[Sight], wall: str, floor: str, draws: Draws) -> str:
    """One sentence of at most 25 words: the room and its two to four largest objects."""
    start = draws.pick(("{}", "{}", "a photo of {}", "a picture of {}", "a view of {}"))
    coloured = draws.chance(0.3) and wall
    place = start.format(_article(f"{wall} {room}" if coloured else room))
    parts: list[str] = []
    names: set[str] = set()
    wanted = draws.whole(2, 4)
    for sight in seen:
        if sight.share < SEEN or len(parts) >= wanted:
            break
        if sight.thing.kind in names:
            continue
        names.add(sight.thing.kind)
        size = _size(sight) if draws.chance(0.5) else ""
        where = _where(sight) if draws.chance(0.5) else ""
        if where == f" on the {sight.thing.kind}":
            where = ""
        parts.append(_article(size + _name(sight.thing)) + where)
    if draws.chance(0.25) and floor:
        parts.append(_article(f"{floor} floor"))
    if not parts:
        return f"{place} with {_article(wall + ' wall' if wall else 'wall')}"
    while True:
        tail = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        sentence = f"{place} with {tail}"
        if len(sentence.split()) <= MAX_WORDS or len(parts) == 1:
            return sentence
        parts.pop()


def phrases(seen: list[Sight]) -> list[tuple[str, int]]:
    """(phrase, instance id) pairs, each true of exactly one visible object."""
    rivals = [sight for sight in seen if sight.share >= TRACE]
    found: list[tuple[str, int]] = []
    groups: dict[str, list[Sight]] = {}
    for sight in rivals:
        groups.setdefault(sight.thing.kind, []).append(sight)
        if sight.thing.word:
            groups.setdefault(_name(sight.thing), []).append(sight)
    for name, group in groups.items():
        if len(group) == 1:
            if group[0].share >= SEEN:
                found.append((f"the {name}", group[0].id))
            continue
        for order, label, margin in (
            (lambda sight: sight.x, "the {} on the left", 0.08),
            (lambda sight: -sight.x, "the {} on the right", 0.08),
            (lambda sight: -sight.share, "the largest {}", None),
            (lambda sight: sight.depth, "the nearest {}", 0.3),
            (lambda sight: -sight.depth, "the farthest {}", 0.3),
        ):
            first, second = sorted(group, key=order)[:2]
            if margin is None:
                clear = first.share > 1.4 * second.share
            else:
                clear = order(second) - order(first) > margin
            if clear and first.share >= SEEN:
                found.append((label.format(name), first.id))
    for sight in rivals:
        below = sight.thing.on
        if sight.share >= SEEN and below not in ("floor", "wall", "ceiling", sight.thing.kind):
            same = [o for o in rivals if o.thing.kind == sight.thing.kind and o.thing.on == below]
            if len(same) == 1 and len(groups[sight.thing.kind]) > 1:
                found.append((f"the {sight.thing.kind} on the {below}", sight.id))
    return found
