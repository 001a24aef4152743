"""One page of what other commands measured: `hf-sparse-attn report`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("report")
