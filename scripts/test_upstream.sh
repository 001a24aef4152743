#!/usr/bin/env bash
# Set up, then run Transformers' own tests of Llama and Mistral with the sparse attention in the place of SDPA, and
# compare test by test with SDPA itself; then break the attention on purpose. Exit status 1: some test passes with SDPA
# only, or none notices a break.
#   scripts/test_upstream.sh [--output F] [--cache DIR]
#   PYTHON, VENV  as for scripts/setup.sh
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/../tests/upstream/run.py" "$@"
