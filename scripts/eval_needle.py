"""Facts hidden in long text and asked for: `hf-sparse-attn eval-needle`, from a checkout."""

try:
    from hf_sparse_attn.cli.main import run_command
except KeyboardInterrupt:  # these imports take seconds
    raise SystemExit(130) from None

if __name__ == "__main__":
    run_command("eval-needle")
