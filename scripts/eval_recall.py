"""What the sparse attention keeps, by layer and head: `hf-sparse-attn eval-recall`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("eval-recall")
