"""leanvit makes Vision Transformers cheaper to run, and proves it."""

from .model import deploy, restore, slim
from .methods.dgssa import DGSSA
from .methods.glad import GLAD
