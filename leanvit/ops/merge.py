"""Bipartite soft matching: the most similar pairs of tokens become one token each.

Source: Bolya et al., 2023, arXiv 2210.09461, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import needs_gradient
from .tokens import take


class Matching(NamedTuple):
    """Which tokens go into which. Patch tokens at even indices may go, the R ones at odd indices receive.

    Args:
        kept: Tokens that neither go nor receive: the prefix, then the even ones that stay, in order,
            ``(B, P + E - r)``.
        gone: Tokens that go into another, ``(B, r)``.
        into: Which of the receiving tokens each goes into, counted among these, ``(B, r)``.
        own: What each receiving token counts in the mean that it becomes, ``(B, R)``.
        given: What each that goes counts in it, ``(B, r)``.
        size: How many patches each token stands for after merging, ``(B, N - r)``: those kept, those that receive.
        receiving: The first token that receives.
    """

    kept: Tensor
    gone: Tensor
    into: Tensor
    own: Tensor
    given: Tensor
    size: Tensor
    receiving: int


def match(keys: Tensor, size: Tensor, r: int, prefix: int) -> Matching:
    """Match each even patch token with the odd one whose key is most similar, and take the r most similar pairs.

    Args:
        keys: ``(B, H, P + M, d)``; compared by the cosine of their means over heads.
        size: How many patches each token stands for, ``(B, P + M)``, in fp32.
        r: How many tokens go, at most M // 2.
        prefix: P: the first tokens neither go nor receive.
    """
    keys = keys.mean(dim=1, dtype=torch.float32)  # (B, N, d)
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2  # the first of each
    if _takes_kernel(keys):
        products = (keys[:, even::2] @ keys[:, odd::2].transpose(1, 2)).float()  # autocast makes them bf16
        return _match_by_kernel(keys, products, size, r, prefix)
    keys = F.normalize(keys, dim=-1)
    similarity, into = (keys[:, even::2] @ keys[:, odd::2].transpose(1, 2)).max(dim=-1)  # (B, E)
    order = similarity.argsort(dim=-1, descending=True)
    gone, staying = order[:, :r], order[:, r:].sort(dim=-1).values
    into, gone = into.gather(1, gone), even + 2 * gone
    first = torch.arange(prefix, device=keys.device).expand(keys.shape[0], -1)
    kept = torch.cat([first, even + 2 * staying], dim=1)
    own, given = size[:, odd::2], size.gather(1, gone)
    total = own + (_one_hot(into, own.shape[1]) * given.unsqueeze(1)).sum(dim=-1)
    sizes = torch.cat([size.gather(1, kept), total], dim=1)
    return Matching(kept, gone, into, own / total, given / total.gather(1, into), sizes, odd)


def merge(values: Tensor, matching: Matching) -> Tensor:
    """Merge tokens: those kept as they are, then those that receive, as means. No scatter: engines have products.

    Args:
        values: ``(B, N, D)``.
        matching: As `match` gives it.

    Returns:
        ``(B, N - r, D)``.
    """
    if _takes_kernel(values):
        return _merge_by_kernel(values, matching)
    own, given = (weights.to(values.dtype) for weights in (matching.own, matching.given))
    received = _one_hot(matching.into, own.shape[1]) * given.unsqueeze(1)  # (B, R, r)
    base = values[:, matching.receiving :: 2] * own.unsqueeze(-1)
    merged = torch.baddbmm(base, received, take(values, matching.gone))
    return torch.cat([take(values, matching.kept), merged], dim=1)


def _one_hot(into: Tensor, count: int) -> Tensor:
    """Whether each token goes into each that receives: ``(B, r)`` → ``(B, R, r)``."""
    return into.unsqueeze(1) == torch.arange(count, device=into.device).unsqueeze(1)


def _takes_kernel(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or not x.is_cpu or needs_gradient(x):
        return False
    return x.dtype in (torch.float32, torch.bfloat16)


def _match_by_kernel(keys: Tensor, products: Tensor, size: Tensor, r: int, prefix: int) -> Matching:
    from .merge_kernel import choose

    batch, evens, odds = products.shape
    kept, gone, into = (torch.empty(batch, count, dtype=torch.int64) for count in (prefix + evens - r, r, r))
    own, given, sizes = (torch.empty(batch, count) for count in (odds, r, keys.shape[1] - r))
    matching = Matching(kept, gone, into, own, given, sizes, prefix + 1 - prefix % 2)
    inputs = (tensor.detach().contiguous().numpy() for tensor in (products, keys, size))
    choose(*inputs, r, prefix, *(tensor.numpy() for tensor in matching[:6]))
    return matching


def _merge_by_kernel(values: Tensor, matching: Matching) -> Tensor:
    from .merge_kernel import mix, mix_bf16

    batch, tokens, width = values.shape
    out = torch.empty(batch, tokens - matching.gone.shape[1], width, dtype=values.dtype)
    weights = (tensor.numpy() for tensor in matching[:5])
    if values.dtype is torch.float32:
        mix(values.detach().contiguous().numpy(), *weights, matching.receiving, out.numpy())
    else:  # numpy has no bf16: the kernel is given its bits
        bits = values.detach().contiguous().view(torch.uint16)
        mix_bf16(bits.numpy(), *weights, matching.receiving, out.view(torch.uint16).numpy())
    return out


def merge_reference(x: Tensor, size: Tensor, keys: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Matching and merging by their definition, token by token.

    Args:
        x: ``(B, N, D)``.
        size: ``(B, N)``.
        keys, r, prefix: As those of `match`.

    Returns:
        Tokens ``(B, N - r, D)`` and their sizes ``(B, N - r)``.
    """
    images = []
    for tokens, sizes, metric in zip(x, size, F.normalize(keys.float().mean(dim=1), dim=-1), strict=True):
        count = len(tokens)
        going, receiving = ([i for i in range(prefix, count) if i % 2 == parity] for parity in (0, 1))
        pairs = [max((float(metric[i] @ metric[j]), -j, i) for j in receiving) for i in going] if r else []
        groups = {i: [i] for i in range(count)}
        for _, partner, i in sorted(pairs, key=lambda pair: -pair[0])[:r]:
            groups[-partner] += groups.pop(i)
        order = [i for i in groups if i not in receiving] + receiving
        means = [(tokens[groups[i]] * sizes[groups[i], None]).sum(0) / sizes[groups[i]].sum() for i in order]
        images.append((torch.stack(means), torch.stack([sizes[groups[i]].sum() for i in order])))
    merged, merged_sizes = zip(*images, strict=True)
    return torch.stack(merged), torch.stack(merged_sizes)
