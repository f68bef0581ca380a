"""The cases that every method goes through: a table of what to apply to which model. A new method adds its lines
here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from leanvit.methods import Method, parse

SIZE = 32
"""Input size of the small models: a 4×4 grid of patches."""

MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average pooling": {"global_pool": "avg", "class_token": False},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "layer scale, q/k norm": {"init_values": 0.1, "qk_norm": True},
    "scaled norms, gate": {"scale_attn_norm": True, "scale_mlp_norm": True, "qkv_bias": False},
    "pre-norm": {"pre_norm": True},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "no projection bias": {"proj_bias": False},
    "other grid": {"img_size": (24, 40)},
    "dynamic size": {"dynamic_img_size": True},
}
"""Every kind of plain timm ViT, as arguments to `small_vit`."""

STARTS_DENSE = {"adavit"}
"""Methods that start with everything on, as the dense model; to see them at work, `Case.at_work` lets them decide
at random."""

METHODS = [
    "dgssa:layers=0,2",
    "dgssa:layers=0,1,grid=2",
    "glad:at=1,2",
    "glad:at=2,keep=0.3",
    "dgssa:layers=0,1+glad:at=2,3",
    "adavit",
    "adavit:patches=1,partial=true",
    "dgssa:layers=0+adavit:first=1,heads=1,blocks=1",
    "pruning:at=1,2",
    "pruning:keep=0.5,0.8,at=0,2,fuse=false",
    "merging:r=2",
    "merging:keep=0.4,first=1",
    "dgssa:layers=0,1+merging:r=3,first=2",
    "glad:at=1,keep=0.8+pruning:at=2",
    "pruning:at=0,2+merging:r=0,2,0,2",
    "sparsifiner:keep=0.15",
    "sparsifiner:keep=0.3,rho=4,layers=1,3,threshold=0.05+dgssa:layers=0,2",
    "sparsifiner:keep=0.5+pruning:at=1,2",
    "castling:kernel=3",
    "castling:layers=0,3,conv=tokens+glad:at=2+dgssa:layers=1",
    "castling:layers=2,3,kernel=3+pruning:at=1",
    "castling:layers=1,conv=tokens+merging:r=2",
]
"""Every method, alone and in company, with parameters that fit a model of four blocks."""


def small_vit(**changes: Any) -> VisionTransformer:
    """A ViT of four blocks, its weights drawn large enough that attention is not flat and biases are not zero."""
    torch.manual_seed(0)
    usual: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **(usual | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def photos(model: VisionTransformer, count: int = 6) -> torch.Tensor:
    """Smooth random images of the model's size, so that neighbouring patches resemble each other."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=model.patch_embed.img_size, mode="bilinear")


@dataclass(frozen=True)
class Case:
    """A method on a model."""

    method: str
    model: str = "class token"
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} on {self.model}"

    def methods(self) -> tuple[Method, ...]:
        return parse(self.method)

    def vit(self, **changes: Any) -> VisionTransformer:
        return small_vit(**(MODELS[self.model] | self.changes | changes))

    @property
    def starts_dense(self) -> bool:
        """Whether all that it applies changes nothing before training."""
        return {method.name for method in self.methods()} <= STARTS_DENSE

    def at_work(self, lean: VisionTransformer) -> VisionTransformer:
        """The lean model where it skips something, whether or not it would before training."""
        if any(method.name in STARTS_DENSE for method in self.methods()):
            for name, parameter in lean.named_parameters():
                if ".decide." in name:
                    torch.nn.init.normal_(parameter)
        return lean


CASES = [Case(method) for method in METHODS] + [
    Case(method, model)
    for method in (
        "dgssa:layers=0,1+glad:at=2,3",
        "adavit",
        "pruning:at=1,2",
        "merging:r=2",
        "sparsifiner:keep=0.3,layers=0,1,2+glad:at=3",
        "castling:kernel=3",
    )
    for model in MODELS
    if model != "class token"
]
