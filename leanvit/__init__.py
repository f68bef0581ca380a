"""leanvit makes Vision Transformers cheaper to run, and proves it."""

from .analysis import LayerStatistics, attention_statistics
from .bench import bench
from .budget import set_budget
from .count import Cost, count
from .errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeployError,
    ExportError,
    InputSizeError,
    LeanVitError,
    LeanVitWarning,
    MethodError,
    RestoreError,
    TrainingDiverged,
    UnsupportedModelError,
)
from .explain import Explanation, explain
from .export import export
from .measure import compare, evaluate
from .methods.adavit import AdaViT
from .methods.castling import Castling
from .methods.dgssa import DGSSA
from .methods.glad import GLAD
from .methods.merging import TokenMerging
from .methods.pruning import TokenPruning
from .methods.sparsifiner import Sparsifiner
from .model import Tokens, deploy, restore, slim
from .record import record
from .store import from_hub, load, push_to_hub, save
from .train import distill, train
from .version import __version__
from .warmstart import warm_start

__all__ = [
    "DGSSA",
    "GLAD",
    "AdaViT",
    "Castling",
    "CheckpointError",
    "ConfigError",
    "Cost",
    "DataError",
    "DeployError",
    "Explanation",
    "ExportError",
    "InputSizeError",
    "LayerStatistics",
    "LeanVitError",
    "LeanVitWarning",
    "MethodError",
    "RestoreError",
    "Sparsifiner",
    "TokenMerging",
    "TokenPruning",
    "Tokens",
    "TrainingDiverged",
    "UnsupportedModelError",
    "__version__",
    "attention_statistics",
    "bench",
    "compare",
    "count",
    "deploy",
    "distill",
    "evaluate",
    "explain",
    "export",
    "from_hub",
    "load",
    "push_to_hub",
    "record",
    "restore",
    "save",
    "set_budget",
    "slim",
    "train",
    "warm_start",
]
