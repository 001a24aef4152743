"""Attributes by which parts of this package reach each other past Transformers' own signatures.

Transformers hands an attention function tensors and the module, and neither the cache nor the forward that they belong
to. So these ride on the tensors and the module:

| attribute | on | set by | read by | if it is lost |
|---|---|---|---|---|
| INDEXES | a cache layer's key tensor | `cache`, `custom_op` | `attention` | keys are grouped by bucket anew |
| KEPT | a cache layer's new keys | `cache.EvictingLayer` | `attention` | the next call ends in an error |
| DOCUMENTS | the mask | `masks.read` | `masks.read` | each layer reads the mask itself |
| SEEN_BY | position_ids | `notices` | `notices` | each layer looks at them itself |
| MARKS | a forward's keyword arguments | `global_tokens` | `integration` | `global_token_ids` are refused |
| TOKEN_IDS | a cache's `__dict__` | `global_tokens` | `global_tokens` | `global_token_ids` are refused |
| PATTERN | an attention layer's `__dict__` | `integration` | `integration` | the pattern is built anew |
| WATCHED | a model's modules' `__dict__` | `watching` | `integration` | compiled forwards are not recorded |
| PART | a model's modules' `__dict__` | `split_heads` | `tensor_parallel` | a part of the heads is refused |

Recorders, observers and choosers belong to a block of one thread and are context variables of `watching`.

The names begin with the package's, so that a Hub kernel (`hub_kernel`) and an installed copy of another release, whose
objects are not of the same classes, do not read what the other has left.
"""

INDEXES = f"_{__package__}_indexes"
KEPT = f"_{__package__}_kept"
DOCUMENTS = f"_{__package__}_documents"
SEEN_BY = f"_{__package__}_seen_by"
MARKS = f"_{__package__}_marks"
TOKEN_IDS = f"_{__package__}_token_ids"
PATTERN = f"_{__package__}_pattern"
WATCHED = f"_{__package__}_watched"
PART = f"_{__package__}_part"
