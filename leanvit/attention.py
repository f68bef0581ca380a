"""How a block calls its attention, whatever kind it is, and what the dense one does inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from timm.layers import Attention
from torch import Tensor

from .ops.attention import attention as softmax_attention

if TYPE_CHECKING:
    from .model import Tokens


class Attended(NamedTuple):
    """What came of a block's attention.

    Args:
        x: Its output, ``(B, N, C)``, the residual added if that was asked for.
        q: The queries, ``(B, H, N, d)``, as they met the keys; None where there are none or nobody is told.
        k: The keys, ``(B, H, N, d)``.
    """

    x: Tensor
    q: Tensor | None = None
    k: Tensor | None = None


def attend(attention: Any, x: Tensor, tokens: Tokens, *residual: Tensor, tell: bool = False) -> Attended:
    """Run a block's attention.

    One with a method ``attend(x, tokens, *residual) -> Attended`` is given the tokens as well, to see what they stand
    for and where they lie. timm's own runs as timm wrote it, unless its queries and keys are asked for or tokens stand
    for several patches. Any other takes and gives a tensor.

    Args:
        attention: The module.
        x: Its input, ``(B, P + M, C)``.
        tokens: The tokens that this is the normalised form of.
        residual: For a deployed attention that adds it, ``(B, P + M, C)``.
        tell: Whether the queries and keys are wanted.
    """
    if hasattr(attention, "attend"):
        return attention.attend(x, tokens, *residual)  # type: ignore[no-any-return]
    if type(attention) is Attention and (tell or tokens.size is not None):
        return dense_attention(attention, x, tokens.size, *residual)
    return Attended(attention(x, *residual))


def dense_attention(attention: Attention, x: Tensor, size: Tensor | None, *residual: Tensor) -> Attended:
    """timm's dense attention, which also tells its queries and keys.

    Args:
        attention: The module.
        x: Its input, ``(B, N, C)``.
        size: How many patches each token stands for, ``(B, N)``: its share of the attention grows with that (Bolya et
            al., 2023, arXiv 2210.09461, section 3, proportional attention). None where each stands for one.
        residual: For a projection that adds it, ``(B, N, C)``.
    """
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).view(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # each (B, H, N, d)
    q, k = attention.q_norm(q), attention.k_norm(k)
    dropout = attention.attn_drop.p if attention.training else 0.0
    mixed = softmax_attention(q, k, v, size=size, dropout=dropout).transpose(1, 2)
    return Attended(project(attention, x, mixed.reshape(batch, tokens, attention.attn_dim), *residual), q, k)


def project(attention: Any, x: Tensor, mixed: Tensor, *residual: Tensor) -> Tensor:
    """What timm's attention does after the heads are mixed: norm, gate and projection.

    Args:
        attention: The module with those parts.
        x: Its input, ``(B, N, C)``.
        mixed: The heads side by side, ``(B, N, H·d)``.
        residual: For a projection that adds it, ``(B, N, C)``.
    """
    mixed = attention.norm(mixed)
    if attention.gate is not None:
        mixed = mixed * attention.gate(x).sigmoid()
    return attention.proj_drop(attention.proj(mixed, *residual))
