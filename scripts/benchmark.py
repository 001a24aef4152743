"""Time and memory against SDPA: `hf-sparse-attn benchmark`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("benchmark")
