"""What the pages of `hf_sparse_attn.pictures` hold, read without their JavaScript."""

import base64
import json
import re
from itertools import pairwise

import numpy as np

SCRIPT = re.compile(r"<script[^>]*>(.*?)</script>", re.DOTALL)


def embedded(page):
    """The data of a page, its pictures by layer and head with their rows decoded."""
    data = json.loads(SCRIPT.findall(page)[0])
    data["pictures"] = {(picture["layer"], picture["head"]): decoded(picture) for picture in data["pictures"]}
    return data


def decoded(picture):
    """One dict per row: admissible, scored, read, kept, and keys with their kinds and weights."""
    numbers, kept, weights, keys = (
        np.frombuffer(base64.b64decode(picture[name]), dtype)
        for name, dtype in (("numbers", "<i4"), ("kept", "<f4"), ("weights", "<u2"), ("keys", "u1"))
    )
    numbers = numbers.reshape(-1, 4)
    entries, value, shift = [], 0, 0
    for byte in keys.tolist():
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            entries.append(value)
            value = shift = 0
    assert len(entries) == len(weights) == numbers[:, 3].sum()
    ends = [0, *numbers[:, 3].cumsum().tolist()]
    return [
        {
            "admissible": int(row[0]),
            "scored": int(row[1]),
            "read": int(row[2]),
            "kept": float(share),
            "keys": np.cumsum([entry >> 3 for entry in entries[start:stop]]),
            "kinds": np.array([entry & 7 for entry in entries[start:stop]]),
            "weights": 2.0 ** (weights[start:stop].astype(float) / -2048),
        }
        for row, share, (start, stop) in zip(numbers, kept, pairwise(ends), strict=True)
    ]
