"""The support matrix: every model family on every path, and what is declared to come of it.

A path is a function of a family that checks the path against the specification; its docstring says what it means.
`tests/test_matrix.py` runs every cell and `docs/support.md` shows them.
"""

from dataclasses import dataclass

from matrix import attention, batches, caches, generation, graphs, masks, training

THEMES = {
    "One forward": attention.PATHS,
    "Padding and packing": batches.PATHS,
    "Caches": caches.PATHS,
    "generate": generation.PATHS,
    "4D masks and other arguments": masks.PATHS,
    "Training and precision": training.PATHS,
    "Graphs": graphs.PATHS,
}
PATHS = {name: check for paths in THEMES.values() for name, check in paths.items()}


@dataclass(frozen=True)
class Outcome:
    """What a cell ends in: "yes", "refused" with one clear ValueError, or "-": Transformers does not offer it.

    Args:
        symbol: what the table shows.
        message: of the error that is raised, whole; Transformers raises its own under its eager attention too.
        error: type of that error.
    """

    symbol: str
    message: str = ""
    error: type[Exception] = ValueError


def refused(what):
    return Outcome("refused", f'attn_implementation="sparse" does not support {what}; choose another implementation')


EVERY_FAMILY = "*"
NO_DICT_OF_MASKS = Outcome("-", "'dict' object has no attribute 'ndim'", AttributeError)
DECLARED = {
    (EVERY_FAMILY, "4D mask of a prefix LM"): refused(
        "a 4D attention_mask other than causal attention inside documents"
    ),
    (EVERY_FAMILY, "output_attentions"): refused("output_attentions=True, because attention weights are never formed"),
    (EVERY_FAMILY, "attention dropout"): refused("attention dropout (attention_dropout=0.1)"),
    **{
        (family, "4D masks by layer type"): NO_DICT_OF_MASKS
        for family in ("llama", "mistral", "mistral-sliding", "phi3", "phi3-sliding", "mixtral")
    },
}


def declared(family, path):
    """What the cell is declared to end in; "yes" unless something else is."""
    return DECLARED.get((family, path)) or DECLARED.get((EVERY_FAMILY, path)) or Outcome("yes")
