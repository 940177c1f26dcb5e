"""What of the package works on this machine, tried out in seconds.

A probe is a dict: "probe" (its name), "works", "required" (whether it should), "error" (a sentence,
None where it works) and what was measured.
"""

from __future__ import annotations

import functools
import itertools
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxpercept.data.stages import prefetched
from jaxpercept.diagnosis.text import first_line
from jaxpercept.inference.opening import DTYPES
from jaxpercept.models import attention

# The first level of SD 2.1's UNet, at 256 px on a CPU and at 512 px elsewhere.
_SHAPES = {
    "cpu": {"tokens": 1024, "heads": 5, "head_size": 64},
    "other": {"tokens": 4096, "heads": 5, "head_size": 64},
}
# The heads of SD 1 (40, 80, 160), SD 2 (64) and of their autoencoder (512).
_HEAD_SIZES = (40, 64, 80, 160, 512)
_SIDES = {"cpu": 1024, "other": 8192}
# Largest deviation from the reference, relative to its largest value. Accelerators multiply float32
# with fewer bits (TF32, or bfloat16 passes) unless told otherwise: "other".
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2, "other": 2e-2}
_PATIENCE = 60.0  # seconds for data workers to start


def probe_all() -> dict[str, Any]:
    """Every probe, in the groups "attention", "matmul" and "others", and "attention_shape"."""
    shape = _SHAPES.get(jax.default_backend(), _SHAPES["other"])
    inputs = attention_inputs(**shape)
    expected = plain_attention(*inputs)
    kinds = list(itertools.product(DTYPES, attention.IMPLEMENTATIONS))
    with tqdm(total=len(kinds) + len(DTYPES) + 2, unit="probe", leave=False) as bar:

        def step(name: str, function: Callable[..., dict[str, Any]], *arguments: Any):
            bar.set_description(name)
            result = function(*arguments)
            bar.update()
            return result

        return {
            "attention_shape": shape,
            "attention": [
                step(f"attention {name} {dtype}", probe_attention, name, dtype, inputs, expected)
                for dtype, name in kinds
            ],
            "matmul": [step(f"matmul {dtype}", probe_matmul, dtype) for dtype in DTYPES],
            "others": [step("compiling", probe_compile), step("workers", probe_workers)],
        }


def cudnn_head_sizes() -> dict[str, list[int]]:
    """By type, the head sizes of published models for which a GPU's attention is cuDNN's."""

    def chosen(dtype: str, size: int) -> bool:
        tokens = jnp.zeros((1, 512, 1, size), dtype)
        return attention.choose_implementation(tokens, tokens) == "cudnn"

    return {
        dtype: [size for size in _HEAD_SIZES if chosen(dtype, size)]
        for dtype in ("bfloat16", "float16")
    }


def probe_attention(
    implementation: str,
    dtype: str,
    inputs: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Whether an attention implementation works in a type, forwards and backwards.

    Args:
        implementation, dtype: one of `attention.IMPLEMENTATIONS` and of `DTYPES`.
        inputs: queries, keys, values and the output's cotangent, float32 [1, t, n, d].
        expected: output and the gradients of queries, keys and values, as `plain_attention` gives.
    """
    backend = jax.default_backend()
    # Models run with "auto", in any type that the device has. cuDNN depends on the device.
    required = implementation != "cudnn" and dtype != "float16"
    required |= implementation == "auto" and backend != "tpu"

    def forwards_and_backwards(q, k, v, cotangent):
        attend = functools.partial(attention.dot_product_attention, implementation=implementation)
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(cotangent)

    def run() -> dict[str, Any]:
        arrays = [jnp.asarray(x, dtype) for x in inputs]
        chosen = implementation
        if implementation == "auto":
            chosen = attention.choose_implementation(arrays[0], arrays[1])
        compiled = jax.jit(forwards_and_backwards).lower(*arrays).compile()
        # Of NumPy, whose maximum of NaN and anything is NaN.
        deviation = float(np.max([*map(_deviation, compiled(*arrays), expected)]))
        return {
            **_judged(deviation, _tolerance(dtype)),
            "milliseconds": round(1e3 * _seconds(compiled, *arrays), 3),
            "chosen": chosen,
        }

    return _probe(f"attention {implementation} {dtype}", required, run)


def attention_inputs(tokens: int, heads: int, head_size: int) -> list[np.ndarray]:
    """Queries, keys, values and the output's cotangent, float32 [1, t, n, d].

    They are normal numbers that all types hold without rounding.
    """
    shape = (1, tokens, heads, head_size)
    draws = np.random.default_rng(0).standard_normal((4, *shape), np.float32)
    return list(np.clip(np.round(draws * 32), -128, 128) / np.float32(32))


def plain_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, cotangent: np.ndarray
) -> list[np.ndarray]:
    """softmax(q k^T / sqrt(d)) v and its gradients by NumPy, head after head."""
    scale = np.float32(1 / np.sqrt(q.shape[-1]))
    results = []
    for head in range(q.shape[2]):
        q_, k_, v_, d_ = (x[0, :, head] for x in (q, k, v, cotangent))
        scores = q_ @ k_.T * scale
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        out, d_p = p @ v_, d_ @ v_.T
        d_scores = p * (d_p - (d_ * out).sum(axis=1, keepdims=True)) * scale
        results.append((out, d_scores @ k_, d_scores.T @ q_, p.T @ d_))
    return [np.stack(parts, axis=1)[None] for parts in zip(*results, strict=True)]


def probe_matmul(dtype: str) -> dict[str, Any]:
    """The rate of matrix products in a type, and whether they are computed in that type."""
    backend = jax.default_backend()
    side = _SIDES.get(backend, _SIDES["other"])

    def run() -> dict[str, Any]:
        draws = np.random.default_rng(0).standard_normal((side, side), np.float32)
        array = jnp.asarray(draws, dtype)
        compiled = jax.jit(jnp.matmul).lower(array, array).compile()
        exact = np.asarray(array, np.float32)
        deviation = _deviation(compiled(array, array)[:64], exact[:64] @ exact)
        rate = 2 * side**3 / _seconds(compiled, array, array) / 1e12
        return {
            **_judged(deviation, _tolerance(dtype)),
            "side": side,
            "tflops": float(f"{rate:.3g}"),
            "native": not _widens(compiled.as_text(), dtype),
        }

    return _probe(f"matmul {dtype}", dtype != "float16" or backend != "tpu", run)


def _widens(program: str, dtype: str) -> bool:
    """Whether a compiled product first turns its factors, of that type, into float32."""
    narrow = {"bfloat16": "bf16", "float16": "f16"}.get(dtype)
    types: dict[str, str] = {}
    # "ROOT %y = f32[8,8]{1,0} convert(%x), metadata=..."; %x has been defined before.
    line = re.compile(r"(%\S+) = (\w+)\[\S* (\w+)\([^%)]*(%[\w.-]+)?")
    for name, kind, operation, operand in line.findall(program):
        types[name] = kind
        if narrow and operation == "convert" and kind == "f32" and types.get(operand) == narrow:
            return True
    return False


def probe_compile() -> dict[str, Any]:
    """Whether jit compiles a function and its gradient, and they compute what they should."""
    x = np.linspace(-2, 2, 512, dtype=np.float32).reshape(16, 32)

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.tanh(x) ** 2)))(x)
        deviation = _deviation(gradient, 2 * np.tanh(x) * (1 - np.tanh(x) ** 2))
        return {**_judged(deviation, 1e-3), "seconds": round(time.perf_counter() - start, 3)}

    return _probe("jit", True, run)


def probe_workers() -> dict[str, Any]:
    """Whether data worker processes start, read and hand over."""
    records = grain.MapDataset.source([{"number": n} for n in range(8)])
    answers: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        try:
            iterator = iter(prefetched(records, 1))
            answers.put([record["number"] for record in iterator])
            iterator.close()
        except Exception as error:  # to be raised where it is waited for
            answers.put(error)

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        threading.Thread(target=read, daemon=True).start()
        try:
            numbers = answers.get(timeout=_PATIENCE)
        except queue.Empty:
            raise RuntimeError(f"no answer for {_PATIENCE:.0f} s") from None
        if isinstance(numbers, Exception):
            raise numbers
        if numbers != list(range(8)):
            raise RuntimeError(f"they hand over {numbers}")
        return {"works": True, "seconds": round(time.perf_counter() - start, 3)}

    return _probe("data workers", True, run)


def _probe(name: str, required: bool, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns; where it raises, its error in a sentence."""
    head = {"probe": name, "works": False, "required": required, "error": None}
    try:
        return {**head, **run()}
    except Exception as error:  # whatever breaks here is the answer
        return {**head, "error": first_line(error)}


def _deviation(result: Any, expected: np.ndarray) -> float:
    """The largest, relative to the largest value."""
    difference = np.abs(np.asarray(result, np.float32) - expected).max()
    return float(difference / np.abs(expected).max())


def _tolerance(dtype: str) -> float:
    reduced = dtype == "float32" and jax.default_backend() != "cpu"
    return _TOLERANCE["other" if reduced else dtype]


def _judged(deviation: float, tolerance: float) -> dict[str, Any]:
    if not np.isfinite(deviation):  # which JSON cannot hold
        return {"works": False, "error": "its results are not finite", "deviation": None}
    error = f"its results are off by {deviation:.2g} of the largest value"
    works = deviation <= tolerance
    return {"works": works, "error": None if works else error, "deviation": deviation}


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """The least time of some calls."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 10 and sum(times) < 0.1):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)
