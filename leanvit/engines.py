"""Engines that run models: each makes of a model a function on a batch of images."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from .errors import ConfigError


def require(package: str, extra: str) -> None:
    """Refuse to go on without a package.

    Raises:
        ConfigError: It is missing; names what to install.
    """
    if find_spec(package) is None:
        raise ConfigError(f"the package {package} is missing: pip install 'leanvit[{extra}]'")


class OnnxRuntime:
    """An ONNX file in onnxruntime, on CPUs: images ``(B, C, H, W)`` to logits.

    Args:
        path: The file.
        threads: CPU threads; as many as torch uses when not given.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Else its threads keep spinning after a run, and take the cores from whatever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {self.input: images.numpy()})
        return torch.from_numpy(logits)
