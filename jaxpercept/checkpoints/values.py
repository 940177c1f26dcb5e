"""What the values in a checkpoint's small JSON files may be, checked where they are read.

A file from elsewhere may say anything: text where a number belongs, NaN, 10^12 timesteps. Types and
bounds are checked here, so that nothing later allocates by such a number or fails far away from its
file. What the values mean is for the schedule, the families and the tasks to judge.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxpercept.errors import UserError

_MAX_TIMESTEPS = 100_000
_MAX_PIXELS = 2**14
_MAX_NAME, _MAX_TEXT = 300, 4096
_MAX_POLICY = 2**20  # a table may have a number for every timestep
_MAX_NUMBER = 1e30


class _Kind(NamedTuple):
    words: str
    fits: Callable[[Any], bool]


def _integer(low: int, high: int) -> _Kind:
    return _Kind(
        f"an integer of {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,  # True is no number
    )


def _number(low: float = -1e9, high: float = 1e9) -> _Kind:
    return _Kind(
        f"a number of {low:g} to {high:g}",
        lambda value: type(value) in (int, float) and low <= value <= high,  # NaN is not
    )


def _either(*values: str) -> _Kind:
    return _Kind(
        f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values
    )


def _list_of(kind: _Kind, length: int | None = None) -> _Kind:
    """A list that is not empty, of that length if one is given."""
    return _Kind(
        f"a list of {length or 'some'} values, each {kind.words}",
        lambda value: (
            isinstance(value, list)
            and (len(value) == length if length else len(value) > 0)
            and all(map(kind.fits, value))
        ),
    )


def _object_of(kind: _Kind) -> _Kind:
    return _Kind(
        f"an object of which each value is {kind.words}",
        lambda value: isinstance(value, dict) and all(map(kind.fits, value.values())),
    )


def _or_null(kind: _Kind) -> _Kind:
    return _Kind(f"{kind.words}, or null", lambda value: value is None or kind.fits(value))


def _compiles(expression: Any) -> bool:
    try:
        return isinstance(expression, str) and re.compile(expression) is not None
    except (re.error, RecursionError, OverflowError):
        return False


_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
_NAME = _Kind(
    "a name of letters, digits and underscores",
    lambda value: (
        isinstance(value, str)
        and len(value) <= _MAX_NAME
        and re.fullmatch(r"\w*", value) is not None
    ),
)
_TEXT = _Kind(
    f"a text of at most {_MAX_TEXT} characters",
    lambda value: isinstance(value, str) and len(value) <= _MAX_TEXT,
)
_POLICY = _Kind(
    f"a timestep policy of at most {_MAX_POLICY} characters that is in no file",
    lambda value: (
        isinstance(value, str) and len(value) <= _MAX_POLICY and not value.startswith("file:")
    ),
)
_OPTION = _Kind(
    f"true or false, {_number().words}, or {_NAME.words}",
    lambda value: _FLAG.fits(value) or _number().fits(value) or _NAME.fits(value),
)

_SCHEDULER = {
    "_class_name": _NAME,
    "num_train_timesteps": _integer(1, _MAX_TIMESTEPS),
    "beta_start": _number(0.0, 1.0),
    "beta_end": _number(0.0, 1.0),
    "beta_schedule": _NAME,
    "trained_betas": _or_null(_list_of(_number(0.0, 1.0))),
    "prediction_type": _NAME,
    "timestep_spacing": _NAME,
    "steps_offset": _integer(0, _MAX_TIMESTEPS),
    "set_alpha_to_one": _FLAG,
    "rescale_betas_zero_snr": _FLAG,
    "clip_sample": _FLAG,
    "clip_sample_range": _number(0.0),
    "variance_type": _or_null(_NAME),
    "original_inference_steps": _or_null(_integer(1, _MAX_TIMESTEPS)),
    "timestep_scaling": _or_null(_number()),
}
_MODEL_INDEX = {
    "prediction_type": _or_null(_NAME),
    "default_denoising_steps": _or_null(_integer(1, _MAX_TIMESTEPS)),
    "default_processing_resolution": _or_null(_integer(0, _MAX_PIXELS)),
    "scale_invariant": _or_null(_FLAG),
    "shift_invariant": _or_null(_FLAG),
    "use_full_z_range": _or_null(_FLAG),
    "genpercept_pipeline": _or_null(_FLAG),
    "target_properties": _or_null(_OBJECT),
}
_TARGET = {
    "prediction_space": _or_null(_NAME),
    "sub_target_names": _or_null(_list_of(_or_null(_NAME))),
    "up_to_scale": _or_null(_FLAG),
}
_METHOD = {
    "name": _NAME,
    "timesteps": _POLICY,
    "timestep_use": _NAME,
    "stratified": _FLAG,
    "inference_timestep": _integer(0, _MAX_TIMESTEPS),
    "decoder": _either("vae", "dpt", "tiny"),
    "pixel_weights": _object_of(_number()),
    **dict.fromkeys(("latent_weight", "teacher_weight"), _number()),
    "num_steps": _integer(1, _MAX_TIMESTEPS),
    **dict.fromkeys(("drop_text", "drop_image", "drop_both"), _number(0.0, 1.0)),
    **dict.fromkeys(("text_guidance", "image_guidance"), _number(0.0)),
    **dict.fromkeys(("noise_strength", "corruption_strength"), _number()),
}
_RECIPE = {
    "family": _NAME,
    "num_steps": _integer(1, _MAX_TIMESTEPS),
    "timesteps": _or_null(_list_of(_integer(0, _MAX_TIMESTEPS))),
    "head": _either("vae", "dpt"),
}
_CONFIG = {
    "prompt": _Kind("a text", lambda value: isinstance(value, str)),
    "trainable": _list_of(_Kind("a regular expression", _compiles)),
}
_DESCRIPTION = {
    "components": _object_of(_OBJECT),
    "scheduler": _OBJECT,
    "method": _OBJECT,
    "recipe": _OBJECT,
    "task": _NAME,
    "task_options": _object_of(_OPTION),
    "model_index": _OBJECT,
    "resolution": _or_null(_list_of(_integer(1, _MAX_PIXELS), 2)),
    "base_checkpoint": _TEXT,
    "config": _OBJECT,
    "lora": _OBJECT,
}


def check_scheduler(content: Mapping[str, Any], where: str | Path) -> None:
    """Raises a UserError where a scheduler_config.json holds a value that no schedule can have."""
    _check(content, _SCHEDULER, where)


def check_model_index(content: Mapping[str, Any], where: str | Path) -> None:
    """Raises a UserError where a model_index.json says something of itself that cannot be.

    Which class each component has is not looked at: config.json decides, and no code is imported.
    """
    class_name = content.get("_class_name", "")
    if not _NAME.fits(class_name):
        # As a list it names a module within the folder.
        raise UserError(
            f"{where} names {in_short(repr(class_name))} as its pipeline, which is no class of a "
            "library; no code of a checkpoint is run: name diffusers' class there."
        )
    _check(content, _MODEL_INDEX, where)
    targets = content.get("target_properties") or {}
    names = {"target_names": _or_null(_list_of(_NAME))}
    _check(targets, names, where)
    for name in {*(targets.get("target_names") or ()), *targets} - {"target_names"}:
        if not isinstance(own := targets.get(name, {}), dict):
            raise _error(name, own, "an object", where)
        _check(own, _TARGET, where)


def check_description(content: Mapping[str, Any], where: str | Path) -> None:
    """Raises a UserError where a jaxpercept.json is incomplete or holds what cannot be."""
    missing = [key for key in ("components", "scheduler", "resolution") if key not in content]
    if missing:
        raise UserError(f"{where} is incomplete ({missing[0]!r}): restore it or train anew.")
    _check(content, _DESCRIPTION, where, closed=True)
    check_scheduler(content["scheduler"], where)
    check_model_index(content.get("model_index", {}), where)
    _check(content.get("method", {}), _METHOD, where)
    _check(content.get("config", {}), _CONFIG, where)
    recipe = content.get("recipe", {})
    _check(recipe, _RECIPE, where, closed=True)
    if recipe and "family" not in recipe:
        raise UserError(f"{where} has a recipe of no family: restore it or train anew.")


def check_numbers(content: Any, where: str | Path) -> None:
    """Raises a UserError where a number in the content of a JSON file is not finite, or absurd."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            check_numbers(value, where)
    elif isinstance(content, int | float) and not -_MAX_NUMBER <= content <= _MAX_NUMBER:
        raise UserError(
            f"{where} holds the number {in_short(repr(content), 30)}, which no network has: "
            "correct it, or download the file again."
        )


def in_short(text: Any, limit: int = 200) -> str:
    """On one line, without control characters, of a bounded length: for error messages."""
    text = str(text)[: 4 * limit]
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def listed(names: Iterable[str], limit: int = 10) -> str:
    """How many names, and the first of them."""
    names = sorted(names)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return f"({len(names)}): {', '.join(in_short(name) for name in names[:limit])}{more}"


def _check(
    content: Mapping[str, Any], kinds: Mapping[str, _Kind], where: str | Path, closed: bool = False
) -> None:
    """closed: whether other keys are errors."""
    for key, value in content.items():
        if key in kinds:
            if not kinds[key].fits(value):
                raise _error(key, value, kinds[key].words, where)
        elif closed:
            raise UserError(
                f"{where} has the key {in_short(repr(key))}, which this jaxpercept does not know: "
                "update jaxpercept, or restore the file."
            )


def _error(key: str, value: Any, words: str, where: str | Path) -> UserError:
    return UserError(
        f"{where} has {in_short(key)}={in_short(repr(value))}, which is not {words}: correct it, "
        "or download the file again."
    )
