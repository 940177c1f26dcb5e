"""The commands, called in this process as the shell would."""

import logging as python_logging

import pytest
from absl import logging

from jaxpercept import cli


@pytest.fixture
def restore_logging():
    """A command sets up logging for the whole process."""
    handler = logging.get_absl_handler()
    root = python_logging.getLogger()
    before = logging.get_verbosity(), handler.formatter, list(handler.filters), list(root.handlers)
    yield
    logging.set_verbosity(before[0])
    handler.setFormatter(before[1])
    handler.filters[:], root.handlers[:] = before[2], before[3]


def door(module, *arguments: str, main=None) -> int:
    """Run a command as the shell would, in this process; with `main`, that after its flags."""
    module.FLAGS.unparse_flags()
    # Overrides of another call's config stay defined, and cannot be defined again.
    for name in [name for name in module.FLAGS if name.startswith("config.")]:
        delattr(module.FLAGS, name)
    argv = [module.__name__, *arguments]
    return cli.call(main or module.main, argv, required=module.REQUIRED, flag_values=module.FLAGS)
