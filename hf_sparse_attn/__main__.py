"""`python -m hf_sparse_attn`: the console command."""

from hf_sparse_attn.cli.main import main

if __name__ == "__main__":
    main()
