"""The models of the page: opened, and compiled before anybody waits for them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxpercept.errors import UserError
from jaxpercept.inference.correction import Session
from jaxpercept.inference.options import Options, check_options
from jaxpercept.inference.pipeline import PerceptionPipeline


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model, and how the page predicts with it.

    Attributes:
        label: what the page calls it.
        pipe: the model.
        num_steps: of a prediction, unless the visitor chooses another number.
        resolution: as `processing_resolution` of the pipeline.
    """

    label: str
    pipe: PerceptionPipeline
    num_steps: int
    resolution: int | None = None

    @property
    def reads_text(self) -> bool:
        """Whether it looks for what a phrase names."""
        return self.pipe.perception.task.needs_prompt

    @property
    def takes_steps(self) -> bool:
        """Whether the number of steps can be chosen."""
        return self.pipe.perception.recipe.timesteps is None

    def session(
        self,
        rgb: UInt8[np.ndarray, "h w 3"],
        prompt: str = "",
        *,
        num_steps: int | None = None,
        seed: int = 0,
        correction: float = 1.0,
    ) -> Session:
        """Rounds of prediction.

        Args:
            rgb: the picture.
            prompt: what to look for, of a model that reads text.
            num_steps: None: `num_steps` of the model.
            seed: of the noise.
            correction: how strongly corrections push away.

        Raises:
            UserError: an option does not fit.
        """
        guidance = None
        if self.pipe.perception.task.reads_text:
            guidance = self.pipe.perception.guidance(correction=correction)
        return Session(
            self.pipe,
            rgb,
            prompt,
            num_inference_steps=(num_steps or self.num_steps) if self.takes_steps else None,
            processing_resolution=self.resolution,
            seed=seed,
            guidance=guidance,
        )

    def sizes(self, shown: tuple[int, int]) -> list[tuple[int, int]]:
        """Sizes of pictures for which the programs are compiled that most others will share.

        Args:
            shown: (height, width) of the examples; the others are lying, upright and square.
        """
        trained = self.pipe.description.resolution or (480, 640)
        long, short = max(trained), min(trained)
        # A square of the training still says nothing of the pictures that will come.
        short = short if short < long else round(0.75 * long)
        wanted = [shown, (short, long), (long, short), (long, long)]
        network_size = self.pipe.network_size
        first = {network_size(size, self.resolution): size for size in reversed(wanted)}
        return [size for size in wanted if size in first.values()]


def open_models(
    checkpoints: Sequence[str],
    num_steps: int | None = None,
    resolution: int | None = None,
    **opening: Any,
) -> list[Model]:
    """Open checkpoints for the page, each on one device.

    Args:
        checkpoints: as for `PerceptionPipeline.from_pretrained`.
        num_steps: instead of the models' own, for those that take several.
        resolution: the long side in pixels the networks work at; None: the models' own.
        opening: further arguments of `from_pretrained`.

    Raises:
        UserError: one cannot be opened, or two are the same.
    """
    if len(set(checkpoints)) < len(checkpoints):
        raise UserError("--checkpoint names the same model twice: name each once.")
    models = []
    for checkpoint in checkpoints:
        pipe = PerceptionPipeline.from_pretrained(
            checkpoint, mesh=_one_device(), pad_multiple=None, **opening
        )
        recipe = pipe.perception.recipe
        steps = recipe.num_steps if recipe.timesteps is not None else num_steps or recipe.num_steps
        check_options(pipe.perception, Options(num_steps=steps))
        pipe.network_size((64, 64), resolution)  # raises where it does not fit
        # A generalist is as many models as it has tasks.
        parts = {name: pipe.part(name) for name in pipe.perception.task.parts}
        for task, part in (parts or {pipe.perception.task.name: pipe}).items():
            label = task if len(checkpoints) == 1 else f"{task} ({checkpoint})"
            models.append(Model(label, part, steps, resolution))
    return models


def warm_up(model: Model, shown: tuple[int, int]) -> Iterator[str]:
    """Compile what rounds need; yields what is being done.

    Args:
        shown: (height, width) of the examples.
    """
    sizes = model.sizes(shown)
    for number, (height, width) in enumerate(sizes, start=1):
        yield f"compiling {model.label} for {width}x{height} ({number} of {len(sizes)})"
        start = time.perf_counter()
        image = np.zeros((height, width, 3), np.uint8)
        prompt = "a thing" if model.reads_text else ""
        session = model.session(image, prompt, num_steps=min(model.num_steps, 2))
        for unwanted in ("", "another thing") if model.reads_text else ("",):
            for glimpse in session.watch(unwanted):
                glimpse.prediction()
        yield f"compiled in {time.perf_counter() - start:.0f} s"


def _one_device() -> Mesh:
    devices = np.asarray(jax.local_devices()[:1]).reshape(1, 1, 1)
    return Mesh(devices, ("data", "fsdp", "tensor"))
