"""Fetching only the needed files of a diffusers checkpoint from the Hugging Face hub."""

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from jaxpercept.checkpoints.values import in_short
from jaxpercept.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def fetch(
    repo: str, small_files: Collection[str], weights: Callable[[Collection[str], Path], list[str]]
) -> Path:
    """Downloads a repository's small files, then the weights chosen among its file names.

    Args:
      repo: "owner/name".
      small_files: patterns of the files to fetch in any case (configs, tokenizer, indices).
      weights: `(file names of the repository, folder of the small files) -> files to fetch`.

    Returns:
      The folder in the hub's cache. Without a network it is what an earlier call left there.

    Raises:
      UserError: not a folder, nor a hub id that can be reached and read.
    """
    import huggingface_hub  # imported here: local folders do without it

    def ask(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # the client's errors and its HTTP library's share no base class
            reason = in_short(str(error).strip().partition("\n")[0] or type(error).__name__, 400)
            raise UserError(
                f"{repo} is no local folder and could not be downloaded from the Hugging Face hub "
                f"({reason}); check the name, the network and, for gated models, `hf auth login`."
            ) from None

    if not _HUB_ID.fullmatch(repo):
        raise UserError(
            f"{in_short(repo)} is no folder; give a diffusers folder or a hub id (owner/name)."
        )
    folder = Path(ask(huggingface_hub.snapshot_download, repo, allow_patterns=list(small_files)))
    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=folder.name)
    except Exception:  # offline: what the cache holds is all there is
        return folder
    needed = weights(names, folder)
    if not needed:
        return folder
    return Path(
        ask(huggingface_hub.snapshot_download, repo, revision=folder.name, allow_patterns=needed)
    )
