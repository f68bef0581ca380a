"""leanvit makes Vision Transformers cheaper to run, and proves it."""

from .analysis import LayerStatistics, attention_statistics
from .count import Cost, count
from .errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeployError,
    InputSizeError,
    LeanVitError,
    MethodError,
    RestoreError,
    TrainingDiverged,
    UnsupportedModelError,
)
from .measure import compare, evaluate
from .methods.dgssa import DGSSA
from .methods.glad import GLAD
from .model import Tokens, deploy, restore, slim
from .record import record
from .store import from_hub, load, push_to_hub, save
from .train import distill, train
from .version import __version__
from .warmstart import warm_start
