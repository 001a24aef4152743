"""Fine-tune on long documents: `hf-sparse-attn finetune`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("finetune")
