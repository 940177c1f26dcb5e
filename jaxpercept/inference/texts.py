"""What models that look for what a text names are told, as token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from jaxpercept.checkpoints.tokenizer import Tokenize
from jaxpercept.errors import UserError
from jaxpercept.tasks import Task

Texts = str | Sequence[str]
"""One for all images, or one for each."""


def token_ids(
    task: Task, tokenize: Tokenize | None, prompt: Texts, unwanted: Texts, count: int
) -> dict[str, Int32[np.ndarray, "n l"]]:
    """`input_ids`, and `unwanted_ids` where there is anything unwanted, of `count` images.

    Args:
        task: the model's, which may put texts in its own words.
        tokenize: the model's; None where it was opened without.
        prompt: what to look for.
        unwanted: what it is not; "" for nothing.
        count: the number of images.

    Raises:
        UserError: nothing to look for, a number of texts that is not that of the images, or no
            tokenizer.
    """
    if task.needs_prompt and not prompt:
        raise UserError(
            f"this model looks for what a text names ({task.name}): give a prompt, such as 'the "
            "chair on the left'."
        )
    if tokenize is None:
        raise UserError("texts need a tokenizer: open the model with from_pretrained.")
    given = {"input_ids": prompt} | ({"unwanted_ids": unwanted} if unwanted else {})
    ids = {}
    for name, texts in given.items():
        texts = [texts] * count if isinstance(texts, str) else list(texts)
        if len(texts) != count:
            raise UserError(f"{len(texts)} texts were given for {count} images: give as many.")
        ids[name] = np.asarray(tokenize([task.instruction.format(text) for text in texts]))
    return ids
