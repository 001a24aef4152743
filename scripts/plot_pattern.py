"""A picture of who reads what: `hf-sparse-attn plot`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("plot")
