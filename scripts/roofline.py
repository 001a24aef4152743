"""What the Triton kernels compute and move: `hf-sparse-attn roofline`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("roofline")
