"""Where the time goes: shares of convolutions, matrix products, reductions, copies and the rest.

    python benchmarks/shares.py --size sd21 --resolution 256          # one-step inference
    python benchmarks/shares.py --train --method denoising --batch 4  # a training step

The profiler notes when every operation of the compiled program begins and ends; the program's text
says what each is. A fused operation is what costs most in it: a convolution, a product, else a
reduction (norms, softmax, losses), else arithmetic on single elements, else copies (layouts,
padding, concatenation). Time is that of the threads that start operations, so that shares are of
work and not of the clock. jaxpercept alone; no torch.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import common
import jax
from floors import Program
from inference import PARTS, jax_parts, make_inputs
from train_step import METHODS, changes, jax_step, make_batch

CALLS = 3
COPIES = {
    *("bitcast", "broadcast", "concatenate", "copy", "gather", "iota", "pad", "reshape", "slice"),
    *("dynamic-slice", "dynamic-update-slice", "transpose", "constant", "parameter", "tuple"),
    *("get-tuple-element", "convert", "reverse", "scatter", "select"),
}
CALLERS = ("while", "call", "conditional", "async-start", "async-done")
"""What takes as long as what it calls, which is counted itself."""


def kinds_of(program: str) -> dict[str, str]:
    """What each instruction of a compiled program's text mainly is, by its name."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    body: list[tuple[str, str, str]] = []
    for line in program.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            body = bodies.setdefault(begins[1], [])
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(", line)
        if found:
            calls = re.search(r"calls=%?([\w.\-]+)", line)
            body.append((found[1], found[2], calls[1] if calls else ""))
    return {
        name: _kind(operation, [inner for _, inner, _ in bodies.get(calls, [])])
        for instructions in bodies.values()
        for name, operation, calls in instructions
        if operation not in CALLERS
    }


def _kind(operation: str, inner: list[str]) -> str:
    operations = {operation, *inner} - {"fusion"}
    if "convolution" in operations:
        return "convolutions"
    if operations & {"dot", "custom-call"}:
        return "matrix products"
    if operations & {"reduce", "reduce-window"}:
        return "reductions"
    return "copies" if operations <= COPIES else "single elements"


def shares(program: Program) -> Counter[str]:
    """Seconds of each kind in some calls, on all threads."""
    program()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                program()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    kinds, seconds = kinds_of(program.executable.as_text()), Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if kind := kinds.get(event.name):
                    seconds[kind] += event.duration_ns / 1e9 / CALLS
    return seconds


def main() -> None:
    p = common.parser(__doc__.split("\n\n")[0], ("50m", "20m", "tiny", "sd21", "sd15"))
    p.add_argument("--train", action="store_true", help="a training step, not inference")
    p.add_argument("--method", choices=METHODS, default=METHODS[0], help="what is trained")
    p.add_argument("--remat", choices=("none", "block"), default="none", help="of the step")
    p.set_defaults(resolution=[256])
    args = p.parse_args()
    common.use_device(args.device)

    results: dict[str, Any] = {}
    for resolution in args.resolution:
        args.resolution = [resolution]
        options = changes(args) if args.train else {"tiny_decoder": True}
        model = common.jax_model(args.size, args.dtype, **options)
        params = common.jax_weights(model)
        if args.train:
            programs = {args.method: jax_step(args, params, make_batch(args))}
        else:
            inputs = make_inputs(args, resolution)
            programs = jax_parts(args, common.put(params, args.dtype), inputs)
        found = {name: shares(program) for name, program in programs.items()}
        kinds = sorted(set().union(*found.values()), key=lambda k: -found[list(found)[-1]][k])
        print(f"\n{args.size}, {args.batch} x {resolution} px, {args.dtype}: shares of the time")
        rows = []
        for name in programs if args.train else PARTS:
            total = found[name].total()
            rows.append({"": name, "s": f"{total:.3g}"})
            rows[-1] |= {kind: f"{found[name][kind] / total:.0%}" for kind in kinds}
        common.print_table(rows)
        results[str(resolution)] = found
    results |= {"machine": common.machine(args.device), "options": vars(args)}
    common.finish(results, args.output)


if __name__ == "__main__":
    main()
