"""Every eviction policy beside the full cache: `hf-sparse-attn eval-cache-policies`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("eval-cache-policies")
