"""Static attention: the same mixing matrix per head for every image, ``S·V``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import needs_gradient
from .processor import never_emulated


def static_attention_reference(static: Tensor, v: Tensor) -> Tensor:
    """`static_attention` by its formula.

    Args:
        static: ``(H, N, N)``.
        v: ``(B, N, C)``, the heads side by side.

    Returns:
        ``(B, N, C)``.
    """
    heads = v.unflatten(-1, (static.shape[0], -1))  # (B, N, H, d)
    return torch.einsum("hqk,bkhd->bqhd", static, heads).flatten(2)


@never_emulated
def static_attention(static: Tensor, v: Tensor) -> Tensor:
    """Mix tokens by one matrix per head: ``N²·C`` MACs an image.

    Args:
        static: Attention of each query (row) over the keys, ``(H, N, N)``.
        v: Values ``(B, N, C)``, the heads side by side.

    Returns:
        ``(B, N, C)``.
    """
    heads, tokens, _ = static.shape
    if torch.compiler.is_exporting():
        # In an exported graph the two permutations below are copies, in onnxruntime by a single thread: six layers of
        # DeiT-T take 23.9 ms with them at batch 32, and 18.6 ms as one product a head.
        return torch.cat([static[head] @ values for head, values in enumerate(v.chunk(heads, dim=-1))], dim=-1)
    images = v.shape[0]
    eager = not needs_gradient(static, v) and not torch.compiler.is_compiling()
    if not (eager and v.is_cpu and v.dtype is torch.float32 and images > 1):
        width = v.shape[-1] // heads
        columns = v.unflatten(-1, (heads, width)).permute(2, 1, 0, 3).reshape(heads, tokens, images * width)
        mixed = torch.bmm(static, columns).unflatten(-1, (images, width))  # (H, N, B, d)
        return mixed.permute(2, 1, 0, 3).flatten(2).contiguous()  # one head alone would stay a view
    # One batched product a head reads S from cache for all images and the head's values where they lie; the product
    # above leaves the cache: with it, DeiT-T at 224 px, 32 images and six static layers is 3 to 15 % slower. In bf16
    # torch would first write S once for each image.
    out = torch.empty_like(v)
    for matrix, values, place in zip(static, v.chunk(heads, -1), out.chunk(heads, -1), strict=True):
        place.copy_(torch.bmm(matrix.expand(images, -1, -1), values))
    return out


@never_emulated
def coarse_static_attention(
    static: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: Tensor | None = None
) -> Tensor:
    """Static attention whose matrix lies on another, coarser patch grid than the tokens.

    The same as ``static_attention(resize_static(static, …), v)``. Interpolation is linear, so it may as well be done to
    the values, which are pooled to the coarse grid, and to what comes out, which is stretched back: nothing of the size
    of the tokens squared is held or multiplied. Of M patches m are left by the pooling: ``(P + m)²·C`` MACs an image
    and a few a token.

    Args:
        static: ``(H, P + h·w, P + h·w)``, rows summing to one.
        v: Values ``(B, P + h'·w', C)``, the heads side by side.
        rows, columns: ``(h', h)`` and ``(w', w)``, from `interpolation`.
        scale: What makes rows sum to one again, from `coarse_scale`; worked out when not given.

    Returns:
        ``(B, P + h'·w', C)``.
    """
    if scale is None:
        scale = coarse_scale(static, rows, columns)
    mixed = _mix_on_grid(static, v, rows, columns).unflatten(-1, (len(static), -1))  # (B, P + h'·w', H, d)
    return (mixed * scale.unsqueeze(-1)).flatten(2)


def coarse_scale(static: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """One over the sum of each row of the interpolated matrix, ``(P + h'·w', H)``."""
    prefix = static.shape[-1] - rows.shape[1] * columns.shape[1]
    ones = static.new_ones(1, prefix + len(rows) * len(columns), len(static))
    return _mix_on_grid(static, ones, rows, columns)[0].reciprocal()


def _mix_on_grid(static: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    (fine_height, height), (fine_width, width) = rows.shape, columns.shape
    prefix = static.shape[-1] - height * width
    first, patches = v[:, :prefix], v[:, prefix:].unflatten(1, (fine_height, fine_width))  # (B, h', w', C)
    pooled = (rows.t() @ patches.flatten(2)).unflatten(2, (fine_width, -1))  # (B, h, w', C)
    pooled = (columns.t() @ pooled).flatten(1, 2)  # (B, h·w, C)
    share = height * width / (fine_height * fine_width)  # so many more keys share the same attention
    mixed = static_attention(static, torch.cat([first, pooled * share], dim=1))
    stretched = (columns @ mixed[:, prefix:].unflatten(1, (height, width))).flatten(2)  # (B, h, w'·C)
    stretched = (rows @ stretched).unflatten(2, (fine_width, -1)).flatten(1, 2)  # (B, h'·w', C)
    return torch.cat([mixed[:, :prefix], stretched], dim=1)


def interpolation(old: int, new: int) -> Tensor:
    """Weights of linear interpolation along an axis, ``(new, old)``: rows sum to one."""
    points = torch.eye(old).unsqueeze(0)
    return F.interpolate(points, size=new, mode="linear", align_corners=False)[0].t().contiguous()


def pool_static(attention: Tensor, prefix: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Bring attention over a fine patch grid to a coarse one; rows stay distributions.

    Args:
        attention: ``(H, P + h'·w', P + h'·w')``, rows summing to one.
        prefix: P.
        rows, columns: ``(h', h)`` and ``(w', w)``, from `interpolation`.

    Returns:
        ``(H, P + h·w, P + h·w)``: a query's attention is the mean of those that it stands for, and what went to a key
        goes to the coarse ones around it.
    """
    share = torch.kron(rows, columns).to(attention)  # (h'·w', h·w)
    keys = torch.cat([attention[..., :prefix], attention[..., prefix:] @ share], dim=-1)
    total = share.sum(dim=0)
    mean = (share / total.clamp_min(1e-6)).t()
    # Where the other grid is the finer one, some of its queries stand for none: they get what is around them.
    around = torch.kron(*(interpolation(*side.shape) for side in (rows, columns))).to(attention)
    queries = torch.where(total.unsqueeze(1) > 1e-6, mean, around) @ keys[:, prefix:]
    return torch.cat([keys[:, :prefix], queries], dim=1)


def resize_static(static: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize static attention to another patch grid, in queries and in keys; rows stay distributions.

    Args:
        static: ``(H, P + h·w, P + h·w)``, rows summing to one.
        prefix: P.
        old, new: Height and width of the patch grid.

    Returns:
        ``(H, P + h'·w', P + h'·w')``: each query's attention to the patches as a whole, and to every prefix token, is
        interpolated between queries; how it spreads over the patches is interpolated in both axes.
    """
    count = new[0] * new[1]

    def stretch(rows: Tensor) -> Tensor:  # (R, h·w) → (R, h'·w')
        image = rows.unflatten(-1, old).unsqueeze(1)  # (R, 1, h, w)
        return F.interpolate(image, size=new, mode="bilinear", align_corners=False).flatten(1)

    heads, length, _ = static.shape
    keys = stretch(static[:, :, prefix:].flatten(0, 1)).unflatten(0, (heads, length))  # (H, P + h·w, h'·w')
    keys = keys * (old[0] * old[1] / count)  # more keys share the same attention
    wide = torch.cat([static[:, :, :prefix], keys], dim=-1)  # (H, P + h·w, P + h'·w')
    columns = wide[:, prefix:].transpose(1, 2)  # (H, P + h'·w', h·w)
    queries = stretch(columns.flatten(0, 1)).unflatten(0, (heads, prefix + count)).transpose(1, 2)
    out = torch.cat([wide[:, :prefix], queries], dim=1)
    return out / out.sum(dim=-1, keepdim=True)
