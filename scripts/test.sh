#!/usr/bin/env bash
# Set up, then run every check: style, types, and the tests with the demo model's real weights.
# The tests run in as many processes as there are cores. Arguments go to pytest:  scripts/test.sh -m "not real_weights"
set -euo pipefail
cd "$(dirname "$0")/.."

export VENV="${VENV:-.venv}"
scripts/setup.sh
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy" hf_sparse_attn
"$VENV/bin/python" -m pytest --numprocesses logical --dist worksteal "$@"
