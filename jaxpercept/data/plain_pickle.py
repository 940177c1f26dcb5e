"""Reading pickles that hold plain data and nothing else.

A pickle is a program: loading one from elsewhere can run anything. It can do so only through the
names that it imports, so none are given to it.
"""

import os
import pickle
from typing import Any, NoReturn

from jaxpercept.errors import UserError


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings and numbers; whatever would import a name is refused."""

    def __init__(self, file: Any, path: str):
        # Python 2 wrote its strings as bytes.
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> NoReturn:
        self._refuse(f"would import {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        self._refuse("refers to objects outside of itself")

    def _refuse(self, deed: str) -> NoReturn:
        raise UserError(
            f"{self._path} {deed}, which plain data never does: it may be made to run commands; "
            "get the file anew from its publisher."
        )


def load_plain(path: str | os.PathLike) -> Any:
    """The containers, strings and numbers of a pickle, also of Python 2.

    Raises:
      UserError: the file cannot be read, is damaged, or holds anything else; nothing of it is run.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, str(path)).load()
    except UserError:
        raise
    except Exception as error:  # damaged pickles raise almost anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"Cannot read {path} as a pickle of plain data ({reason}); get the file anew."
        ) from error
