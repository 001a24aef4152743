#!/usr/bin/env bash
# Build the documentation site from docs/, README.md and the docstrings, with every warning an error: links and anchors
# that lead nowhere among them.
#   scripts/build_docs.sh [DIRECTORY]    where the site goes (default: build/site)
#   PYTHON  an interpreter that has the extra "docs" (default: python); pip install '.[docs]'
set -euo pipefail
OUTPUT="$(realpath -m "${1:-$(dirname "$0")/../build/site}")"
cd "$(dirname "$0")/.."
if [ -n "$(ls -A "$OUTPUT" 2>/dev/null)" ] && [ ! -f "$OUTPUT/sitemap.xml" ]; then
    echo "build_docs.sh: error: DIRECTORY $OUTPUT holds something else than a site; give a new or empty one" >&2
    exit 2
fi
"${PYTHON:-python}" -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || {
    echo "build_docs.sh: error: ${PYTHON:-python} lacks MkDocs and its plugins; pip install '.[docs]' brings them" >&2
    exit 2
}
NO_MKDOCS_2_WARNING=1 "${PYTHON:-python}" -m mkdocs build --strict --clean --site-dir "$OUTPUT"
