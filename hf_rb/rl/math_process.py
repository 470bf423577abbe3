"""Asks `math-verify`, in a process of its own: a power such as 9^9^9^9 holds the interpreter, and no thread or signal
can stop it.

The process starts with the first question, serves all threads one after the other, and is ended and started anew when
an answer takes too long. It is a plain script on pipes, so it starts the same on every platform and imports nothing of
the caller. A forked process has its own.
"""

import atexit
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any


__all__ = ["equal", "problem", "read"]

logger = logging.getLogger(__name__)

SECONDS = 5.0
"""What reading one answer may take, and comparing two."""

START_SECONDS = 60.0
MAX_FAILED_STARTS = 3


class _Worker:
    """The process, and what is said to it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process: Any = None  # a `subprocess.Popen[str]` with both pipes, while there is one
        self.failed_starts = 0

    def ask(self, what: str, *answers: str) -> bool | None:
        """Returns the reply, or `None` without one in time. Raises `OSError` if the process cannot be started."""
        request = json.dumps({"what": what, "answers": answers, "seconds": SECONDS}) + "\n"
        with self.lock:
            for _ in range(2):  # again if it ends without being out of time, which somebody else may have done
                if self.process is None or self.process.poll() is not None:
                    self._start()
                reply, in_time = self._say(request, SECONDS)
                if reply or not in_time:
                    break
            return json.loads(reply) if reply else None

    def _start(self) -> None:
        if self.failed_starts == MAX_FAILED_STARTS or not sys.executable:
            raise OSError(f"the process could not be started, in {MAX_FAILED_STARTS} attempts.")
        self.stop()
        self.failed_starts += 1
        script = Path(__file__).with_name("math_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)],  # -P: the script's folder is not searched for modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if self._say("", START_SECONDS)[0] != "ready\n":
            raise OSError(f"the process ended, or took over {START_SECONDS:.0f} s, before math-verify was imported.")
        self.failed_starts = 0

    def _say(self, request: str, seconds: float) -> tuple[str, bool]:
        """Returns the next line, or nothing, and whether there was time left. Without a line or time the process is
        ended.
        """
        process, line, late = self.process, "", threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it has ended
            pass
        finally:
            timer.cancel()
            timer.join()
            if late.is_set() or not line:  # Ctrl-C too: a late reply must not be taken for one to the next question
                self.stop()
        return line, not late.is_set()

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.stdout.close()
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.wait()

    def forget(self) -> None:
        """Leaves the process to the parent, of whom this one is a fork. Closing its pipes here could write to them."""
        self.inherited, self.process, self.lock = self.process, None, threading.Lock()


_worker = _Worker()
atexit.register(_worker.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)


def problem() -> str | None:
    """Returns why the process cannot be started, or `None`. Starts it."""
    try:
        _worker.ask("read", "1")
    except OSError as error:
        return str(error)
    return None


def read(answer: str) -> bool:
    """Returns whether `math-verify` can read an answer, and evaluate it in time."""
    try:
        return _read(answer)
    except OSError as error:
        return _unasked(str(error))


def equal(first: str, second: str) -> bool:
    """Returns whether `math-verify` finds two answers equal, with either of them as the gold one; one that it cannot
    read is not.
    """
    try:
        return _equal(*sorted((first, second)))
    except OSError as error:
        return _unasked(str(error))


# The same answers come again and again, within a group and over a run.
@lru_cache(maxsize=65536)
def _read(answer: str) -> bool:
    return _reply("read", answer)


@lru_cache(maxsize=65536)
def _equal(first: str, second: str) -> bool:
    return _read(first) and _read(second) and _reply("equal", first, second)


def _reply(what: str, *answers: str) -> bool:
    reply = _worker.ask(what, *answers)
    if reply is None:
        shown = " and ".join(repr(answer if len(answer) <= 40 else f"{answer[:40]}…") for answer in answers)
        logger.warning(f"math-verify has no reply after {SECONDS:.0f} s, so different from all others: {shown}"[:200])
    return bool(reply)


@lru_cache(maxsize=8)  # so that a reason is told once
def _unasked(reason: str) -> bool:
    logger.warning(f"Answers are compared as texts and numbers only, without math-verify: {reason}"[:200])
    return False
