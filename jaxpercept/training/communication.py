"""What a compiled step sends between devices: its collectives, read from XLA's program."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(
    rf"= (?P<type>\(?[a-z][^=]*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\("
)
_COMMENT = re.compile(r"/\*.*?\*/")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLS = re.compile(r"(?:calls|to_apply|branch_computations)=\{?(%?[\w.\-]+(?:, ?%?[\w.\-]+)*)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of a program, as often as it runs in one call.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
        bytes: of its result on one device.
        devices: that take part in each of its groups.
        times: how often it runs.
    """

    kind: str
    bytes: int
    devices: int
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all, by the ring algorithms, which send the least."""
        n = self.devices
        if n < 2:
            return 0.0
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": (n - 1) / n,
            "reduce-scatter": float(n - 1),  # its result is an n-th of what goes in
            "all-to-all": (n - 1) / n,
            "collective-permute": 1.0,
        }[self.kind]
        return share * self.bytes * self.times


def collectives(program: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
        program: its text, `compiled.as_text()`.
        devices: how many it runs on; the size of groups that the text does not give.
    """
    times = _times(program)
    found = []
    for computation, line in _lines(program):
        match = _OPERATION.search(line)
        if match is None:
            continue
        sizes = [_size(*shape) for shape in _SHAPE.findall(match["type"])]
        # An asynchronous gather gives (what went in, what comes out).
        size = max(sizes) if match["start"] and match["kind"] != "all-reduce" else sum(sizes)
        group = _group_size(line, devices)
        found.append(Collective(match["kind"], size, group, times.get(computation, 1)))
    return found


def sent_by_kind(program: str, devices: int) -> dict[str, float]:
    """Bytes that each device sends in one call, by the kind of the collective."""
    total: dict[str, float] = {}
    for collective in collectives(program, devices):
        total[collective.kind] = total.get(collective.kind, 0.0) + collective.sent
    return {kind: size for kind, size in total.items() if size}


def _lines(program: str) -> Iterator[tuple[str, str]]:
    """(name of the computation, line)."""
    computation = ""
    for line in program.splitlines():
        line = _COMMENT.sub("", line)  # long tuples have their places in comments
        match = _COMPUTATION.match(line)
        if match is not None:
            computation = match[1]
        yield computation, line


def _times(program: str) -> dict[str, int]:
    """How often each computation runs in one call; a loop of unknown length counts once."""
    callers: dict[str, tuple[str, int]] = {}
    for computation, line in _lines(program):
        body = _BODY.search(line)
        if body is not None:
            trips = _TRIPS.search(line)
            callers[body[1]] = computation, int(trips[1]) if trips else 1
        for names in _CALLS.findall(line):
            for name in names.split(","):
                callers.setdefault(name.strip().lstrip("%"), (computation, 1))

    def times(name: str) -> int:
        if name not in callers:
            return 1
        caller, count = callers[name]
        return count * times(caller)

    return {name: times(name) for name in callers}


def _size(dtype: str, dimensions: str) -> int:
    digits = re.search(r"\d+$", dtype)
    bits = _BITS.get(dtype) or (int(digits[0]) if digits else 32)
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8


def _group_size(line: str, devices: int) -> int:
    """How many devices take part in each group; XLA writes groups in three ways."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)
    if named is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        # An axis, or a part of one: 'axis_0', or 'axis_0':(1)2, whose size is 2.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota is not None:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed is not None:
        return len(listed[1].split(","))
    if "source_target_pairs" in line:
        return 2
    return devices
