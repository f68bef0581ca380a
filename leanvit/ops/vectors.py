"""Sixteen fp32 numbers at a time for kernels in Numba: values that stay in registers, memory by address.

LLVM's own vectors, so each operation is one AVX-512 instruction where there is AVX-512, and a few elsewhere. Numba's
arrays need the compiler to prove that loops may be vectorised, which it does not where one array might overlap another.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

LANES = 16
WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
"""Whether a vector is one of 32 registers; with AVX2 it is two of 16, so eight sums would fill them all."""
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def inline(function: Any) -> Any:
    """Make a function one that kernels take in where they call it."""
    return njit(fastmath=True, error_model="numpy", forceinline=True)(function)


def _operation(result: Any, *arguments: Any) -> Any:
    """Make a function that builds LLVM code, ``code(builder, *values)``, an operation that kernels can call."""

    def wrap(code: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return code(builder, *values)

        names = ", ".join(f"x{index}" for index in range(len(arguments)))
        scope = {"signature": result(*arguments), "generate": generate}
        # Numba reads from the function how many values it takes.
        exec(f"def {code.__name__}(typing, {names}): return signature, generate", scope)
        return intrinsic(scope[code.__name__])

    return wrap


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind))


def _call(builder: Any, name: str, *values: Any, result: Any = _FLOATS) -> Any:
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(builder.module.declare_intrinsic(name, (), kind), values, fastmath=("fast",))


def _constant(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * LANES)


@_operation(vector, types.int64)
def load(builder: Any, address: Any) -> Any:
    """Sixteen numbers from an address."""
    loaded = builder.load(_pointer(builder, address, _FLOATS))
    loaded.align = 4
    return loaded


@_operation(vector, types.int64)
def load_bf16(builder: Any, address: Any) -> Any:
    """Sixteen bf16 numbers from an address."""
    halves = builder.load(_pointer(builder, address, ir.VectorType(ir.IntType(16), LANES)))
    halves.align = 2
    bits = builder.shl(builder.zext(halves, _INTS), ir.Constant(_INTS, [16] * LANES))
    return builder.bitcast(bits, _FLOATS)


@_operation(types.void, types.int64, vector)
def store(builder: Any, address: Any, x: Any) -> Any:
    """Sixteen numbers to an address."""
    builder.store(x, _pointer(builder, address, _FLOATS)).align = 4
    return ir.Constant(ir.IntType(8).as_pointer(), None)


@_operation(vector, types.float32)
def splat(builder: Any, x: Any) -> Any:
    """The same number sixteen times."""
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), x, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))


@_operation(vector, vector, vector, vector)
def multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x·y + z."""
    return _call(builder, "llvm.fma.v16f32", x, y, z)


@_operation(vector, vector, vector)
def add(builder: Any, x: Any, y: Any) -> Any:
    """x + y."""
    return builder.fadd(x, y)


@_operation(vector, vector, vector)
def multiply(builder: Any, x: Any, y: Any) -> Any:
    """x·y."""
    return builder.fmul(x, y)


@_operation(vector, vector, vector)
def larger(builder: Any, x: Any, y: Any) -> Any:
    """The larger one of each pair."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


@_operation(vector, vector, vector)
def smaller(builder: Any, x: Any, y: Any) -> Any:
    """The smaller one of each pair."""
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


@_operation(vector, vector, types.int64, vector)
def first(builder: Any, x: Any, count: Any, y: Any) -> Any:
    """The first lanes of x, so many, and those of y after them."""
    count = builder.trunc(count, ir.IntType(32))
    one = builder.insert_element(ir.Constant(_INTS, ir.Undefined), count, ir.Constant(ir.IntType(32), 0))
    counts = builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))
    return builder.select(builder.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), counts), x, y)


@_operation(types.float32, vector)
def total(builder: Any, x: Any) -> Any:
    """The sum."""
    zero = ir.Constant(ir.FloatType(), 0.0)
    return _call(builder, "llvm.vector.reduce.fadd.v16f32", zero, x, result=ir.FloatType())


@_operation(types.float32, vector)
def largest(builder: Any, x: Any) -> Any:
    """The largest of the sixteen."""
    return _call(builder, "llvm.vector.reduce.fmax.v16f32", x, result=ir.FloatType())


@_operation(types.float32, vector)
def smallest(builder: Any, x: Any) -> Any:
    """The smallest of the sixteen."""
    return _call(builder, "llvm.vector.reduce.fmin.v16f32", x, result=ir.FloatType())


@_operation(types.void, types.int64, vector, vector, vector, vector)
def store_totals(builder: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sums of four vectors, side by side, to an address."""

    def halves(x: Any, y: Any, first: tuple[int, ...], second: tuple[int, ...]) -> Any:
        # In each group of four lanes, two pickings from x (0 … 3) and y (4 … 7), added.
        sides = []
        for picks in (first, second):
            lanes = [g + (p if p < 4 else p - 4 + LANES) for g in range(0, LANES, 4) for p in picks]
            sides.append(builder.shuffle_vector(x, y, ir.Constant(_INTS, lanes)))
        return builder.fadd(*sides)

    pairs = halves(a, b, (0, 4, 1, 5), (2, 6, 3, 7)), halves(c, d, (0, 4, 1, 5), (2, 6, 3, 7))
    x = halves(*pairs, (0, 1, 4, 5), (2, 3, 6, 7))  # in each group of four lanes: a part of a, b, c, d
    for width in (8, 4):
        low, high = ([*range(width)], [*range(width, 2 * width)])
        kind = ir.VectorType(ir.IntType(32), width)
        x = builder.fadd(*(builder.shuffle_vector(x, x, ir.Constant(kind, lanes)) for lanes in (low, high)))
    builder.store(x, _pointer(builder, address, ir.VectorType(ir.FloatType(), 4))).align = 4
    return ir.Constant(ir.IntType(8).as_pointer(), None)


@_operation(vector, vector, vector, vector)
def tally(builder: Any, counts: Any, x: Any, y: Any) -> Any:
    """Counts, one a lane, one more where x ≥ y; they begin with zeros, and `tallied` reads them."""
    more = builder.zext(builder.fcmp_ordered(">=", x, y), _INTS)
    return builder.bitcast(builder.add(builder.bitcast(counts, _INTS), more), _FLOATS)


@_operation(types.int64, vector)
def tallied(builder: Any, counts: Any) -> Any:
    """The sum of counts."""
    whole = ir.IntType(32)
    kind = ir.FunctionType(whole, [_INTS])
    sum_ = builder.call(
        builder.module.declare_intrinsic("llvm.vector.reduce.add.v16i32", (), kind), [builder.bitcast(counts, _INTS)]
    )
    return builder.zext(sum_, ir.IntType(64))


@_operation(types.uint64, vector, vector)
def at_least(builder: Any, x: Any, y: Any) -> Any:
    """Sixteen bits: where x ≥ y."""
    bits = builder.bitcast(builder.fcmp_ordered(">=", x, y), ir.IntType(LANES))
    return builder.zext(bits, ir.IntType(64))


@_operation(types.int64, types.uint64)
def ones(builder: Any, bits: Any) -> Any:
    """How many bits are set."""
    return builder.ctpop(bits)


# 2^x on [0, 1) by a polynomial, relative error 3e-9.
_POWERS = (2.18775048e-04, 1.23878215e-03, 9.68458045e-03, 5.54804263e-02, 2.40230502e-01, 6.93146929e-01, 1.0)


@_operation(vector, vector)
def exp2(builder: Any, x: Any) -> Any:
    """2^x for x ≤ 0, relative error under 2e-7; below 2^-126 that."""
    low = _constant(-126.0)
    x = builder.select(builder.fcmp_ordered(">", x, low), x, low)
    whole = _call(builder, "llvm.floor.v16f32", x)
    part, y = builder.fsub(x, whole), _constant(_POWERS[0])
    for power in _POWERS[1:]:
        y = _call(builder, "llvm.fma.v16f32", y, part, _constant(power))
    exponent = builder.add(builder.fptosi(whole, _INTS), ir.Constant(_INTS, [127] * LANES))
    return builder.fmul(y, builder.bitcast(builder.shl(exponent, ir.Constant(_INTS, [23] * LANES)), _FLOATS))


@_operation(types.void, types.int64, vector)
def store_bf16(builder: Any, address: Any, x: Any) -> Any:
    """Sixteen numbers to an address, rounded to the nearest bf16, halves to even."""

    def constant(value: int) -> Any:
        return ir.Constant(_INTS, [value] * LANES)

    bits = builder.bitcast(x, _INTS)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    bits = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(16))
    kind = ir.VectorType(ir.IntType(16), LANES)
    builder.store(builder.trunc(bits, kind), _pointer(builder, address, kind)).align = 2
    return ir.Constant(ir.IntType(8).as_pointer(), None)


@_operation(types.float32, types.int64)
def number(builder: Any, address: Any) -> Any:
    """One fp32 number from an address."""
    return builder.load(_pointer(builder, address, ir.FloatType()))


@_operation(types.void, types.int64, types.float32)
def store_number(builder: Any, address: Any, x: Any) -> Any:
    """One fp32 number to an address."""
    builder.store(x, _pointer(builder, address, ir.FloatType()))
    return ir.Constant(ir.IntType(8).as_pointer(), None)


@_operation(types.int64, types.int64)
def integer(builder: Any, address: Any) -> Any:
    """One int32 number from an address."""
    return builder.sext(builder.load(_pointer(builder, address, ir.IntType(32))), ir.IntType(64))


@_operation(types.void, types.int64, types.int64)
def store_integer(builder: Any, address: Any, x: Any) -> Any:
    """One number to an address, as int32."""
    builder.store(builder.trunc(x, ir.IntType(32)), _pointer(builder, address, ir.IntType(32)))
    return ir.Constant(ir.IntType(8).as_pointer(), None)


@_operation(types.void, types.int64, types.int64, types.int64)
def store_places(builder: Any, address: Any, bytes_: Any, start: Any) -> Any:
    """Eight bytes from an address, a number added to each, to an address as int32."""
    few, many = (ir.VectorType(ir.IntType(bits), 8) for bits in (8, 32))
    places = builder.zext(builder.load(_pointer(builder, bytes_, few), align=1), many)
    start = builder.trunc(start, ir.IntType(32))
    one = builder.insert_element(ir.Constant(many, ir.Undefined), start, ir.Constant(ir.IntType(32), 0))
    spread = builder.shuffle_vector(one, one, ir.Constant(many, [0] * 8))
    builder.store(builder.add(places, spread), _pointer(builder, address, many), align=4)
    return ir.Constant(ir.IntType(8).as_pointer(), None)


@_operation(types.void, types.int64, types.int64)
def store_byte(builder: Any, address: Any, x: Any) -> Any:
    """One number to an address, as a byte."""
    builder.store(builder.trunc(x, ir.IntType(8)), _pointer(builder, address, ir.IntType(8)))
    return ir.Constant(ir.IntType(8).as_pointer(), None)


@_operation(types.int64, types.CPointer(types.int64))
def take_one(builder: Any, counter: Any) -> Any:
    """Add one to a counter that threads share; gives what it was."""
    return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")


@_operation(types.int64, types.int64)
def add_one(builder: Any, address: Any) -> Any:
    """Add one to a counter that threads share, after what they wrote before; gives what it was."""
    one = ir.Constant(ir.IntType(64), 1)
    return builder.atomic_rmw("add", _pointer(builder, address, ir.IntType(64)), one, "acq_rel")


# Rows of a 16×16 tile whose sums are formed together: as many as there are registers for, so that none goes to memory.
# Sixteen vectors fill half of AVX-512's; with AVX2, where a vector takes two registers, six leave four of sixteen free.
_ROWS = (16,) if WIDE else (6, 6, 4)


@_operation(types.void, *[types.int64] * 8)
def add_product(
    builder: Any, x: Any, x_row: Any, x_step: Any, y: Any, y_step: Any, steps: Any, out: Any, out_row: Any
) -> Any:
    """out[row] += Σ x[row, step]·y[step], sixteen rows of numbers x and vectors y; all by address, strides in bytes."""
    for rows in _ROWS:
        _add_rows(builder, rows, x, x_row, x_step, y, y_step, steps, out, out_row)
        x, out = _nth(builder, x, rows, x_row), _nth(builder, out, rows, out_row)
    return ir.Constant(ir.IntType(8).as_pointer(), None)


def _nth(builder: Any, address: Any, index: int, stride: Any) -> Any:
    return builder.add(address, builder.mul(ir.Constant(address.type, index), stride))


def _add_rows(
    builder: Any, rows: int, x: Any, x_row: Any, x_step: Any, y: Any, y_step: Any, steps: Any, out: Any, out_row: Any
) -> None:
    """Some rows of `add_product`: a loop over the steps, at least one, that keeps the rows' sums in registers."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    places = [_pointer(builder, _nth(builder, out, row, out_row), _FLOATS) for row in range(rows)]
    starts = [ir.Constant(steps.type, 0), x, y, *(builder.load(place, align=4) for place in places)]
    builder.branch(loop)

    builder.position_at_end(loop)
    carried = [builder.phi(start.type) for start in starts]
    step, x_at, y_at, *sums = carried
    line = builder.load(_pointer(builder, y_at, _FLOATS), align=4)
    later = [builder.add(step, ir.Constant(steps.type, 1)), builder.add(x_at, x_step), builder.add(y_at, y_step)]
    for row, so_far in enumerate(sums):
        one = builder.load(_pointer(builder, _nth(builder, x_at, row, x_row), ir.FloatType()))
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
        spread = builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))
        later.append(_call(builder, "llvm.fma.v16f32", spread, line, so_far))
    for value, start, next_ in zip(carried, starts, later, strict=True):
        value.add_incoming(start, before)
        value.add_incoming(next_, loop)
    builder.cbranch(builder.icmp_signed("<", later[0], steps), loop, after)

    builder.position_at_end(after)
    for place, value in zip(places, later[3:], strict=True):
        builder.store(value, place, align=4)
