"""RULER-style tasks, dense and sparse: `hf-sparse-attn eval-tasks`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("eval-tasks")
