"""Perplexity over long documents, dense and sparse: `hf-sparse-attn eval-perplexity`, from a checkout."""

try:
    from hf_sparse_attn.cli.main import run_command
except KeyboardInterrupt:  # these imports take seconds
    raise SystemExit(130) from None

if __name__ == "__main__":
    run_command("eval-perplexity")
