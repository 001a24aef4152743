"""Whether any logit knows of later tokens: `hf-sparse-attn leak-test`, from a checkout."""

from hf_sparse_attn_command import run_command

if __name__ == "__main__":
    run_command("leak-test")
