"""One HTML page that shows a document's tokens and, for each sampled row, its keys among them; it needs no network."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_sparse_attn.pictures.read_rows import KINDS, LayerMass, RowKeys, RowReader
from hf_sparse_attn.pictures.readable_tokens import Token

TEMPLATE = Path(__file__).with_name("page.html")
MOST_BYTES = 5_000_000  # that any browser opens at once
WEIGHT_STEPS = 2048  # a weight w is stored as the nearest integer to -WEIGHT_STEPS * log2(w), 16 bits of it
_LIGHTEST = 2**16 - 1


@dataclass(frozen=True)
class PageDocument:
    """What a page says of the forward beside its rows.

    Args:
        name: of the document.
        model: of the model.
        sparse_attention: fields of its sparse attention.
        tokens: of the document.
    """

    name: str
    model: str
    sparse_attention: Mapping[str, Any]
    tokens: Sequence[Token]


def write_page(document: PageDocument, reader: RowReader, path: Path, most_bytes: int | None = None) -> None:
    """Write the page of what was read; the same document gives the same bytes.

    Args:
        document: what was read.
        reader: how; it has read the document.
        path: the file.
        most_bytes: every second row is left out until the page has at most so many, or one row is left; None: any size.
    """
    rows: Mapping[tuple[int, int], Sequence[RowKeys]] = reader.rows
    page = render_page(document, reader.layers, rows)
    while most_bytes is not None and len(page) > most_bytes and (num_rows := len(next(iter(rows.values())))) > 1:
        rows = {place: found[(num_rows - 1) % 2 :: 2] for place, found in rows.items()}
        page = render_page(document, reader.layers, rows)
    path.write_text(page, encoding="ascii", newline="\n")


def render_page(
    document: PageDocument, layers: Mapping[int, LayerMass], rows: Mapping[tuple[int, int], Sequence[RowKeys]]
) -> str:
    """The page, all of it ASCII.

    Args:
        document: what was read.
        layers: density and mass of every layer with attention.
        rows: by layer and head; all at the same positions.
    """
    positions = [row.position for row in next(iter(rows.values()))]
    data = {
        "name": document.name,
        "model": document.model,
        "fields": {name: _short(value) for name, value in document.sparse_attention.items()},
        "tokens": [token.text for token in document.tokens],
        "special": [i for i, token in enumerate(document.tokens) if token.is_special],
        "continued": [i for i, token in enumerate(document.tokens) if token.is_continued],
        "kinds": KINDS,
        "weightSteps": WEIGHT_STEPS,
        "rows": positions,
        "layers": [_overview(layers.get(layer)) for layer in range(max(layers) + 1)],
        "pictures": [{"layer": layer, "head": head, **_packed(found)} for (layer, head), found in rows.items()],
    }
    # Inside a <script>, only "<" can end it; in JSON it stands within strings alone.
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    title = html.escape(document.name).encode("ascii", "xmlcharrefreplace").decode()
    parts = {"title": title, "data": embedded}
    template = TEMPLATE.read_text(encoding="ascii")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _overview(layer: LayerMass | None) -> dict[str, Any] | None:
    if layer is None:
        return None
    return {"density": layer.density.numpy().round(5).tolist(), "mass": layer.mass.numpy().round(5).tolist()}


def _packed(rows: Sequence[RowKeys]) -> dict[str, str]:
    """The rows of one head as base64 of little-endian numbers.

    "numbers": int32 [R, 4], admissible, scored, read and stored keys. "kept": float32 [R]. "weights": uint16 of all
    stored keys, row after row. "keys": for each of these one LEB128 number, 8 * (distance from the key before, or from
    position 0) + kind.
    """
    numbers = [[row.num_admissible, row.num_scored, row.num_read, len(row.keys)] for row in rows]
    steps = [8 * np.diff(row.keys.numpy(), prepend=0) + row.kinds.numpy() for row in rows]
    with np.errstate(divide="ignore"):
        codes = -WEIGHT_STEPS * np.log2(np.concatenate([row.weights.double().numpy() for row in rows]))
    arrays = {
        "numbers": np.array(numbers, "<i4"),
        "kept": np.array([row.kept for row in rows], "<f4"),
        "weights": codes.round().clip(0, _LIGHTEST).astype("<u2"),
        "keys": _leb128(np.concatenate(steps)),
    }
    return {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}


def _leb128(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Unsigned numbers as bytes of 7 bits, the lowest first; all but a number's last byte have the eighth bit set."""
    rest = numbers.astype(np.int64)
    columns = [rest & 127]
    while (rest := rest >> 7).any():
        columns.append(rest & 127)
    table = np.stack(columns, 1)
    length = 1 + (np.cumsum(table[:, ::-1], 1)[:, ::-1][:, 1:] > 0).sum(1)
    place = np.arange(table.shape[1])
    table = table | 128 * (place < length[:, None] - 1)
    packed: np.ndarray[Any, Any] = table[place < length[:, None]].astype(np.uint8)
    return packed


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
