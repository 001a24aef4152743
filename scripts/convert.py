"""Convert a dense checkpoint: `hf-sparse-attn convert`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("convert")
