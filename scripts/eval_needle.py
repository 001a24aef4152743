"""Facts hidden in long text and asked for: `hf-sparse-attn eval-needle`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("eval-needle")
