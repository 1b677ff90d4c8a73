"""The one exception that a user's input may cause."""


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one line: it names the thing, its value and what to do. The command line
    prints it and exits with status 2; no traceback follows.
    """
