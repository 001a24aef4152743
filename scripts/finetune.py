"""Fine-tune on long documents: `hf-sparse-attn finetune`, from a checkout."""

try:
    from hf_sparse_attn.cli.finetune import resolve_checkpoint  # noqa: F401
    from hf_sparse_attn.cli.main import run_command
except KeyboardInterrupt:  # these imports take seconds
    raise SystemExit(130) from None

if __name__ == "__main__":
    run_command("finetune")
