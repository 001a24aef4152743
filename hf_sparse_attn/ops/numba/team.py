"""A loop of compiled code whose turns the threads of PyTorch's own OpenMP share.

After an operation these threads wait busily for the next one, so they begin at once, and threads of any other kind
would have to take their cores from them.
"""

from __future__ import annotations

from ctypes import c_void_p, cast
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hf_sparse_attn.ops.common.threads import LIBRARIES

_PARALLEL = getattr(LIBRARIES, "GOMP_parallel", None)  # of libgomp; Intel's and LLVM's libraries have it, too
_START = 0 if _PARALLEL is None else cast(_PARALLEL, c_void_p).value or 0
_BYTES = ir.IntType(8).as_pointer()


def own_team() -> tuple[int, int]:
    """How OpenMP starts its threads, and how many there are for this thread's operations; no such way: (0, 1)."""
    return (_START, torch.get_num_threads()) if _START else (0, 1)


@intrinsic
def share(typing_context, team, num_turns, work, arguments):
    """work(turn, *arguments) for each turn of range(num_turns), in any order and by several threads at a time.

    Args:
        team: what `own_team` gives; one thread takes all turns by itself.
        work: a compiled function, which returns nothing and raises nothing.
    """
    kinds = (types.intp, *arguments.types)
    typing_context.resolve_function_type(work, kinds, {})

    def generate(context, builder, signature, given):
        (start, num_threads), num_turns = cgutils.unpack_tuple(builder, given[0], 2), given[1]
        task = cgutils.pack_struct(builder, [ir.Constant(num_turns.type, 0), num_turns, given[3]])
        place = cgutils.alloca_once_value(builder, task)
        data = builder.bitcast(place, _BYTES)
        take_turns = _turns(context, builder, place.type, work, kinds)
        alone = builder.or_(_equals(builder, start, 0), _equals(builder, num_threads, 1))
        with builder.if_else(alone) as (by_itself, in_team):
            with by_itself:
                builder.call(take_turns, [data])
            with in_team:
                number = ir.IntType(32)
                kind = ir.FunctionType(ir.VoidType(), [take_turns.type, _BYTES, number, number])
                launch = builder.inttoptr(start, kind.as_pointer())
                builder.call(launch, [take_turns, data, builder.trunc(num_threads, number), number(0)])
        return context.get_dummy_value()

    return types.void(team, types.intp, work, arguments), generate


def _equals(builder: Any, number: Any, value: int) -> Any:
    return builder.icmp_signed("==", number, ir.Constant(number.type, value))


def _turns(context: Any, builder: Any, task: Any, work: Any, kinds: tuple[Any, ...]) -> Any:
    """A function of a pointer to (the next turn, their number, the arguments) that takes turns until none is left."""
    compiled = work.dispatcher.get_compile_result(types.void(*kinds))
    context.active_code_library.add_linking_library(compiled.library)
    name = builder.module.get_unique_name("take_turns")
    function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_BYTES]), name)
    function.linkage = "internal"
    own = ir.IRBuilder(function.append_basic_block())
    place = own.bitcast(function.args[0], task)
    next_turn, num_turns, packed = (cgutils.gep_inbounds(own, place, 0, i) for i in range(3))
    arguments = cgutils.unpack_tuple(own, own.load(packed), len(kinds) - 1)
    again, turn_left, end = (function.append_basic_block() for _ in range(3))
    own.branch(again)
    own.position_at_end(again)
    turn = own.atomic_rmw("add", next_turn, ir.Constant(next_turn.type.pointee, 1), "monotonic")
    own.cbranch(own.icmp_signed("<", turn, own.load(num_turns)), turn_left, end)
    own.position_at_end(turn_left)
    context.call_internal_no_propagate(own, compiled.fndesc, compiled.signature, [turn, *arguments])
    own.branch(again)
    own.position_at_end(end)
    own.ret_void()
    return function
