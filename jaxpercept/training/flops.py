"""Arithmetic of a traced program, to say how near to a device's peak it runs."""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Var


def count_flops(program: ClosedJaxpr | Jaxpr) -> float:
    """Operations of all matrix products and convolutions, a multiplication and an addition two.

    Counted is what was traced and has a use, over all devices, with what remat computes again and
    every turn of a scan; XLA's own count takes a loop's body once. Of a branch the longest counts,
    a while loop once. Additions and functions of single elements are left out: 1 % of a diffusion
    model.

    program: as `jax.make_jaxpr` or `jax.jit(f).trace(...).jaxpr` give it.
    """
    jaxpr = _opened(program)
    return _count(jaxpr, [True] * len(jaxpr.outvars))[0]


def _count(jaxpr: Jaxpr, wanted: Sequence[bool]) -> tuple[float, list[bool]]:
    """Operations for the wanted results, and which arguments they need.

    A custom gradient is traced with the gradients of frozen weights, which nobody asks for.
    """
    used = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and _is_var(v)}
    total = 0.0
    for equation in reversed(jaxpr.eqns):
        results = [v in used for v in equation.outvars]
        if not any(results) and not equation.effects:
            continue
        flops, needs = _of_equation(equation, results)
        total += flops
        used |= {v for v, need in zip(equation.invars, needs, strict=True) if need and _is_var(v)}
    return total, [v in used for v in jaxpr.invars]


def _of_equation(equation: Any, wanted: list[bool]) -> tuple[float, list[bool]]:
    name, params = equation.primitive.name, equation.params
    everything = [True] * len(equation.invars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        summed = math.prod(shape[i] for i in contracted)
        return 2.0 * equation.outvars[0].aval.size * summed, everything
    if name == "conv_general_dilated":
        return _convolution(equation), everything
    inner = _programs(params)
    if name == "scan":
        carried = [True] * params["num_carry"]
        turn, _ = _count(inner[0], carried + wanted[len(carried) :])
        return turn * params["length"], everything
    # A program that is merely called, by jit or remat, has the arguments and results of its call.
    if len(inner) == 1 and len(inner[0].invars) == len(everything):
        return _count(inner[0], wanted)
    counts = [count_flops(program) for program in inner]
    return (max(counts) if name == "cond" else sum(counts, 0.0)), everything


def _convolution(equation: Any) -> float:
    """Every pixel of the result takes a product with each of its channel group's kernel; a dilated
    image has zeros in between, which are not multiplied."""
    kernel = equation.invars[1].aval
    (out,) = equation.outvars
    out_channels = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    zeros = math.prod(equation.params["lhs_dilation"])
    return 2.0 * out.aval.size * kernel.size / out_channels / zeros


def _programs(params: dict[str, Any]) -> list[Jaxpr]:
    values = [x for v in params.values() for x in (v if isinstance(v, tuple | list) else (v,))]
    return [_opened(x) for x in values if isinstance(x, ClosedJaxpr | Jaxpr)]


def _opened(program: ClosedJaxpr | Jaxpr) -> Jaxpr:
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def _is_var(x: Any) -> bool:
    return isinstance(x, Var)  # the others are constants
