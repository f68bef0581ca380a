"""What kernels that run on several threads must hold to: the same results from any number, and from calls at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def with_threads(counts: Sequence[int], call: Callable[[], Tensor]) -> list[Tensor]:
    """What a call gives with each number of torch's threads."""
    results, before = [], torch.get_num_threads()
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def at_once(call: Callable[[], Tensor]) -> list[Tensor]:
    """What four threads get that make the same call twenty times each."""
    results: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(call() for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results
