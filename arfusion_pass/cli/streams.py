"""What a command is started with: its standard streams, which may be closed or full, and the signals that end it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Commands(click.Group):
    """A group whose commands find all three streams open, and end in one line where they cannot print."""

    def invoke(self, ctx: click.Context) -> Any:
        _open_streams()
        try:
            try:
                return super().invoke(ctx)
            finally:
                if not sys.stdout.closed:
                    sys.stdout.flush()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in buffers goes nowhere at exit
            raise click.ClickException(f"{error.filename or 'stdout'} cannot be written: {error.strerror}") from error


def _open_streams() -> None:
    """Open /dev/null for a stream that was closed by whoever started this (``>&-``): the next file to be opened would
    take its number, and get what is printed. And let a terminal show what it can."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: the stream's
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(null, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):  # tables have rules, and paths any bytes, that a terminal may not encode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit with a shell's status for them, unless they are ignored (nohup) or
    handled here already: what is open is closed, and what was found is printed, during which no second one ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: Any) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    def back() -> None:
        for each in ours:
            if signal.getsignal(each) is stop:
                signal.signal(each, signal.SIG_DFL)

    ours = [each for each in _ENDING if signal.getsignal(each) is signal.SIG_DFL]
    for each in ours:
        signal.signal(each, stop)
    os.register_at_fork(after_in_child=back)  # whoever ends a child of the script's waits until it has ended
    try:
        yield
    finally:
        back()
