"""How CPU kernels are compiled, kept on disk, and run by torch's own threads.

A pool of threads beside torch's would have to wait for torch's idle threads, which spin.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

PATIENCE = 1.0
"""Seconds within which a compiled kernel comes from disk."""


def compiled(compile_kernel: Callable[..., Any], width: int, notice: str) -> Any:
    """A kernel for heads of a width, from disk where it was compiled before; on stderr a notice if that takes long.

    Args:
        compile_kernel: Compiles it, given the width and ``disk``, whether to keep it on disk.
        width: d.
        notice: What to tell.
    """
    timer = threading.Timer(PATIENCE, print, (notice,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        return compile_kernel(width, disk=True)
    except RuntimeError:  # no folder to write to
        return compile_kernel(width, disk=False)
    finally:
        timer.cancel()


def run(stage: Any, fields: np.ndarray[Any, Any], tasks: int) -> None:
    """Let as many threads as there is work for run a compiled function, each with the address of `fields`."""
    if not tasks:
        return
    threads = min(torch.get_num_threads(), tasks)
    together = openmp() if threads > 1 else None
    if threads == 1:
        _callable(stage)(fields.ctypes.data)
    elif together is not None:
        together(stage.address, fields.ctypes.data, threads, 0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_callable(stage), [fields.ctypes.data] * threads))


@cache
def openmp() -> Callable[..., None] | None:
    """The call by which torch's own threads run a function together, where this build of torch has it."""
    try:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        parallel = library.GOMP_parallel
    except (OSError, AttributeError, StopIteration):
        return None
    parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel  # type: ignore[no-any-return]


@cache
def _callable(stage: Any) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(stage.address)
