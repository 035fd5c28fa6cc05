"""What the user gave and cannot be used enters; a one-line message leaves."""


class InputError(ValueError):
    """Bad user input: one line naming the file, line, key or tensor, what was found and expected, and what to do."""


INTERRUPTED = 130
"""Exit code after Ctrl-C."""
