#!/usr/bin/env bash
# Run the tests of the attention itself on older releases of Transformers, each in a virtual environment of its own.
# scripts/test.sh runs everything on the newest.
#   scripts/test_versions.sh [VERSION ...]    (default: 5.4.0, the oldest supported, and 5.14.1)
#   PYTHON  the interpreter to make the environments from (default: python3)
#   VENVS   the directory that they go to (default: .venvs here); existing ones are brought up to date
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || set -- 5.4.0 5.14.1
for version in "$@"; do
    if ! [[ "$version" =~ ^5\.([0-9]+)\.[0-9]+$ && "${BASH_REMATCH[1]}" -ge 4 ]]; then
        echo "test_versions.sh: error: VERSION $version is no release of Transformers from 5.4.0 to before 6, such as 5.14.1" >&2
        exit 2
    fi
done

CORE="tests/test_config.py tests/test_hashing.py tests/test_routing.py tests/test_masking.py tests/test_integration.py
    tests/test_integration_paths.py tests/test_mutants.py tests/ops"
VENVS="${VENVS:-.venvs}"
failed=()
for version in "$@"; do
    venv="$VENVS/transformers-$version"
    echo "== Transformers $version, in $venv"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    # Older releases of Transformers need older ones of its companions.
    grep -vE '^(transformers|huggingface-hub|tokenizers)==' constraints.txt > "$venv/constraints.txt"
    "$venv/bin/python" -m pip install --disable-pip-version-check -c "$venv/constraints.txt" \
        -e . hypothesis pytest "transformers==$version"
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pytest $CORE || failed+=("$version")
done
echo "== Tested on Transformers $*; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
