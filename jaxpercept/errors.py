"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input: one sentence that names the thing and the remedy.

    The commands print it as a single line and exit with status 1; everything else is a bug and
    keeps its traceback.
    """
