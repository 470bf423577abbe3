"""The process in which `math-verify` runs; `hf_rb.rl.math_process` starts it as a script, so that nothing of hf_rb or
torch is imported.

A question is a line of JSON: {"what": "read", "answers": [answer], "seconds": 5} asks whether an answer can be read,
{"what": "equal", "answers": [first, second], "seconds": 5} whether two are equal. The reply is a line with true or
false. When the seconds are over, the other side ends this process.
"""

import json
import logging
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast


def main() -> None:
    """Answers until there are no more questions."""
    logging.disable(logging.CRITICAL)  # math-verify logs what it cannot read, in full
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, which goes to the trainer as well
    requests, replies = sys.stdin, sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no reply
    from math_verify import parse, verify

    # None, no limit, is what math-verify documents and does not declare: the time is kept here.
    read_text, compare = cast(Callable[..., Any], parse), cast(Callable[..., Any], verify)
    number = tuple(read_text("$0.5$", parsing_timeout=None))

    @lru_cache(maxsize=4096)
    def parsed(answer: str) -> tuple:
        return tuple(read_text(f"${answer}$", parsing_timeout=None))

    def matches(gold: tuple, answer: tuple) -> bool:
        return bool(compare([*gold], [*answer], timeout_seconds=None))

    def read(answer: str) -> bool:
        found = parsed(answer)
        # What is read but cannot be evaluated, such as 9^9^9^9, shows when it is compared with a number.
        matches(found, number)
        return bool(found)

    def equal(first: str, second: str) -> bool:
        one, other = parsed(first), parsed(second)
        return matches(one, other) or matches(other, one)

    answers = {"read": read, "equal": equal}
    print("ready", file=replies, flush=True)
    for line in requests:
        request = json.loads(line)
        if hasattr(signal, "alarm"):  # ends this process even if nobody is left to do it
            signal.alarm(int(request["seconds"]) + 2)
        try:
            reply = answers[request["what"]](*request["answers"])
        except Exception:  # what a model wrote can break a parser of LaTeX in any way
            reply = False
        print(json.dumps(reply), file=replies, flush=True)
        if hasattr(signal, "alarm"):
            signal.alarm(0)


if __name__ == "__main__":
    main()
