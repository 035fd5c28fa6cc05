"""What the user gave and cannot be used enters, or the wish that a run ends; a one-line message leaves."""


class InputError(ValueError):
    """Bad user input: one line naming the file, line, key or tensor, what was found and expected, and what to do."""


PREEMPTED = 75
"""Exit code of a run that SIGTERM stopped, and that saved: run the same command again to go on (EX_TEMPFAIL)."""

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class Stopped(SystemExit):
    """A run was told to stop, and has saved. code: the process's exit code. where: how far its work had come."""

    def __init__(self, code: int, where: str = ""):
        super().__init__(code)
        self.where = where
