"""The one exception that a user is meant to read."""


class MetapoolError(Exception):
    """A mistake in what the user gave: a file, a field, a value.

    The message names the culprit and says what would be right. The command line prints it without a traceback.
    """
