"""Arithmetic of a traced program, to say how near to a device's peak it runs."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(program: ClosedJaxpr | Jaxpr) -> float:
    """Operations of all matrix products and convolutions, a multiplication and an addition two.

    Counted is what was traced, over all devices, with what remat computes again and every turn of
    a scan; XLA's own count takes a loop's body once. Of a branch the longest counts, a while loop
    once. Additions and functions of single elements are left out: 1 % of a diffusion model.

    program: as `jax.make_jaxpr` or `jax.jit(f).trace(...).jaxpr` give it.
    """
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return sum((_flops_of(equation) for equation in jaxpr.eqns), 0.0)


def _flops_of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        return _convolution(equation)
    inner = [count_flops(program) for program in _programs(params)]
    if name == "cond":
        return max(inner)
    return sum(inner, 0.0) * (params["length"] if name == "scan" else 1)


def _convolution(equation: Any) -> float:
    """Every pixel of the result takes a product with each of its channel group's kernel; a dilated
    image has zeros in between, which are not multiplied."""
    kernel = equation.invars[1].aval
    (out,) = equation.outvars
    out_channels = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    zeros = math.prod(equation.params["lhs_dilation"])
    return 2.0 * out.aval.size * kernel.size / out_channels / zeros


def _programs(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item
