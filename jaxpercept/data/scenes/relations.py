"""Phrases that tell things apart by size and place, each true of exactly one and of no other.

A phrase names a group, things of a kind ("ball"), of a colour ("red thing") or of both ("red
ball"), and what is so of only one of the group: "large", "small" or "tall", "on the left", "on the
right" or "in front", "on" a thing, or "left of", "right of", "in front of" or "behind" it. That
thing needs a name of its own. Whatever is said is clear: of the one it holds by a margin, of the
others of the group that are to be seen it is false by a margin.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxpercept.data.scenes.language import SEEN, TRACE, Sight
from jaxpercept.data.scenes.palette import Draws

_TALL = 1.4  # height over width from which a thing may be called tall
_LARGER = 1.4  # factor between sizes, in metres and in the picture
_ASIDE = 0.06  # between centres, as a share of the picture's width
_FARTHER = 0.35  # metres
_MOST = {"name": 2, "side": 2, "depth": 2}  # phrases of one sort for one thing, of other sorts one


class Look(NamedTuple):
    """A thing as the picture shows it, with its extent."""

    sight: Sight
    left: float  # edges, 0 to 1 across the picture
    right: float
    high: float  # share of the picture's height
    names: tuple[str, ...]  # of the groups it belongs to
    bulk: float  # square metres seen from the side


def relations(
    seen: Sequence[Sight], instance: Int[np.ndarray, "h w"], draws: Draws
) -> list[tuple[str, int]]:
    """(phrase, instance id) pairs: of every thing some phrases of each sort, drawn."""
    looks = _looks(seen, instance)
    groups: dict[str, list[Look]] = {}
    for look in looks:
        for name in look.names:
            groups.setdefault(name, []).append(look)
    anchors = [(look, f"the {name}") for look in looks if (name := _own_name(look, groups))]
    phrases: list[tuple[str, int]] = []
    for look in looks:
        if look.sight.share < SEEN:
            continue
        sorts: dict[str, list[str]] = {}
        for name in look.names:
            others = [other for other in groups[name] if other is not look]
            if not others:
                sorts.setdefault("name", []).append(f"the {name}")
                continue
            for sort, words, is_so in _AMONG:
                if all(is_so(look, other) for other in others):
                    sorts.setdefault(sort, []).append(f"the {words.format(name)}")
            for anchor, its_name in anchors:
                if name in anchor.names:
                    continue
                for sort, words, is_so in _TOWARDS:
                    if is_so(look, anchor) and all(is_so(o, anchor) is False for o in others):
                        sorts.setdefault(sort, []).append(f"the {name} {words} {its_name}")
        for sort, choices in sorts.items():
            for _ in range(min(_MOST.get(sort, 1), len(choices))):
                phrases.append((choices.pop(draws.whole(0, len(choices) - 1)), look.sight.id))
    return phrases


def _looks(seen: Sequence[Sight], instance: Int[np.ndarray, "h w"]) -> list[Look]:
    """The things of known width that are to be seen, with the extents of their pixels."""
    height, width = instance.shape
    found = []
    for sight in seen:
        thing = sight.thing
        if sight.share >= TRACE and thing.width:
            mask = instance == sight.id
            columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            left, right = int(columns[0]) / width, int(columns[-1] + 1) / width
            high = int(rows[-1] + 1 - rows[0]) / height
            names = thing.kind, f"{thing.word} thing", f"{thing.word} {thing.kind}"
            bulk = float(thing.width * thing.height)
            found.append(Look(sight, left, right, high, names, bulk))
    return found


def _own_name(look: Look, groups: dict[str, list[Look]]) -> str | None:
    """What nothing else in the picture can be called."""
    if look.sight.share < SEEN:
        return None
    for name in look.names:
        if len(groups[name]) == 1:
            return name
    for sort, words, is_so in _AMONG:
        for name in look.names if sort == "size" else ():
            if all(is_so(look, other) for other in groups[name] if other is not look):
                return words.format(name)
    return None


# ---- one thing among others: clearly so, or not --------------------------------------------------


def _larger(one: Look, other: Look) -> bool:
    seen = one.sight.share > _LARGER * other.sight.share
    return seen and one.bulk > _LARGER * other.bulk


def _smaller(one: Look, other: Look) -> bool:
    return _larger(other, one)


def _taller(one: Look, other: Look) -> bool:
    thing = one.sight.thing
    seen = one.high > _LARGER * other.high and thing.height > _TALL * thing.width
    return seen and thing.height > _LARGER * other.sight.thing.height


def _more_left(one: Look, other: Look) -> bool:
    return one.sight.x < min(0.5, other.sight.x - 1.5 * _ASIDE)


def _more_right(one: Look, other: Look) -> bool:
    return one.sight.x > max(0.5, other.sight.x + 1.5 * _ASIDE)


def _nearer(one: Look, other: Look) -> bool:
    return one.sight.depth < other.sight.depth - 1.5 * _FARTHER


# ---- one thing towards another: clearly so, clearly not so (False), or neither (None) ------------


def _left_of(one: Look, anchor: Look) -> bool | None:
    if one.sight.x < min(anchor.left, anchor.sight.x - _ASIDE):
        return True
    return False if one.sight.x > anchor.sight.x + 0.5 * _ASIDE else None


def _right_of(one: Look, anchor: Look) -> bool | None:
    if one.sight.x > max(anchor.right, anchor.sight.x + _ASIDE):
        return True
    return False if one.sight.x < anchor.sight.x - 0.5 * _ASIDE else None


def _before(one: Look, anchor: Look) -> bool | None:
    nearer = anchor.sight.depth - one.sight.depth
    if nearer > _FARTHER and _one_behind_the_other(one, anchor):
        return True
    return False if nearer < -0.5 * _FARTHER else None


def _behind(one: Look, anchor: Look) -> bool | None:
    nearer = anchor.sight.depth - one.sight.depth
    if nearer < -_FARTHER and _one_behind_the_other(one, anchor):
        return True
    return False if nearer > 0.5 * _FARTHER else None


def _one_behind_the_other(one: Look, other: Look) -> bool:
    """Whether they lie in about the same columns, and neither carries the other."""
    stacked = {one.sight.thing.below, other.sight.thing.below} & {one.sight.id, other.sight.id}
    gap = max(one.left - other.right, other.left - one.right)
    return gap < 0.5 * _ASIDE and not stacked


def _upon(one: Look, anchor: Look) -> bool:
    return one.sight.thing.below == anchor.sight.id


_Among = tuple[str, str, Callable[[Look, Look], bool]]
_AMONG: tuple[_Among, ...] = (
    ("size", "large {}", _larger),
    ("size", "small {}", _smaller),
    ("size", "tall {}", _taller),
    ("place", "{} on the left", _more_left),
    ("place", "{} on the right", _more_right),
    ("place", "{} in front", _nearer),
)
_Towards = tuple[str, str, Callable[[Look, Look], bool | None]]
_TOWARDS: tuple[_Towards, ...] = (
    ("side", "left of", _left_of),
    ("side", "right of", _right_of),
    ("depth", "in front of", _before),
    ("depth", "behind", _behind),
    ("stack", "on", _upon),
)
