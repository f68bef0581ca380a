"""The CPU kernels of `leanvit.ops.merge`: fifty small torch operations a block would take longer than what they do.

One thread: there is less to do than starting others takes. Compiled by Numba when first used, and cached on disk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Bits = NDArray[np.uint16]


def _compiled(function: Any) -> Any:
    try:
        return njit(cache=True, fastmath=True, error_model="numpy")(function)
    except RuntimeError:  # nowhere to write a cache
        return njit(fastmath=True, error_model="numpy")(function)


@_compiled
def choose(
    products: Floats, keys: Floats, size: Floats, r: int, prefix: int,
    kept: Indices, gone: Indices, into: Indices, own: Floats, given: Floats, sizes: Floats,
) -> None:  # fmt: skip
    """Fill in the last six, `leanvit.ops.merge.Matching`.

    Args:
        products: Of the keys of even tokens with those of odd ones, ``(B, E, R)``.
        keys: ``(B, N, d)``.
        size: ``(B, N)``.
        r, prefix: As those of `match`.
    """
    images, evens, odds = products.shape
    tokens, width = keys.shape[1:]
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    length, best, partner = np.empty(tokens, np.float32), np.empty(evens, np.float32), np.empty(evens, np.int64)
    staying = np.empty(evens, np.bool_)
    for image in range(images):
        for token in range(tokens):
            square = np.float32(1e-24)
            for i in range(width):
                square += keys[image, token, i] ** 2
            length[token] = 1 / np.sqrt(square)
        for i in range(evens):
            most, which = products[image, i, 0] * length[odd], 0
            for j in range(1, odds):
                similarity = products[image, i, j] * length[odd + 2 * j]
                if similarity > most:
                    most, which = similarity, j
            best[i], partner[i], staying[i] = most * length[even + 2 * i], which, True
        for j in range(odds):
            sizes[image, prefix + evens - r + j] = size[image, odd + 2 * j]
        for merge in range(r):
            i = -1  # another one each time, whatever the similarities are
            for candidate in range(evens):
                if staying[candidate] and (i < 0 or best[candidate] > best[i]):
                    i = candidate
            staying[i] = False
            gone[image, merge], into[image, merge] = even + 2 * i, partner[i]
            sizes[image, prefix + evens - r + partner[i]] += size[image, even + 2 * i]
        for token in range(prefix):
            kept[image, token], sizes[image, token] = token, size[image, token]
        place = prefix
        for i in range(evens):
            if staying[i]:
                kept[image, place], sizes[image, place] = even + 2 * i, size[image, even + 2 * i]
                place += 1
        for j in range(odds):
            own[image, j] = size[image, odd + 2 * j] / sizes[image, place + j]
        for merge in range(r):
            given[image, merge] = size[image, gone[image, merge]] / sizes[image, place + into[image, merge]]


@_compiled
def mix(
    values: Floats, kept: Indices, gone: Indices, into: Indices, own: Floats, given: Floats, odd: int, out: Floats
) -> None:
    """Fill in `out`, ``(B, N - r, D)``: the rows kept, then the means.

    Args:
        values: ``(B, N, D)``.
        kept, gone, into, own, given: As in `leanvit.ops.merge.Matching`.
        odd: The first token that receives.
    """
    images, rows = kept.shape
    for image in range(images):
        for row in range(rows):
            out[image, row] = values[image, kept[image, row]]
        for j in range(own.shape[1]):
            source, target, weight = values[image, odd + 2 * j], out[image, rows + j], own[image, j]
            for i in range(source.shape[0]):
                target[i] = source[i] * weight
        for merge in range(gone.shape[1]):
            source, target = values[image, gone[image, merge]], out[image, rows + into[image, merge]]
            weight = given[image, merge]
            for i in range(source.shape[0]):
                target[i] += source[i] * weight


@_compiled
def mix_bf16(
    values: Bits, kept: Indices, gone: Indices, into: Indices, own: Floats, given: Floats, odd: int, out: Bits
) -> None:
    """`mix` for bf16, given as bits; means are formed in fp32 and rounded once."""
    images, rows = kept.shape
    width, merges = values.shape[2], gone.shape[1]
    bits = np.empty(width, np.uint32)
    wide = bits.view(np.float32)  # a bf16 is the upper half of an fp32
    means = np.empty((merges, width), np.float32)
    slot = np.empty(own.shape[1], np.int64)  # where the mean of each that receives is formed
    for image in range(images):
        for row in range(rows):
            out[image, row] = values[image, kept[image, row]]
        for j in range(own.shape[1]):
            out[image, rows + j], slot[j] = values[image, odd + 2 * j], -1
        for merge in range(merges):
            j = into[image, merge]
            if slot[j] < 0:
                slot[j] = merge
                for i in range(width):
                    bits[i] = np.uint32(values[image, odd + 2 * j, i]) << 16
                for i in range(width):
                    means[merge, i] = wide[i] * own[image, j]
            for i in range(width):
                bits[i] = np.uint32(values[image, gone[image, merge], i]) << 16
            for i in range(width):
                means[slot[j], i] += wide[i] * given[image, merge]
        for merge in range(merges):
            j = into[image, merge]
            if slot[j] != merge:
                continue
            wide[:] = means[merge]
            for i in range(width):  # to the nearest, ties to even
                out[image, rows + j, i] = (bits[i] + 0x7FFF + ((bits[i] >> 16) & 1)) >> 16
