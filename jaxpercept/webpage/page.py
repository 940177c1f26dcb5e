"""The page itself, in Gradio: what lies where, and which of the visitor's acts does what."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from absl import logging

from jaxpercept.errors import UserError
from jaxpercept.webpage.drawing import enlarged, scale_of
from jaxpercept.webpage.examples import Scene, furnished_scenes, referring_scenes
from jaxpercept.webpage.models import Model
from jaxpercept.webpage.uploads import Limits, read_upload
from jaxpercept.webpage.visit import Shown, Visit

CSS = """
.gradio-container {max-width: 1080px !important; margin: auto;}
#intro {margin-top: -12px;}
#intro p {color: var(--neutral-500);}
#image button, #image .image-frame, #result button, #result .image-frame {width: 100%;}
#image img, #result img {width: 100%; height: auto; max-height: 460px; object-fit: contain;}
#result {min-height: 300px;}
#result img {cursor: crosshair;}
#status p {margin: 0; min-height: 1.5em;}
#status p.wrong {color: #c2410c; font-weight: 600;}
#ask, #amend {align-items: stretch;}
.thumbnail-item {aspect-ratio: auto !important; height: auto !important; display: block;}
#examples img, #rounds img {aspect-ratio: 4 / 3; height: auto;}
.thumbnail-item .caption-label {
    position: static; min-height: 42px; max-width: 100%; padding: 2px 6px; white-space: normal;
    text-align: left; border-radius: 0; border-width: 1px 0 0 0;
}
#rounds .grid-container {padding-top: 24px;}
footer {display: none !important;}
"""
_INTRO = {
    True: "Drop an image, say what to look for, and correct what was found: click on what is "
    "wrong, or put it into words.",
    False: "Drop an image, or choose an example.",
}
_HOUR = 3600
_MODEL = "model"  # whoever predicts waits for the others
Updates = dict[Any, Any]


class Page:
    """The page of some models.

    Args:
        models: at least one; the first is shown first.
        limits: of uploads.
    """

    def __init__(self, models: Sequence[Model], limits: Limits):
        self._models, self._limits = {model.label: model for model in models}, limits
        texts = {model.reads_text for model in models}
        self._scenes = {True: referring_scenes() if True in texts else []}
        self._scenes[False] = furnished_scenes() if False in texts else []
        # What is kept of visitors who closed the page goes after an hour, and their files too.
        self.blocks = gr.Blocks(
            title="jaxpercept", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)
        )
        with self.blocks:
            self._lay_out(models[0])
            self._connect()
        self.blocks.queue(max_size=32, default_concurrency_limit=4)

    # ---- what lies where -------------------------------------------------------------------------

    def _lay_out(self, first: Model) -> None:
        several = len(self._models) > 1
        self._visit = gr.State(None, time_to_live=_HOUR, delete_callback=_close)
        gr.Markdown("# jaxpercept")
        self._intro = gr.Markdown(_INTRO[first.reads_text], elem_id="intro")
        self._choice = gr.Radio(
            list(self._models), value=first.label, label="Model", visible=several, elem_id="model"
        )
        with gr.Row():
            with gr.Column(min_width=320):
                self._drop = gr.File(label="Image", show_label=False, height=130, elem_id="drop")
                self._image = gr.Image(
                    label="Image",
                    interactive=False,
                    show_label=False,
                    buttons=[],
                    visible=False,
                    format="jpeg",
                    elem_id="image",
                )
                self._examples = gr.Gallery(
                    self._thumbnails(first),
                    label="Examples",
                    show_label=False,
                    columns=3,
                    height="auto",
                    object_fit="cover",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                )
            with gr.Column(min_width=320):
                with gr.Row(elem_id="ask"):
                    self._phrase = gr.Textbox(
                        label="What to look for",
                        placeholder="What to look for: the chair on the left",
                        container=False,
                        scale=4,
                        visible=first.reads_text,
                        elem_id="phrase",
                    )
                    self._find = gr.Button(
                        _verb(first), variant="primary", scale=1, min_width=90, elem_id="find"
                    )
                self._result = gr.Image(
                    label="Prediction",
                    interactive=False,
                    show_label=False,
                    buttons=[],
                    format="jpeg",
                    elem_id="result",
                )
                self._status = gr.HTML(said(""), elem_id="status")
                with gr.Row(visible=False, elem_id="amend") as self._correction:
                    self._unwanted = gr.Textbox(
                        label="It is not",
                        placeholder="It is not: the box on the left",
                        container=False,
                        scale=4,
                        elem_id="unwanted",
                    )
                    self._correct = gr.Button("Correct", scale=1, min_width=90, elem_id="correct")
                with gr.Accordion("Settings", open=False, visible=self._has_settings()):
                    self._settings(first)
        with gr.Column(visible=False) as self._kept:
            self._rounds = gr.Gallery(
                label="Rounds",
                columns=3,
                fit_columns=False,
                height="auto",
                object_fit="contain",
                allow_preview=False,
                interactive=False,
                buttons=[],
                format="jpeg",
                elem_id="rounds",
            )
            with gr.Row():
                self._maps = gr.DownloadButton("Maps (.zip)", size="sm", elem_id="maps")
                self._log = gr.DownloadButton("Log (.jsonl)", size="sm", elem_id="log")

    def _has_settings(self) -> bool:
        return any(m.takes_steps or m.reads_text for m in self._models.values())

    def _settings(self, first: Model) -> None:
        self._steps = gr.Slider(
            1, 100, first.num_steps, step=1, label="Steps", visible=first.takes_steps
        )
        self._strength = gr.Slider(
            0, 8, 1, step=0.5, label="Strength of corrections", visible=first.reads_text
        )
        self._seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)

    def _thumbnails(self, model: Model) -> list[tuple[Any, str]]:
        return [(scene.rgb, scene.phrase) for scene in self._scenes[model.reads_text]]

    # ---- which act does what ---------------------------------------------------------------------

    def _connect(self) -> None:
        whole = [*self._outputs(), self._phrase, self._choice]
        settings = [self._steps, self._strength, self._seed]
        told = [self._visit, self._choice, self._phrase, *settings]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        work = {**quiet, "concurrency_id": _MODEL, "concurrency_limit": 1}
        arrived = self._drop.upload(self._take_file, [self._drop, self._visit], whole, **quiet)
        chosen = self._examples.select(
            self._take_scene, [self._visit, self._choice, self._phrase], whole, **quiet
        )
        changed = self._choice.change(
            self._change_model,
            [self._choice, self._visit],
            [*whole, self._intro, self._examples, self._find, self._steps, self._strength],
            **quiet,
        )
        gr.on([self._find.click, self._phrase.submit], self._look, told, whole, **work)
        # Pictures that need no words are predicted at once; so are the examples, which have some.
        for event, examples in ((arrived, False), (changed, False), (chosen, True)):
            then = self._look if examples else self._look_without_words
            event.then(then, told, whole, **work)
        corrected = [self._visit, self._unwanted]
        gr.on([self._correct.click, self._unwanted.submit], self._amend, corrected, whole, **work)
        self._result.select(self._click, [self._visit], whole, **quiet)

    def _outputs(self) -> list[Any]:
        return [
            *(self._visit, self._drop, self._image, self._result, self._status),
            *(self._correction, self._unwanted, self._kept, self._rounds, self._maps, self._log),
        ]

    def _take_file(self, path: str | None, visit: Visit | None) -> Updates:
        visit = visit or Visit()
        if path is None:
            return {self._visit: visit}
        updates = {self._visit: visit, self._drop: None}
        try:
            message = visit.show(read_upload(path, self._limits))
        except UserError as error:
            return {**updates, self._status: said(str(error), wrong=True)}
        return {**updates, **self._fresh(visit), self._status: said(message)}

    def _take_scene(
        self, visit: Visit | None, label: str, phrase: str, event: gr.SelectData
    ) -> Updates:
        visit, model = visit or Visit(), self._models[label]
        scene: Scene = self._scenes[model.reads_text][event.index]
        visit.show_scene(scene)
        return {
            self._visit: visit,
            **self._fresh(visit),
            self._status: said(""),
            self._phrase: scene.phrase or phrase,
        }

    def _change_model(self, label: str, visit: Visit | None) -> Updates:
        model, visit = self._models[label], visit or Visit()
        if visit.picture is not None:
            visit.show(visit.picture)
        return {
            self._visit: visit,
            **self._fresh(visit),
            self._status: said(""),
            self._intro: _INTRO[model.reads_text],
            self._examples: self._thumbnails(model),
            self._find: _verb(model),
            self._phrase: gr.update(visible=model.reads_text),
            self._steps: gr.update(visible=model.takes_steps, value=model.num_steps),
            self._strength: gr.update(visible=model.reads_text),
        }

    def _fresh(self, visit: Visit) -> Updates:
        """A picture without a prediction."""
        rgb = None if visit.picture is None else visit.picture.rgb
        return {
            self._image: gr.update(value=rgb, visible=rgb is not None),
            self._result: None,
            self._correction: gr.update(visible=False),
            self._unwanted: "",
            self._kept: gr.update(visible=False),
        }

    def _look_without_words(
        self, visit: Visit | None, label: str, *settings: Any
    ) -> Iterator[Updates]:
        if not self._models[label].reads_text and visit is not None and visit.picture is not None:
            yield from self._look(visit, label, *settings)
        else:
            yield {self._visit: visit}

    def _look(
        self,
        visit: Visit | None,
        label: str,
        phrase: str,
        steps: float,
        strength: float,
        seed: float,
    ) -> Iterator[Updates]:
        visit, model = visit or Visit(), self._models[label]
        options = {"num_steps": int(steps), "seed": int(seed or 0), "correction": float(strength)}
        yield from self._follow(visit, visit.find(model, phrase or "", **options), model)

    def _amend(self, visit: Visit | None, unwanted: str) -> Iterator[Updates]:
        visit = visit or Visit()
        yield from self._follow(visit, visit.correct(unwanted or ""))

    def _follow(
        self, visit: Visit, steps: Iterator[Shown], model: Model | None = None
    ) -> Iterator[Updates]:
        """What a round shows, and at its end what is kept of it."""
        try:
            for shown in steps:
                updates: Updates = {self._visit: visit, self._status: said(shown.message)}
                if shown.image is not None:
                    updates[self._result] = enlarged(shown.image, scale_of(shown.image))
                if shown.done:
                    updates |= self._keep(visit)
                    if model is not None:
                        updates[self._correction] = gr.update(visible=model.reads_text)
                yield updates
        except UserError as error:
            yield {self._visit: visit, self._status: said(str(error), wrong=True)}
        except Exception:
            logging.exception("a prediction for the page failed")
            text = "Something went wrong; the terminal that serves this page says what."
            yield {self._visit: visit, self._status: said(text, wrong=True)}

    def _keep(self, visit: Visit) -> Updates:
        maps, log = visit.files()
        return {
            self._unwanted: "",
            self._kept: gr.update(visible=True),
            self._rounds: visit.gallery(),
            self._maps: str(maps),
            self._log: str(log),
        }

    def _click(self, visit: Visit | None, event: gr.SelectData) -> Updates:
        visit = visit or Visit()
        try:
            scale = visit.scale
            x, y = (int(place / scale) for place in event.index)
            shown = visit.click(x, y)
        except UserError as error:
            return {self._visit: visit, self._status: said(str(error), wrong=True)}
        updates: Updates = {
            self._result: enlarged(shown.image, scale),
            self._status: said(shown.message),
        }
        if shown.suggestion is not None:
            updates[self._unwanted] = shown.suggestion
        return updates


def said(message: str, *, wrong: bool = False) -> str:
    """A sentence for the line below the picture."""
    kind = ' class="wrong"' if wrong else ""
    return f'<p role="status"{kind}>{html.escape(message)}</p>'


def _verb(model: Model) -> str:
    return "Find" if model.reads_text else "Predict"


def _close(visit: Visit | None) -> None:
    if visit is not None:
        visit.close()
