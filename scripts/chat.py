"""Questions about a long document: `hf-sparse-attn chat`, from a checkout."""

try:
    from hf_sparse_attn.cli.main import run_command
except KeyboardInterrupt:  # these imports take seconds
    raise SystemExit(130) from None

if __name__ == "__main__":
    run_command("chat")
