#!/usr/bin/env bash
# Run the tests of the attention itself on older releases of Transformers, each in a virtual environment of its own.
# scripts/test.sh runs everything on the newest.
#   scripts/test_versions.sh [VERSION ...]    (default: 5.4.0, the oldest supported, and 5.14.1)
#   TORCH   another release of torch than that of constraints.txt, such as 2.9.1, the oldest supported
#   PYTHON  the interpreter to make the environments from (default: python3)
#   VENVS   the directory that they go to (default: .venvs here); existing ones are brought up to date
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "test_versions.sh: error: $1" >&2
    exit 2
}
[ $# -gt 0 ] || set -- 5.4.0 5.14.1
for version in "$@"; do
    [[ "$version" =~ ^5\.([0-9]+)\.[0-9]+$ && "${BASH_REMATCH[1]}" -ge 4 ]] ||
        fail "VERSION $version is no release of Transformers from 5.4.0 to before 6, such as 5.14.1"
done
TORCH="${TORCH:-}"
[[ "$TORCH" =~ ^(2\.[0-9]+\.[0-9]+)?$ ]] || fail "TORCH $TORCH is no release of torch, such as 2.9.1"

TESTS=(tests/test_{config,routing,integration,integration_paths,mutants,notices,recording,tracing,composite}.py
    tests/{cache,hashing,masks,ops})
VENVS="${VENVS:-.venvs}"
failed=()
for version in "$@"; do
    venv="$VENVS/transformers-$version${TORCH:+-torch-$TORCH}"
    echo "== Transformers $version, in $venv"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    # Older releases of Transformers need older ones of its companions, and Python 3.10 of all.
    pins="$("$venv/bin/python" -c 'import sys; print("constraints.txt" if sys.version_info >= (3, 11) else "/dev/null")')"
    grep -vE "^(transformers|huggingface-hub|tokenizers${TORCH:+|torch})==" "$pins" > "$venv/constraints.txt" || true
    "$venv/bin/python" -m pip install --disable-pip-version-check -c "$venv/constraints.txt" \
        -e . hypothesis pytest "transformers==$version" "torch${TORCH:+==$TORCH}"
    "$venv/bin/python" -m pytest -m "not real_weights" "${TESTS[@]}" || failed+=("$version")
done
echo "== Tested on Transformers $*; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
