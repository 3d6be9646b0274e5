"""Decides whether two short LaTeX answers mean the same number or expression.

math-verify compares the answers. It stops comparisons that never finish (`9^{9^{9^9}}`) with an
alarm signal. The signal works only in the main thread, and replaces an alarm of the caller. So
here math-verify runs in a process of its own, which is killed when a comparison takes too long,
and any thread can compare. This module doesn't import torch.
"""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import threading
from decimal import Decimal

from drllm.extras import need
from drllm.work.listener import logger

LIMIT_S = 5.0  # maximum seconds for one comparison, math-verify's own default

_PLAIN_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,8})(?:\.[0-9]{1,4})?")
_WORKER = """
import sys
sys.path.pop(0)  # the folder the user happens to be in
import json, logging
logging.disable()
from math_verify import parse, verify
results = sys.stdout
sys.stdout = sys.stderr
print("ready", file=results, flush=True)
for line in sys.stdin:
    gold, answer = (
        parse("\\\\boxed{" + text + "}", parsing_timeout=None) for text in json.loads(line)
    )
    is_equal = bool(verify(gold, answer, timeout_seconds=None))
    print(json.dumps(is_equal), file=results, flush=True)
"""


def parse_plain_number(text: str) -> Decimal | None:
    """Return the value of a number in plain digits; None for any other text."""
    stripped = text.strip()
    return Decimal(stripped) if _PLAIN_NUMBER.fullmatch(stripped) else None


@functools.lru_cache(maxsize=65536)
def have_same_value(gold: str, answer: str) -> bool:
    r"""Tell whether an answer means the same as the gold answer.

    Both are LaTeX or plain text, without `\boxed`. Plain numbers are compared here, and everything
    else by math-verify. The result is False if math-verify takes more than `LIMIT_S` seconds.
    """
    gold_number = parse_plain_number(gold)
    answer_number = parse_plain_number(answer)
    if gold_number is not None and answer_number is not None:
        return gold_number == answer_number
    return _comparer.compare(gold, answer)


class _Comparer:
    """Compares answers in a process of its own, the worker.

    The worker is started on first use, and again after a time-out, a fork or its death.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the worker makes one comparison at a time
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # id of the process that started the worker

    def compare(self, gold: str, answer: str) -> bool:
        """Tell whether two answers are equal; a comparison without a result counts as unequal."""
        with self._lock:
            result = self._ask(json.dumps([gold, answer]))
        if not result:
            logger.warning("comparing %r with %r gave no answer: counted as wrong", answer, gold)
            return False
        return bool(json.loads(result))

    def _ask(self, line: str) -> str:
        """Send a line to the worker and return its answer; empty if there is none.

        A worker that was killed since the last comparison is started again, once.
        """
        for _ in range(2):
            process = self._start()
            try:
                return self._exchange(process, line)
            except OSError:  # nobody reads the line
                self.end()
        return ""

    def _exchange(self, process: subprocess.Popen[str], line: str) -> str:
        """Send a line and return the answer; end the worker if the answer takes too long."""
        assert process.stdin is not None
        assert process.stdout is not None
        is_late = threading.Event()

        def stop() -> None:
            is_late.set()
            process.kill()

        alarm = threading.Timer(LIMIT_S, stop)
        alarm.daemon = True
        alarm.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            result = process.stdout.readline()
        finally:
            alarm.cancel()
            alarm.join()
        if is_late.is_set() or not result:
            self.end()
        return result

    def _start(self) -> subprocess.Popen[str]:
        """Return the worker; start it if it isn't running."""
        # After a fork, the worker still belongs to the parent process.
        if self._process is None or self._owner != os.getpid():
            need("math", "comparing LaTeX answers")
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            self._owner = os.getpid()
            assert self._process.stdout is not None
            if self._process.stdout.readline().strip() != "ready":
                self.end()
                raise ImportError(f"{sys.executable} can't import math_verify")
        return self._process

    def end(self) -> None:
        """End the worker, unless another process has started it."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


_comparer = _Comparer()
atexit.register(_comparer.end)
