"""Keys named by their tokens (global tokens of a task; Longformer, Beltagy et al. 2020, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Marked:
    """`global_token_ids` in one document: the keys of tokens with these ids.

    A config does not know where they stand, so there is no `of`: `attention` reads it from the marks of a forward
    (`global_tokens`), and `LayerPattern.marked` carries it.

    Args:
        marks: [N] bool, True where a key's token has one of the ids.
        offset: position of the first of these keys.
    """

    marks: Tensor
    offset: int = 0

    @classmethod
    def in_document(cls, token_ids: Tensor, global_token_ids: tuple[int, ...]) -> Marked | None:
        """Those of a document [N] that is known by its tokens; None where no id is global."""
        if not global_token_ids:
            return None
        return cls(torch.isin(token_ids.cpu(), torch.tensor(global_token_ids)))

    def positions(self, start: int, stop: int, device: torch.device) -> Tensor:
        first = max(start - self.offset, 0)
        found = self.marks[first : max(stop - self.offset, first)].nonzero().flatten()
        return (found + self.offset + first).to(device)

    def admits(self, position: Tensor) -> Tensor:
        marked = self.marks.nonzero().flatten() + self.offset
        return (position[:, None] == marked.to(position.device)).any(-1)


def marks_are_missing() -> ValueError:
    """The one error where a config asks for global tokens by id and nobody has said where they stand."""
    return ValueError(
        "global_token_ids needs the token ids of every forward, which an attention function never sees: call "
        "hf_sparse_attn.mark_global_tokens(model) once after loading the model, as hf_sparse_attn.load_model does; "
        "where there are no token ids, name positions by global_token_indices"
    )
