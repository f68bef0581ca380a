"""Fixtures shared by the tests: a small ViT and, where it is present, the real data beside the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def tiny_vit() -> VisionTransformer:
    """A small ViT with random weights: 4 blocks, 16 patches, 3 heads, 10 classes."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10
    ).eval()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and photos; tests that need it are skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("the project's shared data is not beside the repository")
    return SHARED
