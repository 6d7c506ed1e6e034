"""The two errors that are the user's to mend: a request that cannot be served, and a command that cannot be run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class RequestError(ValueError):
    """A request that cannot be served.

    Attributes:
        field: the request's field at fault; None if the engine takes no requests at all.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class UsageError(ValueError):
    """A command that cannot be run, or an `LLM` that cannot be opened, as it was given.

    `cli.run` prints it as one line and exits with 2.
    """


@contextlib.contextmanager
def usage_errors(what: str = "") -> Iterator[None]:
    """Turns the ValueError, TypeError or OSError of a user's input into a UsageError.

    Args:
        what: what the error is about, for example `config.engine`; the message begins with it.

    Raises:
        UsageError: in place of a ValueError, TypeError or OSError of the body.
    """
    try:
        yield
    except UsageError:  # says already what it is about
        raise
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"{what}: {error}" if what else error) from error
