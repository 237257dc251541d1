"""Standard output whose failures are one sentence: a disk that is full, a device that is gone."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from slicecli.errors import OutputError

__all__ = ["guard_standard_output"]


def guard_standard_output() -> None:
    """Let whatever cannot be written on standard output be an `OutputError`, but for a pipe that nobody reads."""
    if sys.stdout is not None:
        sys.stdout = _Guarded(sys.stdout)


class _Guarded:
    """A stream in front of another; all that is not about writing is the other's."""

    def __init__(self, stream: Any, failures: list[str] | None = None) -> None:
        self._stream = stream
        self._failures = [] if failures is None else failures  # why it could not be written; it is not tried again

    @functools.cached_property
    def buffer(self) -> _Guarded:
        """The stream of bytes behind a stream of text."""
        return _Guarded(self._stream.buffer, self._failures)

    def write(self, content: Any) -> Any:
        """Write a text, or bytes."""
        with self._explained():
            return self._stream.write(content)

    def writelines(self, lines: Iterable[Any]) -> None:
        """Write some of them."""
        with self._explained():
            self._stream.writelines(lines)

    def flush(self) -> None:
        """Write what is kept back; after an error nothing is."""
        if not self._failures:
            with self._explained():
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        if self._failures:
            raise self._error()
        try:
            yield
        except BrokenPipeError:
            raise  # whoever read it has enough, as `head` has: click ends without a word
        except OSError as error:
            self._failures.append(error.strerror or str(error))
            self._let_go()
            raise self._error() from error

    def _error(self) -> OutputError:
        return OutputError(
            f"Standard output cannot be written: {self._failures[0]}.",
            "Redirect it to a file on a disk with free space, or to another program.",
        )

    def _let_go(self) -> None:
        """Send nowhere what is kept back, which Python would try to write again at its end."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
