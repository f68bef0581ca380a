"""The CPU kernel of `leanvit.ops.sparse`: predictor, selection and attention in one pass over blocks of queries.

Compiled by Numba when first used, cached on disk by Numba, and run by the threads of torch's own pool: a pool beside it
would have to wait for torch's idle threads, which spin.

Keys are pooled part by part, and whoever finishes a head's last part adds up all of them: were whole heads the tasks,
threads would idle where heads are few. How a block of queries goes, for one image and head: coefficients against the
pooled keys; then, query by query, the largest coefficients, the sum of as many sparse rows of the basis, the largest
scores of that sum, and attention to those keys. No array is larger than one head's keys, or one query's scores. Rows
are padded with zeros to whole vectors.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import cfunc, types

from .vectors import (
    LANES,
    WIDE,
    add,
    add_one,
    add_product,
    at_least,
    exp2,
    first,
    inline,
    integer,
    larger,
    largest,
    load,
    load_bf16,
    multiply,
    multiply_add,
    number,
    ones,
    smaller,
    smallest,
    splat,
    store,
    store_bf16,
    store_byte,
    store_integer,
    store_number,
    store_places,
    store_totals,
    take_one,
    tallied,
    tally,
    total,
)  # fmt: skip

QUERIES = 16
"""Queries a task: enough to share what is read of the predictor, few enough that all threads get their share."""
KEYS_AT_A_TIME = 64
"""Keys that are projected before they are pooled."""
(
    NEXT_TASK, TASKS, HEADS, TOKENS, PREFIX, POSITIONS, BASIS_ROWS, WIDE_ROWS, TOP, KEEP, THRESHOLD, BF16,
    Q, Q_IMAGE, Q_HEAD, Q_TOKEN, K, K_IMAGE, K_HEAD, K_TOKEN, V, V_IMAGE, V_HEAD, V_TOKEN,
    OUT, OUT_IMAGE, OUT_HEAD, OUT_TOKEN, MASK, PLACES, KEYS, VALUES, POOLED,
    Q_WEIGHT, K_WEIGHT, POOLING, BASIS_STARTS, BASIS_BLOCKS, BASIS_VALUES,
    PARTS, POOLED_PARTS, POOLED_DONE, FIELDS,
) = range(43)  # fmt: skip
"""What a call is told: counts, addresses, and strides in elements. The threshold travels in billionths."""

F32, I32, I64 = 4, 4, 8
NOTHING, SMALL = np.float32(-3e38), np.float32(2e-38)
FEW, MANY = (0.6, 0.75, 0.85, 0.93), (0.0, 0.03, 0.12, 0.4)
"""Where the border of the largest coefficients, and of the best scores, is looked for first: where it is on photos."""
PLACES_OF_BITS = np.array(
    [([i for i in range(8) if bits >> i & 1] + 8 * [0])[:8] for bits in range(256)], np.uint8
)  # fmt: skip
"""Which bits of a byte are set, then zeros, ``(256, 8)``."""


@inline
def whole(count):
    """Numbers in whole vectors that hold so many."""
    return (count + LANES - 1) // LANES * LANES


@inline
def _load_row(address, offset, bf16, width, scale, to):
    """Bring a row of q, k or v to scratch."""
    for j in range(0, width, LANES):
        if bf16:
            x = load_bf16(address + 2 * (offset + j))
        else:
            x = load(address + F32 * (offset + j))
        store(to + F32 * j, multiply(x, splat(scale)))


@inline
def _project(x, weight, rows, width, columns, out):
    """out (rows, columns) = x (rows, width) · weight (width, columns), rows and columns multiples of 16."""
    for i in range(0, rows * columns, LANES):
        store(out + F32 * i, splat(np.float32(0)))
    for t in range(0, rows, LANES):
        for j in range(0, columns, LANES):
            to = out + F32 * (t * columns + j)
            row = x + F32 * t * width
            add_product(row, F32 * width, F32, weight + F32 * j, F32 * columns, width, to, F32 * columns)


@inline
def _counts(x, vectors, b0, b1, b2, b3):
    """How many values are at least as large as each of four borders."""
    w0, w1, w2, w3 = splat(b0), splat(b1), splat(b2), splat(b3)
    if WIDE:  # comparing gives sixteen bits; elsewhere it gives lanes, and bits would have to be made of them
        n0, n1, n2, n3 = 0, 0, 0, 0
        for i in range(vectors):
            values = load(x + F32 * LANES * i)
            n0 += ones(at_least(values, w0))
            n1 += ones(at_least(values, w1))
            n2 += ones(at_least(values, w2))
            n3 += ones(at_least(values, w3))
        return n0, n1, n2, n3
    zero = splat(np.float32(0))
    t0, t1, t2, t3 = zero, zero, zero, zero
    for i in range(vectors):
        values = load(x + F32 * LANES * i)
        t0, t1 = tally(t0, values, w0), tally(t1, values, w1)
        t2, t3 = tally(t2, values, w2), tally(t3, values, w3)
    return tallied(t0), tallied(t1), tallied(t2), tallied(t3)


@inline
def _write_down(bits, start, found, chosen):
    """Write down which of sixteen bits are set; how many numbers are there then.

    Eight places are written at a time, without a branch: what is behind the last one means nothing.
    """
    for part in range(0, LANES, 8):
        byte = (bits >> np.uint64(part)) & np.uint64(255)
        store_places(chosen + I32 * found, PLACES_OF_BITS.ctypes.data + 8 * np.int64(byte), start + part)
        found += ones(byte)
    return found


@inline
def _largest(x, count, low, wanted, guesses, chosen):
    """Write down which values are the largest, in ascending order, ties to the lower index; how many there are.

    The border between them and the rest is bracketed by counting how many values lie above it.

    Args:
        x: Address of the values; what follows them up to a whole vector is less than `low`.
        count: How many.
        low: No value is less.
        wanted: How many of them to find.
        guesses: Where to look first, four shares of the way from `low` to the largest value, ascending.
        chosen: Address of the result.
    """
    vectors = whole(count) // LANES
    high = load(x)
    for i in range(1, vectors):
        high = larger(high, load(x + F32 * LANES * i))
    top = largest(high)
    above = np.float32(top + abs(top) * np.float32(1e-6) + np.float32(SMALL))
    many, few = count, 0  # values from `low` on, values from `above` on
    span = np.float32(above - low)
    # More than `low`, since many scores are zero.
    b0, b1 = np.float32(low + span * guesses[0] + SMALL), np.float32(low + span * guesses[1])
    b2, b3 = np.float32(low + span * guesses[2]), np.float32(low + span * guesses[3])
    while many > wanted:
        n0, n1, n2, n3 = _counts(x, vectors, b0, b1, b2, b3)
        before = span
        if n3 >= wanted:
            low, many = b3, n3
        elif n2 >= wanted:
            low, many, above, few = b2, n2, b3, n3
        elif n1 >= wanted:
            low, many, above, few = b1, n1, b2, n2
        elif n0 >= wanted:
            low, many, above, few = b0, n0, b1, n1
        else:
            above, few = b0, n0
        span = np.float32(above - low)
        if span >= before or span <= SMALL:
            break  # neighbouring numbers: what lies between is equal
        # Close to where the border is if values are spread evenly, and half as far, in case they are not.
        part = np.float32(many - wanted) / np.float32(many - few)
        rest = np.float32(1) - part
        b0, b1 = np.float32(low + span * part * 0.5), np.float32(low + span * part * 0.9)
        b2, b3 = np.float32(low + span * (part + rest * 0.1)), np.float32(low + span * (part + rest * 0.5))
    border, ties, found = splat(low), wanted - few, 0
    for i in range(vectors):
        values = load(x + F32 * LANES * i)
        bits = at_least(values, border)
        if many > wanted:  # of those that tie at the border, the first ones
            sure = at_least(values, splat(above))
            tied = bits ^ sure
            bits = sure
            while ties > 0 and tied != np.uint64(0):
                bits |= tied & -tied
                tied &= tied - np.uint64(1)
                ties -= 1
        found = _write_down(bits, LANES * i, found, chosen)
    return found


@inline
def _add_two(x, y, v, w, a, b):
    """Add x·v and y·w to two sums; to one alone where registers are few."""
    if WIDE:
        return multiply_add(x, load(v), a), multiply_add(y, load(w), b)
    return multiply_add(y, load(w), multiply_add(x, load(v), a)), b


@inline
def _attend(q, keys, values, chosen, count, weights, out, width):
    """out = softmax(q·kᵀ)·v over the chosen keys; q is scaled to powers of two."""
    for i in range(count, count + 3):
        store_integer(chosen + I32 * i, integer(chosen))  # to groups of four
    zero, row = splat(np.float32(0)), F32 * width
    for i in range(0, count, 4):
        at = chosen + I32 * i
        k0, k1 = keys + row * integer(at), keys + row * integer(at + I32)
        k2, k3 = keys + row * integer(at + 2 * I32), keys + row * integer(at + 3 * I32)
        s0, s1, s2, s3 = zero, zero, zero, zero
        for j in range(0, row, F32 * LANES):
            x = load(q + j)
            s0, s1 = multiply_add(x, load(k0 + j), s0), multiply_add(x, load(k1 + j), s1)
            s2, s3 = multiply_add(x, load(k2 + j), s2), multiply_add(x, load(k3 + j), s3)
        store_totals(weights + F32 * i, s0, s1, s2, s3)
    nothing = splat(NOTHING)
    store(weights + F32 * count, nothing)
    high = nothing
    for i in range(0, count, LANES):
        high = larger(high, load(weights + F32 * i))
    top, mass = splat(np.float32(-largest(high))), zero
    for i in range(0, count, LANES):
        x = exp2(add(load(weights + F32 * i), top))
        store(weights + F32 * i, x)
        mass = add(mass, x)
    # What follows the weights is 2^-126 now, which is nothing.
    share = splat(np.float32(1) / total(mass))
    group = 4 * F32 * LANES
    for j in range(0, row, group):
        one, two, three = j + group // 4 < row, j + group // 2 < row, j + 3 * group // 4 < row
        a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
        for i in range(0, count, 2):
            x, v = splat(number(weights + F32 * i)), values + row * integer(chosen + I32 * i) + j
            y, w = splat(number(weights + F32 * (i + 1))), values + row * integer(chosen + I32 * (i + 1)) + j
            a0, b0 = _add_two(x, y, v, w, a0, b0)
            if one:
                a1, b1 = _add_two(x, y, v + F32 * LANES, w + F32 * LANES, a1, b1)
            if two:
                a2, b2 = _add_two(x, y, v + 2 * F32 * LANES, w + 2 * F32 * LANES, a2, b2)
            if three:
                a3, b3 = _add_two(x, y, v + 3 * F32 * LANES, w + 3 * F32 * LANES, a3, b3)
        store(out + j, multiply(share, add(a0, b0)))
        if one:
            store(out + j + F32 * LANES, multiply(share, add(a1, b1)))
        if two:
            store(out + j + 2 * F32 * LANES, multiply(share, add(a2, b2)))
        if three:
            store(out + j + 3 * F32 * LANES, multiply(share, add(a3, b3)))


@inline
def _place(a, image, patch):
    """The position of a patch token."""
    return integer(a[PLACES] + I32 * (image * (a[TOKENS] - a[PREFIX]) + patch)) if a[PLACES] else patch


@inline
def _pool(a, image, head, part, width, half, room):
    """Pack a part of one head's keys and values, and pool the projected keys: the first stage."""
    tokens, prefix, wide, bf16 = a[TOKENS], a[PREFIX], a[WIDE_ROWS], a[BF16]
    which = image * a[HEADS] + head
    keys, values = a[KEYS] + F32 * which * tokens * width, a[VALUES] + F32 * which * tokens * width
    each = (tokens - prefix + a[PARTS] - 1) // a[PARTS]
    first, last = prefix + part * each, min(prefix + (part + 1) * each, tokens)
    one = np.float32(1)
    for t in range(first if part else 0, last):
        at = image * a[K_IMAGE] + head * a[K_HEAD] + t * a[K_TOKEN]
        _load_row(a[K], at, bf16, width, one, keys + F32 * t * width)
        at = image * a[V_IMAGE] + head * a[V_HEAD] + t * a[V_TOKEN]
        _load_row(a[V], at, bf16, width, one, values + F32 * t * width)
    size = half * wide
    parts = a[POOLED_PARTS] + F32 * which * a[PARTS] * size
    pooled = parts + F32 * part * size
    for i in range(0, size, LANES):
        store(pooled + F32 * i, splat(np.float32(0)))
    pooling, weight = a[POOLING] + F32 * head * a[POSITIONS] * wide, a[K_WEIGHT] + F32 * head * width * half
    gathered = room + F32 * KEYS_AT_A_TIME * half
    for start in range(first, last, KEYS_AT_A_TIME):
        count = min(KEYS_AT_A_TIME, last - start)
        # Sixteen rows at a time: the last ones may be values of other tokens, which nothing reads.
        _project(keys + F32 * start * width, weight, count, width, half, room)
        rows = pooling + F32 * (start - prefix) * wide
        if a[PLACES]:
            rows = gathered
            for t in range(count):
                row = pooling + F32 * _place(a, image, start - prefix + t) * wide
                for j in range(0, wide, LANES):
                    store(gathered + F32 * (t * wide + j), load(row + F32 * j))
        for j in range(0, wide, LANES):
            for i in range(0, half, LANES):
                to = pooled + F32 * (i * wide + j)
                add_product(room + F32 * i, F32, F32 * half, rows + F32 * j, F32 * wide, count, to, F32 * wide)
    if add_one(a[POOLED_DONE] + I64 * which) == a[PARTS] - 1:  # the last one adds up all, in order
        for i in range(0, size, LANES):
            x = load(parts + F32 * i)
            for j in range(1, a[PARTS]):
                x = add(x, load(parts + F32 * (j * size + i)))
            store(a[POOLED] + F32 * (which * size + i), x)


@inline
def _coefficients(a, row, wide, chosen):
    """Turn a query's logits into coefficients, but for a factor, and write down which are the largest.

    Returns:
        How many are written down, and the sum of all.
    """
    count = a[BASIS_ROWS]
    low, high = splat(np.float32(0)), splat(NOTHING)
    for i in range(0, wide, LANES):
        low = smaller(low, load(row + F32 * i))
    at = row + F32 * (wide - LANES)
    store(at, first(load(at), count - wide + LANES, splat(NOTHING)))
    for i in range(0, wide, LANES):
        high = larger(high, load(row + F32 * i))
    found = _largest(row, count, smallest(low), min(a[TOP], count), FEW, chosen)
    top, mass = splat(np.float32(-largest(high))), splat(np.float32(0))
    for i in range(0, wide, LANES):
        x = exp2(add(load(row + F32 * i), top))
        store(row + F32 * i, x)
        mass = add(mass, x)
    return found, total(mass)


@inline
def _select(a, image, head, row, rows, scores, kept, picked):
    """The best-scored patches for one query, in ascending order; how many there are."""
    patches = a[TOKENS] - a[PREFIX]
    few, mass = _coefficients(a, row, a[WIDE_ROWS], rows)
    for i in range(0, whole(a[POSITIONS]), LANES):
        store(scores + F32 * i, splat(np.float32(0)))
    starts = a[BASIS_STARTS] + I32 * head * a[BASIS_ROWS]
    for i in range(few):
        which = integer(rows + I32 * i)
        coefficient = splat(number(row + F32 * which))
        for b in range(integer(starts + I32 * which), integer(starts + I32 * (which + 1))):
            to = scores + F32 * LANES * integer(a[BASIS_BLOCKS] + I32 * b)
            store(to, multiply_add(coefficient, load(a[BASIS_VALUES] + F32 * LANES * b), load(to)))
    if a[PLACES]:
        for i in range(patches):
            store_number(kept + F32 * i, number(scores + F32 * _place(a, image, i)))
        scores = kept
    at = scores + F32 * (whole(patches) - LANES)
    store(at, first(load(at), patches - whole(patches) + LANES, splat(np.float32(-1))))
    count = _largest(scores, patches, np.float32(0), a[KEEP], MANY, picked)
    if a[THRESHOLD] > 0:
        border, best = np.float32(a[THRESHOLD] * 1e-9 * mass), np.float32(0)
        if a[PREFIX] == 0:  # the best one is attended to all the same
            for i in range(count):
                best = max(best, number(scores + F32 * integer(picked + I32 * i)))
            border = min(border, best)
        left = 0
        for i in range(count):
            which = integer(picked + I32 * i)
            store_integer(picked + I32 * left, which)
            left += number(scores + F32 * which) >= border
        count = left
    return count


@inline
def _attend_block(a, image, head, start, stop, width, half, room):
    """Predict, select and attend for queries start … stop of one head: the second stage."""
    tokens, prefix, wide, bf16 = a[TOKENS], a[PREFIX], a[WIDE_ROWS], a[BF16]
    which = image * a[HEADS] + head
    keys, values = a[KEYS] + F32 * which * tokens * width, a[VALUES] + F32 * which * tokens * width
    long = _long(a)
    q = room
    small = q + F32 * QUERIES * width
    logits = small + F32 * QUERIES * half
    out = logits + F32 * QUERIES * wide
    scores = out + F32 * width
    kept, weights = scores + F32 * long, scores + 2 * F32 * long
    chosen, rows = scores + 3 * F32 * long, scores + 4 * F32 * long

    scale = np.float32(1.4426950408889634 / np.sqrt(width))  # softmax by powers of two
    for t in range(start, stop):
        at = image * a[Q_IMAGE] + head * a[Q_HEAD] + t * a[Q_TOKEN]
        _load_row(a[Q], at, bf16, width, scale, q + F32 * (t - start) * width)
    _project(q, a[Q_WEIGHT] + F32 * head * width * half, QUERIES, width, half, small)
    _project(small, a[POOLED] + F32 * which * half * wide, QUERIES, half, wide, logits)
    for i in range(prefix):
        store_integer(chosen + I32 * i, i)
    for t in range(start, stop):
        if t < prefix:  # it attends to all
            count = tokens
            for i in range(tokens):
                store_integer(chosen + I32 * i, i)
        else:
            picked = chosen + I32 * prefix
            count = _select(a, image, head, logits + F32 * (t - start) * wide, rows, scores, kept, picked)
            for i in range(count):
                store_integer(picked + I32 * i, integer(picked + I32 * i) + prefix)
            count += prefix
        if a[MASK]:
            mask = a[MASK] + (which * tokens + t) * tokens
            for i in range(tokens):
                store_byte(mask + i, 0)
            for i in range(count):
                store_byte(mask + integer(chosen + I32 * i), 1)
        else:
            _attend(q + F32 * (t - start) * width, keys, values, chosen, count, weights, out, width)
            at = image * a[OUT_IMAGE] + head * a[OUT_HEAD] + t * a[OUT_TOKEN]
            for j in range(0, width, LANES):
                if bf16:
                    store_bf16(a[OUT] + 2 * (at + j), load(out + F32 * j))
                else:
                    store(a[OUT] + F32 * (at + j), load(out + F32 * j))


@inline
def _long(a):
    """Room for something of every position or token, and what is written beyond it."""
    return whole(max(a[POSITIONS], a[TOKENS])) + 2 * LANES


def compile_kernels(width, disk):
    """The two stages for heads of a width; each is run by every thread at once, with the address of a call's fields.

    Args:
        width: d, a multiple of 16.
        disk: Whether to keep it on disk.
    """
    signature = types.void(types.CPointer(types.int64))

    @cfunc(signature, fastmath=True, error_model="numpy", cache=disk)
    def pool(a):
        half = whole(width // 2)
        room = np.empty(KEYS_AT_A_TIME * (half + (a[WIDE_ROWS] if a[PLACES] else 0)), np.float32)
        while True:
            task = take_one(a)
            if task >= a[TASKS]:
                return
            which, part = task // a[PARTS], task % a[PARTS]
            _pool(a, which // a[HEADS], which % a[HEADS], part, width, half, room.ctypes.data)

    @cfunc(signature, fastmath=True, error_model="numpy", cache=disk)
    def attend(a):
        half = whole(width // 2)
        rows = whole(a[BASIS_ROWS])
        room = np.empty(QUERIES * (width + half + a[WIDE_ROWS]) + width + 4 * _long(a) + rows, np.float32)
        chunks = (a[TOKENS] + QUERIES - 1) // QUERIES
        while True:
            task = take_one(a)
            if task >= a[TASKS]:
                return
            which, start = task // chunks, task % chunks * QUERIES
            stop = min(start + QUERIES, a[TOKENS])
            _attend_block(a, which // a[HEADS], which % a[HEADS], start, stop, width, half, room.ctypes.data)

    return pool, attend
