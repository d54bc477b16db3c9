"""Whether work grows with what it is given and not with its square, on a machine that does other things too."""

from __future__ import annotations

import time
from collections.abc import Callable

Work = Callable[[], object]
Prepare = Callable[[], Work]
"""Makes a piece of work ready; what that takes does not count."""
ROUNDS = 7


def cpu_s(work: Work) -> float:
    """Seconds of this thread's CPU time."""
    began_s = time.thread_time()
    work()
    return time.thread_time() - began_s


def least_ratio(large: Prepare, small: Prepare, rounds: int = ROUNDS) -> float:
    """CPU time of `large` by that of `small`, measured in pairs, one after the other; the least of all pairs.

    What disturbs one of the two makes a pair wrong. A verdict "less than N times" on the least is wrong only if every
    pair was disturbed, and each time by the factor that separates N from the truth.
    """
    return min(cpu_s(large()) / cpu_s(small()) for _ in range(rounds))
