"""Runs programs in processes of their own, without importing anything twice and without waiting for anything.

A program itself: it imports the modules that it is given, reads one JSON object a line and answers each with an exit
code. What is asked for runs in a fork. What a person would wait for between attempts can be noted
and not waited for, and what cannot be had on demand, such as a disk that is full, is put on.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import importlib
import json
import os
import runpy
import shutil
import sys
import time
import traceback
from pathlib import Path

PIECE = 2000  # bytes that the client takes from a connection at once, in place of 10 MB
ROOM = 20_000  # bytes of each download that go onto a disk before it is full


def small_pieces():
    """Let a download be kept in small pieces, as one of many gigabytes is in pieces of 10 MB."""
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = PIECE


def disk_becomes_full():
    """Let the disk take some bytes of a download and then no more."""
    from huggingface_hub import file_download

    class Full:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, content):
            if self._file.tell() + len(content) > ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(content)

    get = file_download.http_get
    file_download.http_get = lambda url, file, **more: get(url, Full(file), **more)
    small_pieces()


def disk_is_small():
    """Let the disk with the cache say that little is free."""
    usage = shutil.disk_usage

    def little(path):
        in_cache = os.fspath(path).startswith(os.environ["HF_HOME"])
        return usage(path)._replace(free=ROOM) if in_cache else usage(path)

    shutil.disk_usage = little


def cache_cannot_be_written():
    """Let the system refuse every change below HF_HOME, as on a file system that is mounted for reading."""
    home = os.environ["HF_HOME"]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    changed = {
        "os.mkdir": 0,
        "os.rename": 0,
        "os.remove": 0,
        "os.rmdir": 0,
        "os.chmod": 0,
        "os.symlink": 1,
        "os.link": 1,
    }

    def refuse(event, arguments):
        if event in changed:
            path = arguments[changed[event]]
            changes = event != "os.mkdir" or not Path(path).exists()
        elif event == "open":
            path, _mode, flags = arguments
            changes = flags & writing
        else:
            return
        if changes and not isinstance(path, int) and os.fspath(path).startswith(home):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    sys.addaudithook(refuse)


def no_network():
    """Let the system find no way to any other machine."""

    def refuse(event, _arguments):
        if event == "socket.connect":
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    sys.addaudithook(refuse)


CIRCUMSTANCES = {
    one.__name__: one for one in (small_pieces, disk_becomes_full, disk_is_small, cache_cannot_be_written, no_network)
}


def run(wish):
    """Be the program, and end."""
    for number, name in enumerate(("out", "err"), start=1):
        os.dup2(os.open(wish[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(wish["environment"])
    os.chdir(wish["folder"])
    if "waits" in wish:
        waits = os.open(wish["waits"], os.O_WRONLY | os.O_CREAT)
        time.sleep = lambda seconds: os.write(waits, f"{seconds}\n".encode()) and None
    for name in wish["circumstances"]:
        CIRCUMSTANCES[name]()
    kind, what, *words = wish["words"]
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = [kind if kind == "-c" else what, *words]
    code = 1
    try:
        if kind == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without taking apart the packages, which takes a second


def serve():
    """Run what is asked for, one after the other."""
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # so that forks do not copy it all to look through it
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    serve()
    os._exit(0)
