"""The CPU kernel of `leanvit.ops.angular`: linear-angular attention, and the depthwise convolution of the values.

Two stages, each for one image and head: the summary ``Σ k̂·vᵀ``, and for a block of queries what they read from it, its
normalisation and the convolution. Where heads divide among the threads, a head goes through both at once, and what
passes between them stays in cache; where they do not, each stage is shared out on its own.

Values and summary are kept in planes of sixteen channels. A plane holds the values by place: patches as they lie on
their grid with zeros around it, so that the convolution looks up each tap at a fixed distance, whatever is at the edge.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import cfunc, types

from .vectors import (
    LANES,
    add_product,
    inline,
    integer,
    load,
    load_bf16,
    multiply,
    multiply_add,
    number,
    splat,
    store,
    store_bf16,
    store_number,
    take_one,
    total,
)  # fmt: skip

BLOCK = 48
"""Queries at a time, a multiple of 16: what they need stays in the first cache."""
KEYS = 64
"""Keys at a time."""
(
    NEXT_TASK, TASKS, HEADS, TOKENS, BF16, PARTS, PLANES, QUERIES,
    Q, Q_IMAGE, Q_HEAD, Q_TOKEN, K, K_IMAGE, K_HEAD, K_TOKEN, V, V_IMAGE, V_HEAD, V_TOKEN,
    OUT, OUT_IMAGE, OUT_HEAD, OUT_TOKEN,
    PLACES, PLACES_IMAGE, ROOM, TAPS, DISTANCES, FILTERS, GAIN, KEPT,
) = range(32)  # fmt: skip
"""What a call is told: counts, addresses, and strides in elements.

A head makes `PARTS` tasks; each works on `PLANES` planes of the first stage, if any, and on `QUERIES` of the second, if
any. `ROOM` is how many places a plane has, and at `KEPT` lies what the first stage leaves for the second when they are
apart.
"""

F32, I32 = 4, 4
LINE = F32 * LANES
SHORTEST = np.float32(1e-6)
HALF, INVERSE_PI = np.float32(0.5), np.float32(1 / np.pi)


@inline
def _read(address, offset, bf16):
    return load_bf16(address + 2 * offset) if bf16 else load(address + F32 * offset)


@inline
def _length(squares):
    return max(np.float32(np.sqrt(total(squares))), SHORTEST)


@inline
def _places(a, image):
    return a[PLACES] + I32 * image * a[PLACES_IMAGE]


@inline
def _clear(address, lines):
    for i in range(lines):
        store(address + LINE * i, splat(np.float32(0)))


@inline
def _summarise(a, image, head, first, last, width, summary, values, room):
    """Fill in planes first … last of a head's summary and of its values by place: the first stage."""
    planes = last - first
    _clear(summary + LINE * first * width, planes * width)
    _clear(values + LINE * first * a[ROOM], planes * a[ROOM])
    keys, scaled = room, room + F32 * KEYS * width
    places = _places(a, image)
    for start in range(0, a[TOKENS], KEYS):
        count = min(KEYS, a[TOKENS] - start)
        for t in range(count):
            at = image * a[K_IMAGE] + head * a[K_HEAD] + (start + t) * a[K_TOKEN]
            squares = splat(np.float32(0))
            for j in range(0, width, LANES):
                x = _read(a[K], at + j, a[BF16])
                store(keys + F32 * (t * width + j), x)
                squares = multiply_add(x, x, squares)
            scale = splat(np.float32(1) / _length(squares))
            at = image * a[V_IMAGE] + head * a[V_HEAD] + (start + t) * a[V_TOKEN]
            place = integer(places + I32 * (start + t))
            for plane in range(first, last):
                x = _read(a[V], at + plane * LANES, a[BF16])
                store(values + LINE * (plane * a[ROOM] + place), x)
                store(scaled + LINE * ((plane - first) * KEYS + t), multiply(scale, x))
        for plane in range(first, last):
            for i in range(0, width, LANES):
                to = summary + LINE * (plane * width + i)
                from_ = scaled + LINE * (plane - first) * KEYS
                add_product(keys + F32 * i, F32, F32 * width, from_, LINE, count, to, LINE)


@inline
def _mix(a, image, head, start, stop, width, summary, values, room):
    """Queries start … stop of a head, at most a block: the second stage."""
    count, planes, places = stop - start, width // LANES, _places(a, image) + I32 * start
    queries, mixed, scales = room, room + F32 * BLOCK * width, room + 2 * F32 * BLOCK * width
    half, zero = splat(HALF), splat(np.float32(0))
    for t in range(count):
        at = image * a[Q_IMAGE] + head * a[Q_HEAD] + (start + t) * a[Q_TOKEN]
        squares = zero
        for j in range(0, width, LANES):
            x = _read(a[Q], at + j, a[BF16])
            squares = multiply_add(x, x, squares)
        scale = splat(INVERSE_PI / _length(squares))
        place = integer(places + I32 * t)
        for plane in range(planes):
            j = plane * LANES
            store(queries + F32 * (t * width + j), multiply(scale, _read(a[Q], at + j, a[BF16])))
            store(mixed + LINE * (plane * BLOCK + t), multiply(half, load(values + LINE * (plane * a[ROOM] + place))))
    for plane in range(planes):
        for t in range(0, count, LANES):  # whole tiles: what is beyond the count is not read again
            to = mixed + LINE * (plane * BLOCK + t)
            add_product(
                queries + F32 * t * width, F32 * width, F32, summary + LINE * plane * width, LINE, width, to, LINE
            )
    gain = number(a[GAIN] + F32 * head)
    for t in range(count):
        squares = zero
        for plane in range(planes):
            x = load(mixed + LINE * (plane * BLOCK + t))
            squares = multiply_add(x, x, squares)
        store_number(scales + F32 * t, gain / _length(squares))
    for plane in range(planes):
        out = image * a[OUT_IMAGE] + head * a[OUT_HEAD] + start * a[OUT_TOKEN] + plane * LANES
        filters = a[FILTERS] + F32 * (head * width + plane * LANES)
        plane_values, plane_mixed = values + LINE * plane * a[ROOM], mixed + LINE * plane * BLOCK
        _convolve(a, count, places, plane_values, filters, plane_mixed, scales, out, width)


@inline
def _convolve(a, count, places, values, filters, mixed, scales, out, width):
    """Scale a plane of some queries, add the convolution, and write it to the output, four at a time."""
    for t in range(0, count, 4):
        t1, t2, t3 = min(t + 1, count - 1), min(t + 2, count - 1), min(t + 3, count - 1)
        v0, v1 = values + LINE * integer(places + I32 * t), values + LINE * integer(places + I32 * t1)
        v2, v3 = values + LINE * integer(places + I32 * t2), values + LINE * integer(places + I32 * t3)
        x0 = multiply(splat(number(scales + F32 * t)), load(mixed + LINE * t))
        x1 = multiply(splat(number(scales + F32 * t1)), load(mixed + LINE * t1))
        x2 = multiply(splat(number(scales + F32 * t2)), load(mixed + LINE * t2))
        x3 = multiply(splat(number(scales + F32 * t3)), load(mixed + LINE * t3))
        at = filters
        for tap in range(a[TAPS]):
            weight, away = load(at), LINE * integer(a[DISTANCES] + I32 * tap)
            x0, x1 = multiply_add(weight, load(v0 + away), x0), multiply_add(weight, load(v1 + away), x1)
            x2, x3 = multiply_add(weight, load(v2 + away), x2), multiply_add(weight, load(v3 + away), x3)
            at += F32 * a[HEADS] * width
        _write(a, out + t * a[OUT_TOKEN], x0)
        _write(a, out + t1 * a[OUT_TOKEN], x1)
        _write(a, out + t2 * a[OUT_TOKEN], x2)
        _write(a, out + t3 * a[OUT_TOKEN], x3)


@inline
def _write(a, offset, x):
    if a[BF16]:
        store_bf16(a[OUT] + 2 * offset, x)
    else:
        store(a[OUT] + F32 * offset, x)


@inline
def _aligned(address):
    return (address + LINE - 1) // LINE * LINE


def compile_kernel(width, disk):
    """Both stages for heads of a width; every thread runs it at once, with the address of a call's fields.

    Args:
        width: d, a multiple of 16.
        disk: Whether to keep it on disk.
    """

    @cfunc(types.void(types.CPointer(types.int64)), fastmath=True, error_model="numpy", cache=disk)
    def run(a):
        planes = width // LANES
        a_head = width * (width + a[ROOM])
        scratch = np.zeros(2 * max(BLOCK, KEYS) * width + BLOCK + LANES, np.float32)
        own = np.empty(LANES if a[KEPT] else a_head + LANES, np.float32)
        while True:
            task = take_one(a)
            if task >= a[TASKS]:
                return
            which, part = task // a[PARTS], task % a[PARTS]
            image, head = which // a[HEADS], which % a[HEADS]
            # Numba frees an array behind its last use: both are used here, in the loop.
            room, kept = _aligned(scratch.ctypes.data), _aligned(own.ctypes.data)
            if a[KEPT]:
                kept = a[KEPT] + F32 * which * a_head
            values = kept + F32 * width * width
            if a[PLANES]:
                first = part * a[PLANES]
                _summarise(a, image, head, first, min(first + a[PLANES], planes), width, kept, values, room)
            for start in range(part * a[QUERIES], min((part + 1) * a[QUERIES], a[TOKENS]), BLOCK):
                _mix(a, image, head, start, min(start + BLOCK, a[TOKENS]), width, kept, values, room)

    return run
