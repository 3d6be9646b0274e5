"""Whether two short LaTeX answers mean the same number or expression. Loads no torch.

math-verify guards against expressions that never finish (`9^{9^{9^9}}`) by an alarm signal, which
works in the main thread only and clobbers the caller's. Here it runs in a process of its own, which
is ended when an answer takes too long: any thread may ask.
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
from drllm.listener import logger

LIMIT_S = 5.0  # longest time for one comparison, in seconds; math-verify's own default

_PLAIN = re.compile(r"-?(?:0|[1-9][0-9]{0,8})(?:\.[0-9]{1,4})?")
_WORKER = """
import sys
sys.path.pop(0)  # the folder the user happens to be in
import json, logging
logging.disable()
from math_verify import parse, verify
answers, sys.stdout = sys.stdout, sys.stderr
print("ready", file=answers, flush=True)
for line in sys.stdin:
    gold, given = (
        parse("\\\\boxed{" + text + "}", parsing_timeout=None) for text in json.loads(line)
    )
    equal = bool(verify(gold, given, timeout_seconds=None))
    print(json.dumps(equal), file=answers, flush=True)
"""


def plain_number(text: str) -> Decimal | None:
    """Return the value of a plainly written number of moderate length, else None."""
    stripped = text.strip()
    return Decimal(stripped) if _PLAIN.fullmatch(stripped) else None


@functools.lru_cache(maxsize=65536)
def same_value(gold: str, given: str) -> bool:
    r"""Say whether an answer means the same as the gold answer.

    Both are LaTeX or plain text, without `\boxed`. It is as math-verify says; False where that
    needs more than `LIMIT_S` seconds.
    """
    plain_gold, plain_given = plain_number(gold), plain_number(given)
    if plain_gold is not None and plain_given is not None:
        return plain_gold == plain_given
    return _comparer.ask(gold, given)


class _Comparer:
    """The process that compares, started when first asked and again after a time-out or a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, gold: str, given: str) -> bool:
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            late = threading.Event()

            def stop() -> None:
                late.set()
                process.kill()

            alarm = threading.Timer(LIMIT_S, stop)
            alarm.daemon = True
            alarm.start()
            try:
                process.stdin.write(json.dumps([gold, given]) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            finally:
                alarm.cancel()
                alarm.join()
            if late.is_set() or not answer:
                self.end()
            if not answer:
                logger.warning("comparing %r with %r gave no answer: counted as wrong", given, gold)
                return False
            return bool(json.loads(answer))

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid():  # a fork's parent owns its own
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
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


_comparer = _Comparer()
atexit.register(_comparer.end)
