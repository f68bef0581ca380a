"""Recording: one context manager that collects what modules offer while it is open, and costs nothing while closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

_active: ContextVar[Recorder | None] = ContextVar("leanvit_recorder", default=None)


@dataclass(frozen=True)
class Record:
    """One thing a module offered: the block it sits in, and the tensor itself, with its gradient if it has one."""

    layer: int
    value: Tensor


@dataclass
class Recorder:
    """What was offered while the recorder was open, by kind, in the order of the forward pass.

    Args:
        kinds: The kinds to collect (``"guidance"``, ``"attention"``, …); empty collects every kind.
    """

    kinds: frozenset[str] = frozenset()
    records: dict[str, list[Record]] = field(default_factory=dict)

    def __getitem__(self, kind: str) -> list[Record]:
        return self.records.get(kind, [])

    def wants(self, kind: str) -> bool:
        return not self.kinds or kind in self.kinds


@contextmanager
def record(*kinds: str) -> Iterator[Recorder]:
    """Open a recorder: ``with leanvit.record("attention") as found: model(images)``.

    Args:
        kinds: What to collect; nothing named collects everything that is offered.
    """
    recorder = Recorder(frozenset(kinds))
    token = _active.set(recorder)
    try:
        yield recorder
    finally:
        _active.reset(token)


def recompute_like_now() -> tuple[AbstractContextManager[None], AbstractContextManager[object]]:
    """Contexts for `torch.utils.checkpoint`: what runs again offers to a recorder of its own, to run as it ran.

    Without one, whatever was computed for the recorder would be missing in the second run.
    """
    recorder = _active.get()
    return nullcontext(), nullcontext() if recorder is None else _again(recorder.kinds)


@contextmanager
def _again(kinds: frozenset[str]) -> Iterator[None]:
    with record(*kinds):
        yield


def offer(kind: str, layer: int, value: Callable[[], Tensor]) -> None:
    """Offer a tensor to the open recorder, if there is one that wants it.

    Args:
        kind: What the tensor is.
        layer: Index of the block that offers it.
        value: Computes the tensor; called only when it is wanted.
    """
    if torch.compiler.is_compiling():  # an exported or compiled graph has no recorder
        return
    recorder = _active.get()
    if recorder is not None and recorder.wants(kind):
        recorder.records.setdefault(kind, []).append(Record(layer, value()))
