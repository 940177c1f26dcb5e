"""Diffusion perception in JAX: depth and more from text-to-image checkpoints.

    from jaxpercept import PerceptionPipeline
    pipe = PerceptionPipeline.from_pretrained("runs/depth")
    depth = pipe(image).prediction

Importing the package is cheap: JAX is loaded when the pipeline is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpercept.inference.pipeline import PerceptionOutput, PerceptionPipeline

__version__ = "0.1.0"
__all__ = ["PerceptionOutput", "PerceptionPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("PerceptionOutput", "PerceptionPipeline"):
        from jaxpercept.inference import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
