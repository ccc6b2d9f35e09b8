"""Errors that the command line turns into one line."""


class OneLine:
    """Jupyter, too, shows one line in place of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class UserError(OneLine, Exception):
    """Invalid input or a failing machine: printed as one line, exit status 2."""


class RecipeFailed(UserError):
    """The recipe diverged or ran out of memory; a sweep records this as an outcome."""


class Stopped(OneLine, KeyboardInterrupt):
    """A signal asked the run to stop; it was saved first. `signal` is the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number
