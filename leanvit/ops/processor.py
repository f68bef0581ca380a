"""What a processor is good at, which decides between forms of the same arithmetic."""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from ..errors import LeanVitWarning

Arguments = ParamSpec("Arguments")


# Found out once, but not by `functools.cache`, of which `torch.compile` warns in whatever graph it meets it.
_CPU_HAS_BF16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_bf16(device_type: str = "cpu") -> bool:
    """Whether a kind of device computes in bf16 by itself.

    A CPU without bf16 instructions (AVX-512 or better on x86) emulates them, number by number: products take 4 to 100
    times as long as in fp32.
    """
    if device_type == "cpu":
        return _CPU_HAS_BF16
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def has_vnni() -> bool:
    """Whether the CPU adds up products of 8-bit integers in 32 bits; on x86 not every one does."""
    return platform.machine().lower() not in ("x86_64", "amd64") or bool(torch.cpu._is_vnni_supported())


def warn_of_emulation(device_type: str) -> None:
    """Say that a device is about to emulate bf16, which nobody asks for knowingly."""
    if not has_bf16(device_type):
        warnings.warn(
            f"bf16: this {device_type.upper()} has no bf16 arithmetic and emulates it; fp32 is several times faster",
            LeanVitWarning,
            stacklevel=3,
        )


@functools.cache
def prefers_onednn(dtype: torch.dtype) -> bool:
    """Whether this CPU runs linear layers of a type faster in oneDNN than in torch's default library.

    In fp32 that is so with AVX-512. With AVX2 alone (measured on an AMD Zen 3) both reach the processor's peak on the
    products, MKL a little closer, and oneDNN's GELU takes twice the time of torch's.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype is torch.bfloat16:
        return has_bf16()
    return dtype is torch.float32 and torch.backends.cpu.get_cpu_capability() != "AVX2"


def emulates(x: Tensor) -> bool:
    """Whether arithmetic on a tensor would be emulated number by number: bf16 on a CPU that has none."""
    return x.dtype is torch.bfloat16 and x.is_cpu and not has_bf16()


def never_emulated(operation: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """Let an operation on tensors compute in fp32 where bf16 would be emulated; its result is bf16 all the same."""

    @functools.wraps(operation)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        values = () if has_bf16() else (*args, *kwargs.values())
        if not any(isinstance(value, Tensor) and emulates(value) for value in values):
            return operation(*args, **kwargs)

        def widen(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and emulates(value) else value

        wide = operation(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()})  # type: ignore[arg-type]
        return wide.to(torch.bfloat16)

    return run
