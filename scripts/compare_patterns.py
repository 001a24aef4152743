"""The field's patterns beside each other: `hf-sparse-attn compare-patterns`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("compare-patterns")
