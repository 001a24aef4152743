"""Products of small matrices whose sums stay in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hf_sparse_attn.ops.numba.kernels import inlined
from hf_sparse_attn.ops.numba.simd import LANES, address_of, spread, vector_of

ROWS = 8 if LANES == 16 else 4  # of a tile: its sums fill half of the registers


def _product(num_vectors: int, left_is_transposed: bool) -> Any:
    """The intrinsic for ROWS rows and so many vectors."""

    def multiply(
        typing_context, left, at_left, left_step, right, at_right, right_step, n, out, at_out, out_step, start
    ):
        def generate(context, builder, signature, arguments):
            left, at_left, left_step, right, at_right, right_step, n, out, at_out, out_step, start = arguments
            left_type, right_type, out_type = signature.args[0], signature.args[3], signature.args[7]
            size, zero, one = out_type.dtype.bitwidth // 8, ir.Constant(n.type, 0), ir.Constant(n.type, 1)
            kind = vector_of(context.get_data_type(out_type.dtype))

            def plus(base: Any, step: Any, number: int) -> Any:
                return builder.add(base, builder.mul(step, ir.Constant(n.type, number)))

            def vectors(array_type: Any, array: Any, base: Any) -> list[Any]:
                places = (plus(base, one, v * LANES) for v in range(num_vectors))
                return [address_of(context, builder, array_type, array, place) for place in places]

            data = context.make_array(left_type)(context, builder, left).data
            row_step, column_step = (one, left_step) if left_is_transposed else (left_step, one)
            rows = [builder.gep(data, [plus(at_left, row_step, r)]) for r in range(ROWS)]
            sums = [vectors(out_type, out, plus(at_out, out_step, r)) for r in range(ROWS)]
            before = builder.block
            onto, loop, end = (builder.append_basic_block() for _ in range(3))
            builder.cbranch(start, loop, onto)
            builder.position_at_end(onto)
            held = [[builder.load(place, align=size) for place in row] for row in sums]
            builder.branch(loop)

            builder.position_at_end(loop)
            k = builder.phi(n.type)
            totals = [[builder.phi(kind) for _ in row] for row in sums]
            right_row = builder.add(at_right, builder.mul(k, right_step))
            factors = [builder.load(place, align=size) for place in vectors(right_type, right, right_row)]
            added = []
            for row, of_row in zip(rows, totals, strict=True):
                number = spread(builder, builder.load(builder.gep(row, [builder.mul(k, column_step)])))
                products = [builder.fmul(number, factor, flags=("contract",)) for factor in factors]
                added.append([builder.fadd(*pair, flags=("contract",)) for pair in zip(products, of_row, strict=True)])
            nothing = [[ir.Constant(kind, None)] * num_vectors] * ROWS
            following = builder.add(k, one)
            for origin, number, values in ((before, zero, nothing), (onto, zero, held), (loop, following, added)):
                k.add_incoming(number, origin)
                for of_row, row in zip(totals, values, strict=True):
                    for phi, value in zip(of_row, row, strict=True):
                        phi.add_incoming(value, origin)
            builder.cbranch(builder.icmp_signed("<", following, n), loop, end)

            builder.position_at_end(end)
            for row, places in zip(added, sums, strict=True):
                for value, place in zip(row, places, strict=True):
                    builder.store(value, place, align=size)
            return context.get_dummy_value()

        place = types.intp, types.intp
        return types.void(left, *place, right, *place, types.intp, out, *place, types.boolean), generate

    step = "k to k; rows" if left_is_transposed else "row to row; all k"
    multiply.__doc__ = f"""out[r, c] = sum over k of left[r, k] * right[k, c]: ROWS rows, {num_vectors} * LANES columns.

    Each sum goes from the first k to the last. Arrays are addressed by the flat index of an element.

    Args:
        left, at_left, left_step: the first element, and the step from {step} lie side by side.
        right, at_right, right_step: the first element, and the step from k to k; columns lie side by side.
        n: how many k, at least 1.
        out, at_out, out_step: the first element, and the step from row to row.
        start: False: the sums go on from what stands in `out`.
    """
    return intrinsic(multiply)


product = _product(2, left_is_transposed=False)
_narrow_product = _product(1, left_is_transposed=False)
_transposed_product = _product(2, left_is_transposed=True)
_narrow_transposed_product = _product(1, left_is_transposed=True)
WIDE = 2 * LANES  # columns of `product`


@inlined
def multiply(left, at_left, left_step, right, at_right, right_step, n, out, at_out, size, start):
    """As `product`, for rows of `out` of `size` columns, a multiple of LANES."""
    wide = size - size % WIDE
    for d in range(0, wide, WIDE):
        product(left, at_left, left_step, right, at_right + d, right_step, n, out, at_out + d, size, start)
    if wide < size:
        at_rest = at_right + wide
        _narrow_product(left, at_left, left_step, right, at_rest, right_step, n, out, at_out + wide, size, start)


@inlined
def multiply_transposed(left, at_left, left_step, right, at_right, right_step, n, out, at_out, size, start):
    """As `multiply`, where n rows of `left` hold a number for each of the ROWS."""
    wide = size - size % WIDE
    for d in range(0, wide, WIDE):
        _transposed_product(left, at_left, left_step, right, at_right + d, right_step, n, out, at_out + d, size, start)
    if wide < size:
        at_rest, at_out = at_right + wide, at_out + wide
        _narrow_transposed_product(left, at_left, left_step, right, at_rest, right_step, n, out, at_out, size, start)
