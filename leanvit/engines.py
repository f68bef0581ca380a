"""Engines that run models: each makes of a model a function from a batch of images to logits."""

from __future__ import annotations

import copy
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .methods import Method
from .model import LeanModel
from .ops.linear import blocks_of
from .ops.processor import has_vnni

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions that torch casts weights and images to."""


class Engine(ABC):
    """A model, ready to run in an engine: images ``(B, C, H, W)`` to logits; it has run when it returns.

    Args:
        model: A timm model or a deployed lean one, which is left as it is.
        precision: One of `precisions`.
        threads: CPU threads.
        device: Where to run, one of `devices`, whatever follows its colon.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    extra: ClassVar[str] = ""
    """What of leanvit's extras it needs."""
    packages: ClassVar[tuple[str, ...]] = ()

    dtype: torch.dtype = torch.float32
    """Of the images it takes."""

    def held(self) -> list[Tensor]:
        """The model's tensors, and what is kept in other forms of them, where they are torch's."""
        return []

    @classmethod
    def takes(cls, model: nn.Module) -> bool:
        """Whether it can run a model: one that needs a graph cannot run what depends on the image."""
        return True

    @abstractmethod
    def __init__(self, model: nn.Module, precision: str, threads: int, device: torch.device) -> None: ...

    @abstractmethod
    def __call__(self, images: Tensor) -> Any: ...


def held_by(model: nn.Module) -> list[Tensor]:
    """What a torch model holds: its parameters, what is kept of them in another order, and its buffers."""
    return [*model.parameters(), *blocks_of(model.parameters()), *model.buffers()]


class Torch(Engine):
    """torch, operation by operation; weights and images are cast to the precision."""

    name = "torch"
    precisions = tuple(PRECISIONS)
    devices = ("cpu", "cuda", "mps", "xpu")

    def __init__(self, model: nn.Module, precision: str, threads: int, device: torch.device) -> None:
        self.dtype = PRECISIONS[precision]
        self.device = device
        self.model = copy.deepcopy(model).eval().requires_grad_(False).to(device, self.dtype)

    def held(self) -> list[Tensor]:
        return held_by(self.model)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return logits


class Compiled(Torch):
    """`torch.compile`: fused and translated when first run, again for another batch size."""

    name = "compile"

    def __init__(self, model: nn.Module, precision: str, threads: int, device: torch.device) -> None:
        super().__init__(model, precision, threads, device)
        self.model = torch.compile(self.model)  # type: ignore[assignment]


class OnnxFile:
    """An ONNX file in onnxruntime, on CPUs.

    Args:
        path: The file.
        threads: CPU threads; as many as torch uses when not given.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # Else its threads keep spinning after a run, and take the cores from what runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {self.input: images.numpy()})
        return torch.from_numpy(logits)


class GraphEngine(Engine):
    """An engine that runs an exported graph, the same for every image."""

    @classmethod
    def takes(cls, model: nn.Module) -> bool:
        return not isinstance(model, LeanModel) or all(map(has_graph, model.lean.methods))


class OnnxRuntime(GraphEngine):
    """onnxruntime's CPU provider, with the file that `leanvit.export` writes.

    In int8, weights are quantised per channel when the file is made, activations per tensor as they come (dynamic
    quantisation): every product with a weight runs on integers, attention in fp32.
    """

    name = "onnxruntime"
    precisions = ("fp32", "int8")
    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def __init__(self, model: nn.Module, precision: str, threads: int, device: torch.device) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = exported(model, Path(folder))
            self.run = OnnxFile(quantised(path) if precision == "int8" else path, threads)

    def __call__(self, images: Tensor) -> Tensor:
        return self.run(images)


class OpenVino(GraphEngine):
    """OpenVINO's CPU plugin, with the file that `leanvit.export` writes; in bf16 it is told to infer in that."""

    name = "openvino"
    precisions = ("fp32", "bf16")
    extra = "openvino"
    packages = ("openvino", *OnnxRuntime.packages)

    def __init__(self, model: nn.Module, precision: str, threads: int, device: torch.device) -> None:
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        with tempfile.TemporaryDirectory() as folder:
            core = openvino.Core()
            self.request = core.compile_model(exported(model, Path(folder)), "CPU", settings).create_infer_request()

    def __call__(self, images: Tensor) -> Tensor:
        (logits,) = self.request.infer([images.numpy()], share_inputs=True).values()
        return torch.from_numpy(logits)


def has_graph(method: Method | type[Method]) -> bool:
    """Whether an exported graph runs a method as its deployed form does."""
    return not method.data_dependent and not method.no_graph


ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (Torch, Compiled, OnnxRuntime, OpenVino)}


def check_engines(names: Sequence[str], precisions: Sequence[str], device: torch.device) -> None:
    """Refuse what an engine cannot do before any work starts.

    Raises:
        ConfigError: An engine is not known or not installed, or does not compute in a precision or on the device.
    """
    for name in names:
        if name not in ENGINES:
            raise ConfigError(f"engine is {name!r}; known are {', '.join(ENGINES)}")
        engine = ENGINES[name]
        for precision in precisions:
            if precision not in engine.precisions:
                raise ConfigError(f"precision is {precision!r}; {name} computes in {', '.join(engine.precisions)}")
        if device.type not in engine.devices:
            raise ConfigError(f"device is {str(device)!r}; {name} runs on {', '.join(engine.devices)} here")
        for package in engine.packages:
            require(package, engine.extra)


def require(package: str, extra: str) -> None:
    """Refuse to go on without a package.

    Raises:
        ConfigError: It is missing; says what to install.
    """
    if find_spec(package) is None:
        raise ConfigError(f"the package {package} is missing: pip install 'leanvit[{extra}]'")


def exported(model: nn.Module, folder: Path) -> Path:
    """The model as an ONNX file in a folder, compared with torch."""
    from .export import export

    return export(model, folder / "model.onnx").path


def quantised(path: Path) -> Path:
    """An ONNX file whose products with weights are on 8-bit integers, beside the one it is made of."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = onnx.load(path)
    del proto.graph.value_info[:]  # shapes of before: the quantiser transposes weights, and trips over them
    proto.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")  # what it would ask for is done
    small = path.with_name("int8.onnx")
    quantize_dynamic(
        proto,
        small,
        weight_type=QuantType.QInt8,
        per_channel=True,
        # Without VNNI, a processor adds two products of 8 bits in 16 and cuts off what does not fit: seven bits fit.
        reduce_range=not has_vnni(),
        op_types_to_quantize=["MatMul"],
    )
    return small
