"""Compile every Triton kernel for a GPU that need not be there, and print what each one takes of it.

python tests/ops/compile_kernels.py 90 6    compute capability, number of SHAPES; one JSON object per kernel and shape
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.ops.common.chunked import Call
from hf_sparse_attn.ops.triton import chunks as implementation
from hf_sparse_attn.ops.triton import index as triton_index
from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.patterns import layer_pattern

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
}
# dtype, query heads, KV heads, head_dim, softcap
SHAPES = [
    (torch.bfloat16, 32, 8, 128, None),
    (torch.float32, 2, 2, 256, None),
    (torch.float16, 9, 3, 80, 30.0),
    (torch.bfloat16, 16, 1, 256, None),
    (torch.float32, 32, 8, 128, None),
    (torch.bfloat16, 4, 4, 64, None),
]


def compile_kernel(capability, kernel, args, kwargs):
    """Resources of one kernel with these arguments, as `kernel[grid](*args, **kwargs)` would compile it."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}

    def specialize(path, value, parameter):
        """Type of an argument, or those of a named tuple's members, to which `do_not_specialize` does not apply."""
        if isinstance(value, tuple) and not parameter.is_constexpr:
            return type(value)(*(specialize((*path, i), member, parameter) for i, member in enumerate(value)))
        free = parameter.do_not_specialize and len(path) == 1
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not free):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not free):
            attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"

    for place, parameter in enumerate(kernel.params):
        signature[parameter.name] = specialize((place,), values[parameter.name], parameter)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = assemble(compiled.asm["ptx"])
    return {"shared": compiled.metadata.shared, "registers": registers, "spilled_bytes": spilled}


def assemble(ptx):
    """Registers per thread and bytes spilled, as the assembler counts them."""
    assembler = next((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
    target = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.ptx")
        path.write_text(ptx)
        command = [str(assembler), "-v", f"--gpu-name={target}", str(path), "-o", str(path.with_suffix(".cubin"))]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
    return tuple(int(match.group(1)) for match in found)


def main():
    capability = int(sys.argv[1])
    seen = set()

    def launch(kernel, grid, *args, **kwargs):
        name = kernel.fn.__name__
        if (name, shape) not in seen:
            seen.add((name, shape))
            stages = triton_launch.stages(triton_launch.first_tensor(args))
            resources = compile_kernel(capability, kernel, args, kwargs | stages)
            print(json.dumps({"kernel": name, "shape": [str(x) for x in shape], **resources}), flush=True)

    triton_launch.launch = launch
    triton_launch._has_little_memory = lambda device: capability not in (90, 100)
    triton_launch._multiplies_from_shared_memory = lambda device: capability == 100
    torch.empty = torch.zeros  # nothing is written
    for shape in SHAPES[: int(sys.argv[2])]:
        dtype, num_heads, num_kv_heads, head_dim, softcap = shape
        query = torch.zeros(num_heads, 2560, head_dim, dtype=dtype)
        key = torch.zeros(num_kv_heads, 2560, head_dim, dtype=dtype)
        config = SparseAttentionConfig(dense_below=2048)
        pattern = layer_pattern(config, 0, num_heads, num_kv_heads, head_dim, query.device, torch.float32)
        call = Call(None, pattern, 0, 0, head_dim**-0.5, softcap, True, None, statistics=[], output=query)
        rows = query[:, 2048:]
        for chunk in implementation._chunks(query, key, 2048, 2560, call):
            chunk.attend(torch.empty_like(rows), rows, key, key)
        for chunk in implementation._chunks(query, key, 2048, 2560, replace(call, backward=True)):
            chunk.differentiate(rows, rows, key, key)
        index = triton_index.Index(pattern, num_kv_heads, 0)
        index.append(key)
        longer = torch.cat([key, key[:, :1]], 1)
        index.attend(replace(call, query_offset=2560), query[:, :1], longer, longer, None)


if __name__ == "__main__":
    main()
