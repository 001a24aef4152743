#!/usr/bin/env bash
# Set up, then run the main job on the demo model: convert it, evaluate it dense and sparse on long documents that it
# was not calibrated on, and draw its pattern.
#   scripts/demo.sh [DIRECTORY]    where the results go (default: results), new or empty
set -euo pipefail
cd "$(dirname "$0")/.."

export VENV="${VENV:-.venv}"
OUTPUT="${1:-results}"
if [ -n "$(ls -A "$OUTPUT" 2>/dev/null)" ]; then
    echo "demo.sh: error: DIRECTORY $OUTPUT already holds something; give a new or empty one" >&2
    exit 2
fi
scripts/setup.sh
"$VENV/bin/python" scripts/convert.py --model demo --output "$OUTPUT/model"
"$VENV/bin/python" scripts/eval_perplexity.py --model "$OUTPUT/model" --dataset demo --context-length 8192 \
    --max-documents 2 --output "$OUTPUT/perplexity.json"
"$VENV/bin/python" scripts/plot_pattern.py --model "$OUTPUT/model" --output "$OUTPUT/pattern.png"
echo "Written to $OUTPUT: model, perplexity.json, pattern.png"
