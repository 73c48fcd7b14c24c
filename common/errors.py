"""Every way a run can end badly: one class a kind, raised anywhere, turned into an exit code by common/endings.py."""

import signal


class InputError(ValueError):
    """A mistake in what the user gave us. The message is one line: the place, what is wrong, what to do."""


class UsageError(InputError):
    """A command line that cannot be read: a flag that does not exist, a word where a number must be."""


class NumericsError(RuntimeError):
    """A loss, gradient or logit that is not finite, or a first step that is not what the formulas demand.

    row: the number of the row it was found in, None where there is none.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class MemoryFull(RuntimeError):
    """A pass did not fit in memory. The message names its rows, the peak and the flags that help."""


class ServiceError(Exception):
    """A server that did not do its part. The message is one line: which endpoint, what happened, what to do.

    status: the HTTP status behind it, 0 when there was none.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Refused(ServiceError):
    """Asking again would not help: bad key, no credit, unknown model, malformed request."""


class Unanswered(ServiceError):
    """Every attempt failed in a way that may pass: overloaded, broken connection, too slow."""


class CallsStopped(ServiceError):
    """The call was given up because the run is ending."""


class BudgetSpent(ServiceError):
    """The next request could cost more than what is left."""


class AnnotationError(ValueError):
    """A reply that cannot be used. The message says why, in words that can be sent back to the model."""


class Stopped(BaseException):
    """A signal asked the run to end here; `number` is which. Not an Exception: it is for the end of the program."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Disagreement(Exception):
    """Two things that must compute the same do not. One line."""
