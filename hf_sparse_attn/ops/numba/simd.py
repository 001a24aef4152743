"""Vectors for functions compiled by Numba, one instruction each, so that sums stay in registers.

LLVM vectorises plain loops too, but checks at every start of one whether arrays overlap and how much is left of them,
which costs more than the 64 products of a row. Arrays are C-contiguous and addressed by the flat index of an element.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16 if get_host_cpu_features().get("avx512f") else 8  # what registers hold, or half of it, with enough left
_LN2_HIGH = float.fromhex("0x1.62E4p-1")  # the first digits of ln 2


class _VectorType(types.Type):
    """LANES floats of one precision."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(f"Vector({dtype})")


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: _VectorType) -> None:
        super().__init__(manager, vector, vector_of(manager.lookup(vector.dtype).get_value_type()))


def vector_of(element: Any) -> Any:
    """The type of LANES elements."""
    return ir.VectorType(element, LANES)


def address_of(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Of the LANES elements from flat index `index` on."""
    data = context.make_array(array_type)(context, builder, array).data
    element = context.get_data_type(array_type.dtype)
    return builder.bitcast(builder.gep(data, [index]), vector_of(element).as_pointer())


@intrinsic
def load(typing_context, array, index):
    """The LANES elements from flat index `index` on, as float32 of uint16 (bits of bfloat16) and int16 (of float16)."""
    half = array.dtype in (types.uint16, types.int16)

    def generate(context, builder, signature, arguments):
        address = address_of(context, builder, signature.args[0], *arguments)
        vector = builder.load(address, align=signature.args[0].dtype.bitwidth // 8)
        if array.dtype == types.int16:
            return builder.fpext(builder.bitcast(vector, vector_of(ir.HalfType())), vector_of(ir.FloatType()))
        if array.dtype == types.uint16:  # the upper half of a float32
            upper = builder.zext(vector, vector_of(cgutils.int32_t))
            shifted = builder.shl(upper, ir.Constant(upper.type, [16] * LANES))
            return builder.bitcast(shifted, vector_of(ir.FloatType()))
        return vector

    return _VectorType(types.float32 if half else array.dtype)(array, types.intp), generate


@intrinsic
def store(typing_context, array, index, vector):
    """Write LANES elements from flat index `index` on."""

    def generate(context, builder, signature, arguments):
        address = address_of(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], address, align=signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def prefetch(typing_context, array, index):
    """Have the cache line with the element at flat index `index` brought near; nothing happens outside of the array."""

    def generate(context, builder, signature, arguments):
        address = address_of(context, builder, signature.args[0], *arguments)
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, *[cgutils.int32_t] * 3])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        for_reading, near, data = (cgutils.int32_t(number) for number in (0, 3, 1))
        builder.call(function, [builder.bitcast(address, byte), for_reading, near, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def spread(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    vector = vector_of(scalar.type)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, cgutils.int32_t(0))
    zeros = ir.Constant(ir.VectorType(cgutils.int32_t, LANES), None)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


@intrinsic
def splat(typing_context, scalar):
    """The scalar in every lane."""

    def generate(context, builder, signature, arguments):
        return spread(builder, arguments[0])

    return _VectorType(scalar)(scalar), generate


@intrinsic
def multiply_add(typing_context, a, b, c):
    """a * b + c."""

    def generate(context, builder, signature, arguments):
        product = builder.fmul(*arguments[:2], flags=("contract",))
        return builder.fadd(product, arguments[2], flags=("contract",))

    return a(a, a, a), generate


@intrinsic
def add(typing_context, a, b):
    """a + b."""

    def generate(context, builder, signature, arguments):
        return builder.fadd(*arguments)

    return a(a, a), generate


@intrinsic
def negative(typing_context, vector):
    """-vector."""

    def generate(context, builder, signature, arguments):
        return builder.fneg(arguments[0])

    return vector(vector), generate


@intrinsic
def maximum(typing_context, a, b):
    """The larger one in every lane; b where one is NaN."""

    def generate(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return a(a, a), generate


@intrinsic
def minimum(typing_context, a, b):
    """The smaller one in every lane; b where one is NaN."""

    def generate(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered("<", *arguments), *arguments)

    return a(a, a), generate


@intrinsic
def drop_below(typing_context, vector, least):
    """The vector with zeros where it is under `least`."""

    def generate(context, builder, signature, arguments):
        nothing = ir.Constant(arguments[0].type, None)
        return builder.select(builder.fcmp_ordered("<", *arguments), nothing, arguments[0])

    return vector(vector, vector), generate


@intrinsic
def add_if_at_least(typing_context, sums, weights, scores, least):
    """sums + weights, integers, where a score is at least `least`; elsewhere sums."""

    def generate(context, builder, signature, arguments):
        sums, weights, scores, least = arguments
        nothing = ir.Constant(weights.type, None)
        taken = builder.select(builder.fcmp_ordered(">=", scores, least), weights, nothing)
        return builder.add(sums, taken)

    return sums(sums, sums, scores, scores), generate


@intrinsic
def lanes_at_least(typing_context, scores, least):
    """The lanes whose score is at least `least`, as the bits of an integer."""

    def generate(context, builder, signature, arguments):
        lanes = builder.bitcast(builder.fcmp_ordered(">=", *arguments), ir.IntType(LANES))
        return builder.zext(lanes, ir.IntType(64))

    return types.int64(scores, scores), generate


@intrinsic
def highest_bit(typing_context, bits):
    """Number of the highest bit that is set."""

    def generate(context, builder, signature, arguments):
        zeros = builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))
        return builder.sub(ir.Constant(ir.IntType(64), 63), zeros)

    return types.int64(types.int64), generate


@intrinsic
def store_run(typing_context, array, index, start):
    """Write start, start + 1, ... to LANES int32 elements from flat index `index` on."""

    def generate(context, builder, signature, arguments):
        array_type = signature.args[0]
        address = address_of(context, builder, array_type, *arguments[:2])
        vector = vector_of(cgutils.int32_t)
        first = builder.trunc(arguments[2], cgutils.int32_t)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), first, cgutils.int32_t(0))
        spread = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(vector, None))
        builder.store(builder.add(spread, ir.Constant(vector, list(range(LANES)))), address, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), generate


@intrinsic
def exp(typing_context, vector):
    """exp in every lane, for numbers up to 0; what would be smaller than the smallest normal number becomes it.

    2**n * e**f with n whole and |f| <= ln(2) / 2, and Taylor's series of e**f to the precision's last bits.
    """
    single = vector.dtype == types.float32
    degree, digits, bias = (7, 23, 127) if single else (13, 52, 1023)

    def generate(context, builder, signature, arguments):
        (x,) = arguments
        integers = ir.VectorType(ir.IntType(32 if single else 64), LANES)

        def constant(number: float) -> Any:
            return ir.Constant(x.type, [number] * LANES)

        def fused(a: Any, b: Any, c: Any) -> Any:
            return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

        def whole_constant(number: int) -> Any:
            return ir.Constant(integers, [number] * LANES)

        least = constant((1 - bias) * math.log(2))
        x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
        nearest = builder.fsub(builder.fmul(x, constant(1 / math.log(2))), constant(0.5))
        n = builder.fptosi(nearest, integers)  # cuts towards 0, which rounds numbers up to 0 to the nearest
        whole = builder.sitofp(n, x.type)
        f = fused(whole, constant(-_LN2_HIGH), x)  # exact, as whole has few digits
        f = fused(whole, constant(_LN2_HIGH - math.log(2)), f)
        series = constant(1 / math.factorial(degree))
        for power in reversed(range(degree)):
            series = fused(series, f, constant(1 / math.factorial(power)))
        exponent = builder.shl(builder.add(n, whole_constant(bias)), whole_constant(digits))
        return builder.fmul(series, builder.bitcast(exponent, x.type))

    return vector(vector), generate


@intrinsic
def total(typing_context, vector):
    """Sum of the lanes."""

    def generate(context, builder, signature, arguments):
        start = ir.Constant(arguments[0].type.element, -0.0)
        function = _reduction(builder, "fadd", arguments[0].type, start.type)
        return builder.call(function, [start, arguments[0]], fastmath=("reassoc",))

    return vector.dtype(vector), generate


def _across(reduction: str, name: str) -> Any:
    """The intrinsic `name` that reduces a vector's lanes to one number."""

    def reduce(typing_context, vector):
        def generate(context, builder, signature, arguments):
            return builder.call(_reduction(builder, reduction, arguments[0].type), arguments)

        return vector.dtype(vector), generate

    reduce.__name__ = name
    return intrinsic(reduce)


whole_total = _across("add", "whole_total")  # of integers
largest = _across("fmax", "largest")
smallest = _across("fmin", "smallest")


def _reduction(builder: Any, name: str, vector: Any, *start: Any) -> Any:
    kinds = {ir.FloatType(): "f32", ir.DoubleType(): "f64", ir.IntType(32): "i32"}
    function = ir.FunctionType(vector.element, [*start, vector])
    name = f"llvm.vector.reduce.{name}.v{LANES}{kinds[vector.element]}"
    return cgutils.get_or_insert_function(builder.module, function, name)


@intrinsic
def store_totals(typing_context, array, index, a, b, c, d):
    """Write the sums of the lanes of four vectors side by side: half the instructions of four sums."""

    def generate(context, builder, signature, arguments):
        def shuffled(x: Any, y: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(cgutils.int32_t, len(lanes)), lanes))

        def pairs(x: Any, y: Any) -> Any:
            """Sums of neighbours, those of x and y in turn; inside of quarters, where shuffles are cheap."""
            even = [i for q in range(0, LANES, 4) for i in (q, q + LANES, q + 2, q + 2 + LANES)]
            return builder.fadd(shuffled(x, y, even), shuffled(x, y, [i + 1 for i in even]))

        ab, cd = pairs(*arguments[2:4]), pairs(*arguments[4:6])  # a b a b | a b a b | ...
        first = [i for q in range(0, LANES, 4) for i in (q, q + 1, q + LANES, q + 1 + LANES)]
        second = [i for q in range(0, LANES, 4) for i in (q + 2, q + 3, q + 2 + LANES, q + 3 + LANES)]
        sums = builder.fadd(shuffled(ab, cd, first), shuffled(ab, cd, second))  # a b c d | a b c d | ...
        width = LANES
        while width > 4:
            width //= 2
            sums = builder.fadd(
                shuffled(sums, sums, list(range(width))), shuffled(sums, sums, list(range(width, 2 * width)))
            )
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), sums.type.as_pointer())
        builder.store(sums, address, align=signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, a, a, a, a), generate


@intrinsic
def zeros(typing_context, array):
    """Zero in every lane, in the array's precision."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(vector_of(context.get_data_type(signature.args[0].dtype)), None)

    return _VectorType(array.dtype)(array), generate
