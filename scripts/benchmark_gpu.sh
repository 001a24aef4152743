#!/usr/bin/env bash
# On a machine with a GPU: test the Triton kernels there, then measure them against SDPA with each of its backends and
# FlexAttention, forward, backward and decoding steps, Llama-3-8B's and Mistral-7B's attention (32 query heads over 8 KV heads of 128),
# and whole models of that shape.
#   scripts/benchmark_gpu.sh [DIRECTORY]    where the results go (default: benchmarks)
# Python with this package, torch and triton must be active; tests need pytest and hypothesis.
set -euo pipefail
cd "$(dirname "$0")/.."

OUTPUT="${1:-benchmarks}"
PYTHON="${PYTHON:-python}"
mkdir -p "$OUTPUT"
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "benchmark_gpu.sh: error: PyTorch sees no GPU"'
"$PYTHON" -m pytest -q tests/ops/test_triton.py tests/ops/test_triton_index.py \
    tests/test_decoding_graph_gpu.py
"$PYTHON" -m hf_sparse_attn info --gpu --output "$OUTPUT/gpu_check.json"
measure() {
    "$PYTHON" scripts/benchmark.py --device cuda --dtype bfloat16 --num-heads 32 --num-kv-heads 8 --head-dim 128 \
        --sparse-attention '{"implementation": "triton"}' "$@"
}
BACKENDS=(--backends flash cudnn efficient flex)
measure --seq-lens 4096 8192 16384 32768 65536 131072 262144 "${BACKENDS[@]}" --output "$OUTPUT/gpu_forward.json"
measure --seq-lens 4096 8192 16384 32768 65536 131072 "${BACKENDS[@]}" --pass forward_backward \
    --output "$OUTPUT/gpu_forward_backward.json"
measure --seq-lens 8192 32768 65536 131072 --pass decode --output "$OUTPUT/gpu_decode.json"
"$PYTHON" scripts/roofline.py --seq-lens 16384 32768 65536 131072 --output "$OUTPUT/gpu_kernels.json"

# Whole models of Llama-3-8B's shape, the decoding step eager and as a CUDA graph; random weights give random queries
# and keys, the sparse side's worst case.
measure_model() {
    "$PYTHON" scripts/benchmark.py --device cuda --dtype bfloat16 --random-model llama-3-8b --repeats 2 \
        --sparse-attention '{"implementation": "triton"}' "$@"
}
measure_model --seq-lens 16384 32768 65536 131072 --pass prefill --output "$OUTPUT/gpu_prefill.json"
measure_model --seq-lens 16384 131072 --pass generation --output "$OUTPUT/gpu_generation.json"
measure_model --seq-lens 8192 --pass training_step --output "$OUTPUT/gpu_training_step.json"
