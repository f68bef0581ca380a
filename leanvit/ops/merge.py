"""Bipartite soft matching: the most similar pairs of tokens become one token each.

Source: Bolya et al., 2023, arXiv 2210.09461, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import take


class Matching(NamedTuple):
    """Which tokens go into which. Patch tokens at even indices may go, those at odd indices receive.

    Args:
        kept: Tokens that neither go nor receive: the prefix, then the even ones that stay, in order,
            ``(B, P + E - r)``.
        gone: Tokens that go into another, ``(B, r)``.
        into: Which of the receiving tokens each goes into, counted among these, ``(B, r)``.
        receiving: The R tokens that receive.
    """

    kept: Tensor
    gone: Tensor
    into: Tensor
    receiving: slice


def match(keys: Tensor, r: int, prefix: int) -> Matching:
    """Match each even patch token with the odd one whose key is most similar, and take the r most similar pairs.

    Args:
        keys: ``(B, H, P + M, d)``; compared by the cosine of their means over heads.
        r: How many tokens go, at most M // 2.
        prefix: P: the first tokens neither go nor receive.
    """
    keys = F.normalize(keys.mean(dim=1, dtype=torch.float32), dim=-1)  # (B, N, d)
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2  # the first of each
    receiving = slice(odd, None, 2)
    similarity, into = (keys[:, even::2] @ keys[:, receiving].transpose(1, 2)).max(dim=-1)  # (B, E)
    order = similarity.argsort(dim=-1, descending=True)
    gone, staying = order[:, :r], order[:, r:].sort(dim=-1).values
    first = torch.arange(prefix, device=keys.device).expand(keys.shape[0], -1)
    kept = torch.cat([first, even + 2 * staying], dim=1)
    return Matching(kept, even + 2 * gone, into.gather(1, gone), receiving)


def merge_weights(matching: Matching, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each token counts in the means, and how many patches each stands for then.

    Args:
        matching: Which tokens go into which.
        size: How many patches each token stands for, ``(B, N)``.

    Returns:
        Weights of the tokens that receive, ``(B, R)``, and of those that go, ``(B, R, r)``, which sum to one for each
        that receives; sizes of the tokens after merging, ``(B, N - r)``.
    """
    own = size[:, matching.receiving]  # (B, R)
    given = matching.into.unsqueeze(1) == torch.arange(own.shape[1], device=size.device).unsqueeze(1)  # (B, R, r)
    received = given * size.gather(1, matching.gone).unsqueeze(1)
    total = own + received.sum(dim=-1)
    sizes = torch.cat([size.gather(1, matching.kept), total], dim=1)
    return own / total, received / total.unsqueeze(-1), sizes


def merge(values: Tensor, matching: Matching, own: Tensor, received: Tensor) -> Tensor:
    """Merge tokens: first those that stay as they are, then those that receive. No scatter: engines have products.

    Args:
        values: ``(B, N, D)``.
        matching, own, received: As `match` and `merge_weights` give them.

    Returns:
        ``(B, N - r, D)``.
    """
    base = values[:, matching.receiving] * own.to(values.dtype).unsqueeze(-1)
    merged = torch.baddbmm(base, received.to(values.dtype), take(values, matching.gone))
    return torch.cat([take(values, matching.kept), merged], dim=1)


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
