"""Exit statuses of the command line."""

DONE = 0
FAILED = 1
"""A job of a sweep raised what it should not have."""
USER_ERROR = 2
"""Something that was given cannot be used, as one line on standard error says."""
INTERRUPTED = 130
"""By Ctrl-C; any other signal has 128 and its number."""
