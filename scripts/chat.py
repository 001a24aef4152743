"""Questions about a long document: `hf-sparse-attn chat`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("chat")
