#!/usr/bin/env bash
# Build the sdist, and the wheel from it, check their metadata, and run the sdist's tests on the installed wheel in an
# empty virtual environment. Both go to dist/ if all of that passes.
#   scripts/check_release.sh [ARGUMENT ...]    arguments go to pytest: scripts/check_release.sh tests/test_config.py
#   PYTHON  the interpreter to make the environments from (default: python3)
set -euo pipefail
cd "$(dirname "$0")/.."

WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
install() {
    "$WORK/$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
}
for venv in tools venv; do
    "${PYTHON:-python3}" -m venv "$WORK/$venv"
done

echo "== Build"
install tools build twine
"$WORK/tools/bin/python" -m build --outdir "$WORK/dist" .
"$WORK/tools/bin/twine" check --strict "$WORK"/dist/*
tar -xzf "$WORK"/dist/*.tar.gz -C "$WORK"

echo "== Install"
cd "$WORK"/hf_sparse_attn-*/
wheel="$(echo "$WORK"/dist/*.whl)"
PINS="$("$WORK/venv/bin/python" -c 'import sys; print("constraints.txt" if sys.version_info >= (3, 11) else "/dev/null")')"
install venv -c "$PINS" "$wheel[test]"
version="$("$WORK/venv/bin/hf-sparse-attn" --version)"
[[ "$wheel" == */hf_sparse_attn-"$version"-* ]] || {
    echo "check_release.sh: error: $(basename "$wheel") says that its version is $version" >&2
    exit 1
}

echo "== Test"
# Not `python -m pytest`, which would import the package from here in place of the wheel.
HF_HUB_OFFLINE=1 "$WORK/venv/bin/pytest" -m "not real_weights" "$@"

cd "$OLDPWD"
mkdir -p dist
cp "$WORK"/dist/* dist/
echo "== Passed: $(ls "$WORK/dist" | tr '\n' ' ')"
