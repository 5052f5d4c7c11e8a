"""Files that processes and users share: whose they are, whether they are whole, and how they are replaced.

A library runs in the process that loads it, so one is loaded from a default place only where nobody but the user and
root could have put it there (:func:`distrust`). What the user names is trusted as named.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import stat
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_TIMEOUT = 1800.0


class LockError(RuntimeError):
    """A lock could not be had; the message says why."""


def distrust(path: Path) -> str | None:
    """Why ``path`` (a file, or a folder) may be another user's doing, or None: it must belong to this user or to root,
    a link to it too, and nobody else may write to it."""
    for look in (os.lstat, os.stat):
        try:
            found = look(path)
        except OSError as error:
            return f"{path} cannot be looked at: {error}"
        if found.st_uid not in (os.getuid(), 0):
            return f"{path} belongs to {_user(found.st_uid)}"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(found.st_mode):
            return f"{path} may be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def private_folder(path: Path) -> None:
    """Make the folder ``path`` for this user alone; one of the user's own that others may write to is closed to them.

    Raises:
        OSError: it cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.lstat(path)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and found.st_mode & 0o022:
        os.chmod(path, stat.S_IMODE(found.st_mode) & ~0o022)


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"


def is_whole_library(path: Path) -> bool:
    """Whether ``path`` is an ELF file as long as its header says: a copy that was cut short is not."""
    try:
        with path.open("rb") as file:
            header = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":  # 64 bits; the section table stands at the file's end
        return False
    (offset,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, count = struct.unpack_from("<HH", header, 0x3A)
    return size >= offset + entry_size * count


def replace_by_copy(source: Path, target: Path) -> None:
    """Copy ``source`` to ``target`` in one step: a process that has the old file mapped keeps the old one."""
    with _draft(target) as draft:
        shutil.copyfile(source, draft)


def replace_by_text(target: Path, text: str) -> None:
    """Write ``text`` to ``target`` whole or not at all, whoever else writes it at the same time."""
    with _draft(target) as draft:
        draft.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A file of this thread's beside ``target`` that takes its place in the end; on an error, such as a full disk, it
    goes."""
    draft = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        yield draft
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, timeout: float = LOCK_TIMEOUT) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (released by the system if the process dies); bounded wait.

    Whoever can read the lock's file can hold it, whichever user made it.

    Raises:
        LockError: it cannot be opened or locked, or another process has held it all the time.
    """
    try:
        descriptor = _open_lock(path)
    except OSError as error:
        raise LockError(f"cannot write to the cache folder {path.parent}: {error}. Set ARFUSION_CACHE_DIR.") from error
    try:
        start, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - start
                if waited > timeout:
                    raise LockError(
                        f"another process has held {path} for {waited:.0f} s. If none is building, remove that file."
                    ) from None
                if waited > 5 and not told:
                    print("arfusion: another process is building the kernels, waiting for it", file=sys.stderr)
                    told = True
                time.sleep(0.05)
            except OSError as error:  # a file system without locks
                raise LockError(
                    f"{path} cannot be locked: {error}. Set ARFUSION_CACHE_DIR to a folder on a local disk."
                ) from error
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's, in a folder that both use: a lock asks for no right to write
        return os.open(path, os.O_RDONLY)
