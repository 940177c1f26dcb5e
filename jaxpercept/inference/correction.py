"""Correctional prompts: telling a model what it took for the thing it was asked for.

ADDP's workflow (arXiv 2504.11457, figures 1 and 2): predict what the prompt names; ask a person or
a foundation model what might be confused with it; predict again, guided away from that
(`diffusion.guidance`). A correction goes on from a latent half way, so that it costs a part of the
steps. The number of rounds, the step to go on from and the guidance are not published.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from jaxpercept.checkpoints.weights import read_json
from jaxpercept.diffusion.guidance import Guidance
from jaxpercept.errors import UserError
from jaxpercept.inference.pipeline import PerceptionPipeline
from jaxpercept.inference.stepwise import Glimpse

QUESTION = "This is an image of {caption}. What might confuse the segmentation of {prompt}?"
"""ADDP's, from its figure 1."""


@dataclasses.dataclass(frozen=True)
class Round:
    """One prediction.

    Attributes:
        number: 0 for the first, without correction.
        prompt: what was looked for.
        unwanted: all corrections so far.
        prediction: the task's map.
        steps: denoising steps it took.
        seconds: time it took, compilation included.
    """

    number: int
    prompt: str
    unwanted: tuple[str, ...]
    prediction: Float[np.ndarray, "h w c"]
    steps: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """All but the map, for a log."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        facts["foreground"] = float((facts.pop("prediction") > 0.5).mean())
        return facts


@runtime_checkable
class Corrector(Protocol):
    """Whoever says what is wrong."""

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], rounds: Sequence[Round]) -> str:
        """What the last prediction shows that its prompt does not name; "" if it is right."""


class Person:
    """Asks at the terminal.

    Args:
        ask: shows a question and returns the answer.
    """

    def __init__(self, ask: Callable[[str], str] = input):
        self._ask = ask

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], rounds: Sequence[Round]) -> str:
        last = rounds[-1]
        return self._ask(
            f"Round {last.number}: what is not {last.prompt!r}, but was marked? (Enter: it is "
            "right) "
        ).strip()


class Script:
    """Says what it was given, one thing a round, whatever is predicted."""

    def __init__(self, texts: Sequence[str]):
        self._texts = tuple(texts)

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], rounds: Sequence[Round]) -> str:
        done = len(rounds) - 1
        return self._texts[done] if done < len(self._texts) else ""


class Questions:
    """Asks a foundation model the paper's question.

    Args:
        answer: `(question, image) -> text`, such as a call of a vision-language model, or of a
            language model that ignores the image. Empty: nothing is confused.
        caption: `image -> text` of a captioner; None asks of "a scene".
    """

    def __init__(
        self,
        answer: Callable[[str, UInt8[np.ndarray, "h w 3"]], str],
        caption: Callable[[UInt8[np.ndarray, "h w 3"]], str] | None = None,
    ):
        self._answer, self._caption = answer, caption

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], rounds: Sequence[Round]) -> str:
        caption = "a scene" if self._caption is None else self._caption(image)
        question = QUESTION.format(caption=caption, prompt=rounds[-1].prompt)
        return self._answer(question, image).strip()


def read_scripts(path: str | Path) -> dict[str, Script]:
    """Correctors from a JSON file: `{image name: [what it is not, round by round]}`.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    content: Mapping[str, Any] = read_json(Path(path))
    for name, texts in content.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{path} gives {name!r} no list of texts: write {{'{name}': ['the other one']}}."
            )
    return {name: Script(texts) for name, texts in content.items()}


class Session:
    """Rounds of prediction and correction for one image and one prompt.

    Args:
        pipe: a model that looks for what a text names; of another one there is only a first round.
        image: one, as for a call of the pipeline.
        prompt: what to look for; "" for a model that looks for nothing.
        resume: the share of the steps that all rounds have in common, in [0, 1); models of one step
            have none. The more of them, the cheaper and the weaker a correction.
        num_inference_steps, processing_resolution, seed, guidance: as for a call.

    Attributes:
        prompt: what is looked for.
        rounds: so far.

    Raises:
        UserError: an option does not fit.
    """

    def __init__(
        self,
        pipe: PerceptionPipeline,
        image: Any,
        prompt: str,
        *,
        resume: float = 0.5,
        num_inference_steps: int | None = None,
        guidance: Guidance | None = None,
        **options: Any,
    ):
        if not 0 <= resume < 1:
            raise UserError(f"resume is {resume}: give a share of the steps from 0 to below 1.")
        self._pipe, self._image, self.prompt = pipe, image, prompt
        self._steps = num_inference_steps or pipe.perception.recipe.num_steps
        self._options = {
            "num_inference_steps": num_inference_steps,
            "guidance": guidance,
            **options,
        }
        self._first = int(resume * self._steps)
        self._latents: np.ndarray | None = None
        self.rounds: list[Round] = []

    def predict(self, unwanted: str = "") -> Round:
        """The next round: the first without, later ones with a correction."""
        start, texts, steps = time.perf_counter(), self._all(unwanted), self._steps - self._first
        if self._first and self._latents is None:
            steps = self._steps
            self._latents = self._pipe.advance(
                self._image, self.prompt, self._first, **self._options
            )
        out = self._pipe(self._image, **self._going_on(texts))
        return self._append(texts, out.prediction, steps, start)

    def watch(self, unwanted: str = "") -> Iterator[Glimpse]:
        """The next round as `predict`, with a glimpse after each step.

        It is one of `rounds` after the last glimpse, and only then.
        """
        start, texts = time.perf_counter(), self._all(unwanted)
        glimpses, steps = self._pipe.watch(self._image, **self._going_on(texts)), 0
        for steps, glimpse in enumerate(glimpses, start=1):
            if glimpse.step == self._first:
                self._latents = glimpse.latents()
            if glimpse.step == glimpse.steps:
                self._append(texts, glimpse.prediction(), steps, start)
            yield glimpse

    def _all(self, unwanted: str) -> tuple[str, ...]:
        before = self.rounds[-1].unwanted if self.rounds else ()
        return (*before, unwanted) if unwanted else before

    def _going_on(self, texts: Sequence[str]) -> dict[str, Any]:
        """What a call is told: from the step on that the rounds have in common, if it is known."""
        told = {**self._options, "prompt": self.prompt, "unwanted": " and ".join(texts)}
        if self._latents is not None:
            told |= {"latents": self._latents, "first_step": self._first}
        return told

    def _append(
        self, texts: tuple[str, ...], prediction: np.ndarray, steps: int, start: float
    ) -> Round:
        seconds, number = time.perf_counter() - start, len(self.rounds)
        prediction = np.concatenate(list(prediction), axis=-1)  # the targets of one image
        self.rounds.append(Round(number, self.prompt, texts, prediction, steps, seconds))
        return self.rounds[-1]

    def run(
        self,
        corrector: Corrector,
        image: UInt8[np.ndarray, "h w 3"],
        rounds: int,
        log: Path | None = None,
    ) -> Iterator[Round]:
        """Predict, and correct until the corrector is content or `rounds` corrections are made.

        Args:
            corrector: says what is wrong.
            image: what it is shown.
            rounds: most corrections.
            log: a file that gets one JSON object a round.
        """
        unwanted = ""
        for _ in range(rounds + 1):
            done = self.predict(unwanted)
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps(done.facts()) + "\n")
            yield done
            unwanted = corrector(image, self.rounds)
            if not unwanted:
                return
