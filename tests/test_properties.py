"""Whatever the layout, the cache and the configuration, a document gets what it gets alone, by the specification.

Each case is a batch that this file lays out itself (padding, packed documents, one forward or pieces with a cache), so
it knows every document's columns. A long run, with statistics of what the cases covered:

    pytest tests/test_properties.py --hypothesis-profile=long --hypothesis-show-statistics
"""

import functools
import operator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from helpers.batches import tokens
from helpers.families import FAMILIES, tiny_model
from helpers.operation import KeyMask, calibrated_hash_text, make_pattern
from helpers.specification import TOLERANCE
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, MistralConfig, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.integration import record, sparse_attention_forward
from hf_sparse_attn.ops.reference import attended_keys

CACHES = ("dynamic", "dynamic, keeps every key", "static")
MASKS_4D = ("4D bool", "4D float")


@dataclass(frozen=True)
class Row:
    """Padding, documents of these lengths side by side, padding."""

    documents: tuple[int, ...]
    left: int = 0
    right: int = 0


@dataclass(frozen=True)
class Layout:
    """A batch, how Transformers is told about it, and the forwards that compute it."""

    rows: tuple[Row, ...]
    # position_ids that start anew with each document, those of the columns, "falling" ones that mean nothing, or "none"
    positions: str = "documents"
    mask: str = "none"  # "2D", one of MASKS_4D, or "none"
    packing: str = "position_ids"  # "cu_seq_lens" or "seq_idx" where a collator passes these as well
    cache: str = "none"  # or one of CACHES
    pieces: tuple[int, ...] = ()  # with a cache: sizes of the forwards, the last one repeated to the end
    unfilled: int = 0  # slots of a static cache that stay empty

    @property
    def width(self):
        return self.rows[0].left + sum(self.rows[0].documents) + self.rows[0].right

    @property
    def is_padded(self):
        return any(row.left or row.right for row in self.rows)

    @property
    def is_packed(self):
        return any(len(row.documents) > 1 for row in self.rows)

    def documents(self):
        """Batch row and columns of every document."""
        for batch, row in enumerate(self.rows):
            for start, stop in pairwise(accumulate(row.documents, initial=row.left)):
                yield batch, slice(start, stop)

    def document_numbers(self):
        """[batch, width]: 1, 2, ... within each row; 0 for padding."""
        numbers = torch.zeros(len(self.rows), self.width, dtype=torch.int32)
        for batch, columns in self.documents():
            numbers[batch, columns] = numbers[batch].max() + 1
        return numbers

    def position_ids(self):
        """[batch, width], [1, width] or None."""
        if self.positions == "none":
            return None
        if self.positions == "columns":
            return torch.arange(self.width)[None]
        if self.positions == "falling":
            return (torch.arange(self.width) // 2 % 7)[None]
        ids = torch.zeros(len(self.rows), self.width, dtype=torch.long)
        for batch, columns in self.documents():
            ids[batch, columns] = torch.arange(columns.stop - columns.start)
        return ids

    def attention_mask(self, columns, slots, sliding_window=None):
        """What a caller passes to the forward of these columns whose keys are in these slots: 2D, 4D or None."""
        if self.mask == "none":
            return None
        number = self.document_numbers()
        if self.mask == "2D":
            return (number[:, : columns.stop] > 0).long()
        # As Transformers builds it, padding on the right reads what the last token reads.
        reader = torch.where(number > 0, number, number.cummax(-1).values)[:, columns, None]
        key = nn.functional.pad(number, (0, self.unfilled))[:, None, slots]
        behind = torch.arange(self.width)[columns, None] - torch.arange(self.width + self.unfilled)[slots]
        mask = ((key == reader) & (key > 0) & (behind >= 0) & (behind < (sliding_window or self.width)))[:, None]
        mask = mask & (number[:, columns] > 0).any()  # where no query is a token, nobody reads itself
        if self.mask == "4D bool":
            return mask
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)

    def forwards(self):
        """Columns of every forward."""
        if self.cache == "none":
            return [slice(0, self.width)]
        sizes = (*self.pieces, *[self.pieces[-1]] * self.width)
        stops = [min(stop, self.width) for stop in accumulate(sizes, initial=0)]
        return [slice(start, stop) for start, stop in pairwise(stops) if start < stop]

    def new_cache(self, config):
        if self.cache == "none":
            return None
        if self.cache == "static":
            return StaticCache(config=config, max_cache_len=self.width + self.unfilled)
        return DynamicCache(config=config) if self.cache == "dynamic" else DynamicCache()

    def calls(self, cache, sliding_window):
        """Columns of every forward and what a caller passes to it."""
        position_ids, number = self.position_ids(), self.document_numbers()
        kwargs = {}
        if self.packing == "cu_seq_lens":
            ends = torch.tensor([*accumulate(self.rows[0].documents, initial=0)], dtype=torch.int32)
            kwargs = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        elif self.packing == "seq_idx":
            kwargs = {"seq_idx": number}
        for columns in self.forwards():
            num_keys, first = self.width, 0
            if cache is not None:
                num_keys, first = cache.get_mask_sizes(columns.stop - columns.start, 0)
            mask = self.attention_mask(columns, slice(first, first + num_keys), sliding_window)
            call = {"attention_mask": mask, "past_key_values": cache, **kwargs}
            if position_ids is not None:
                call["position_ids"] = position_ids[:, columns]
            yield columns, call


@dataclass(frozen=True)
class Case:
    """A layout, the shape and kind of one attention layer, and its configuration."""

    layout: Layout
    sparse: dict
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 1
    value_dim: int = 1
    scaling: float = 1.0
    layer_idx: int = 0
    sliding_window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    seed: int = 0

    def config(self):
        hash_text = {}
        if self.sparse.get("hash") == "calibrated":  # kept out of `sparse`, which is printed
            text = calibrated_hash_text(self.layer_idx + 1, self.num_kv_heads, self.head_dim)
            hash_text = {"calibrated_hash": text}
        return SparseAttentionConfig(**self.sparse, **hash_text)

    def inputs(self):
        """Query, key, value and perhaps sinks, as a layer makes them; padding is made of numbers as well."""
        generator = torch.Generator().manual_seed(self.seed)
        random = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
        shapes = [
            (self.num_heads, self.head_dim),
            (self.num_kv_heads, self.head_dim),
            (self.num_kv_heads, self.value_dim),
        ]
        inputs = [random(len(self.layout.rows), self.layout.width, *shape).transpose(1, 2) for shape in shapes]
        return [*inputs, random(self.num_heads)] if self.has_sinks else inputs


class Attention(nn.Module):
    """What the attention function sees of a model's layer."""

    def __init__(self, case):
        super().__init__()
        self.config = MistralConfig(
            num_hidden_layers=case.layer_idx + 1, sliding_window=case.sliding_window, attn_implementation="sparse"
        )
        self.config.sparse_attention = case.config().to_dict()
        self.layer_idx = case.layer_idx
        self.is_causal = True


def attend(case, query, key, value, sinks=None, recorder=None):
    """[batch, width, num_heads, value_dim], computed as in a model: with Transformers' own masks and caches."""
    module = Attention(case)
    make_mask = create_causal_mask if case.sliding_window is None else create_sliding_window_causal_mask
    cache = case.layout.new_cache(module.config)
    outputs = []
    with record(module, recorder):
        for columns, kwargs in case.layout.calls(cache, case.sliding_window):
            queries, keys, values = (x[:, :, columns] for x in (query, key, value))
            mask = make_mask(
                config=module.config,
                inputs_embeds=queries[:, 0],
                attention_mask=kwargs.pop("attention_mask"),
                past_key_values=kwargs.pop("past_key_values"),
                position_ids=kwargs.get("position_ids"),
            )
            if cache is not None:
                for layer_idx in range(case.layer_idx):  # the first layer's cache tells the mask's size
                    cache.update(keys, values, layer_idx)
                keys, values = cache.update(keys, values, case.layer_idx)
            kwargs |= {"scaling": case.scaling, "dropout": 0.0, "sliding_window": case.sliding_window}
            if case.softcap is not None:
                kwargs["softcap"] = case.softcap
            if sinks is not None:
                kwargs["s_aux"] = sinks
            output, weights = sparse_attention_forward(module, queries, keys, values, mask, **kwargs)
            assert weights is None
            outputs.append(output)
    return torch.cat(outputs, 1)


def attended_alone(case, query, key, sinks=None):
    """Batch row, columns and S(row) [num_heads, tokens, tokens] of every document."""
    pattern = make_pattern(
        case.config(), case.num_heads, case.num_kv_heads, case.head_dim, case.layer_idx, case.sliding_window
    )
    for batch, columns in case.layout.documents():
        parts = query[batch, :, columns], key[batch, :, columns], pattern, 0
        yield batch, columns, attended_keys(*parts, scaling=case.scaling, softcap=case.softcap, sinks=sinks)


def attend_alone(case, query, key, value, sinks=None):
    """As `attend`: each document alone, by a softmax over the specification's keys; zeros for padding."""
    group = case.num_heads // case.num_kv_heads
    output = query.new_zeros(len(query), case.layout.width, case.num_heads, case.value_dim)
    for batch, columns, attended in attended_alone(
        case, query.detach(), key.detach(), None if sinks is None else sinks.detach()
    ):
        keys, values = (x[batch, :, columns].repeat_interleave(group, 0) for x in (key, value))
        scores = query[batch, :, columns] @ keys.transpose(1, 2) * case.scaling
        if case.softcap is not None:
            scores = case.softcap * (scores / case.softcap).tanh()
        weights = scores.masked_fill(~attended, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks.exp()[:, None, None]
        output[batch, columns] = (weights / total @ values).transpose(0, 1)
    return output


class Reads(KeyMask):
    """Counts what rows read by their positions, over all documents."""

    def add_dense(self, pattern, heads, start, stop):
        """`heads` may be those of all rows of the batch."""
        for _ in range(0, len(heads), len(self.count)):
            super().add_dense(pattern, range(len(self.count)), start, stop)


@st.composite
def layouts(draw, most_tokens, caches=CACHES, masks_4d=MASKS_4D):
    """Up to three rows of 80 tokens each, together at most `most_tokens`."""
    packing = draw(st.sampled_from(["position_ids"] * 10 + ["seq_idx", "cu_seq_lens"]))
    in_one_go = packing != "position_ids"  # so collators pass it: without padding and without a cache
    num_rows = draw(st.integers(1, 1 if packing == "cu_seq_lens" else 3))
    widest = min(most_tokens // num_rows, 80)
    width = draw(st.integers(1, widest) | st.integers(widest // 3, widest) | st.integers(widest // 2, widest))
    side = "none" if in_one_go else draw(st.sampled_from(["none", "left", "right", "any"]))
    is_packed = draw(st.booleans())
    rows = []
    for _ in range(num_rows):
        most = width if rows else width - 1  # the first row holds at least one token
        padding = draw(st.integers(0, most // 3) | st.integers(0, most)) if side != "none" else 0
        left = draw(st.integers(0, padding)) if side == "any" else padding * (side == "left")
        length = width - padding
        starts = draw(st.sets(st.integers(1, length - 1), max_size=3)) if is_packed and length > 1 else ()
        edges = [0, *sorted(starts), length] if length else []
        rows.append(Row(tuple(stop - start for start, stop in pairwise(edges)), left, padding - left))
    layout = Layout(tuple(rows), packing=packing)
    masks = ["2D"] * 3 + [*masks_4d]
    layout = replace(layout, mask=draw(st.sampled_from(masks if layout.is_padded else ["none"] * 3 + masks)))
    cache = "none" if in_one_go else draw(st.sampled_from(["none", *caches]))
    if cache != "none":
        size = st.integers(1, width)
        pieces = st.tuples(size) | st.tuples(size, st.just(1)) | st.lists(size, min_size=2, max_size=4).map(tuple)
        layout = replace(layout, cache=cache, pieces=draw(pieces))
    if cache == "static":
        layout = replace(layout, unfilled=draw(st.integers(0, 5)))
    if not in_one_go and layout.mask not in MASKS_4D and (layout.mask == "2D" or cache != "none"):
        # Here position_ids do not tell what is packed: each row is one document.
        rows = tuple(replace(row, documents=(sum(row.documents),) if row.documents else ()) for row in rows)
        layout = replace(layout, rows=rows)
        return replace(layout, positions=draw(st.sampled_from(["documents", "columns", "falling", "none"])))
    # Else position_ids alone tell: the packing, or, beside a 4D mask, how many keys a cache has dropped.
    is_told = (layout.mask in MASKS_4D and cache == "none") or in_one_go
    if is_told or (not layout.is_packed and layout.mask not in MASKS_4D):
        layout = replace(layout, positions=draw(st.sampled_from(["documents", "columns", "none"])))
    return layout


HUGE = st.just(2**30)  # buffers must not follow the number
DEPENDENT = {  # fields that do nothing by themselves
    "stride_offset": 0,
    "stride_width": 1,
    "dilation": 1,
    "block_offset": 0,
    "num_neighbouring_blocks": 0,
    "num_random_blocks": 0,
}


@st.composite
def fixed_keys(draw):
    """The fields of a layer's or a KV head's patterns that are not routed."""
    fields = draw(
        st.fixed_dictionaries(
            {"window_size": st.integers(1, 9) | HUGE, "num_global_tokens": st.integers(0, 3)},
            optional={
                "global_token_indices": st.lists(st.integers(0, 70), max_size=3),
                "stride": st.integers(0, 11),
                "num_random_keys": st.integers(0, 4),
                "dilated_window_size": st.integers(0, 5),
                "slash_distances": st.lists(st.integers(0, 70), max_size=3),
                "block_size": st.integers(0, 9) | st.just(100),
            },
        )
    )
    if stride := fields.get("stride"):
        offset = draw(st.integers(0, stride - 1))
        fields |= {"stride_offset": offset, "stride_width": draw(st.integers(1, stride - offset))}
    if fields.get("dilated_window_size"):
        fields["dilation"] = draw(st.integers(1, 20) | HUGE)
    if size := fields.get("block_size"):
        fields["block_offset"] = draw(st.integers(0, size - 1))
        fields |= {name: draw(st.integers(0, 2)) for name in ("num_neighbouring_blocks", "num_random_blocks")}
    return fields


def patterns(num_layers, num_heads, num_kv_heads):
    """Fields of `SparseAttentionConfig`, of a size that matters within a few dozen tokens."""
    budget = st.integers(0, 9) | HUGE
    layer_budget = budget | st.lists(budget, min_size=num_kv_heads, max_size=num_kv_heads)
    weight = st.sampled_from([0.0, 0.0, 0.01, 0.05, 0.2])
    layer_weight = weight | st.lists(weight, min_size=num_heads, max_size=num_heads)
    own = fixed_keys().map(lambda fields: DEPENDENT | fields)
    others = st.fixed_dictionaries(
        {
            "key_budget": budget | st.lists(layer_budget, min_size=num_layers, max_size=num_layers),
            "min_weight": weight | st.lists(layer_weight, min_size=num_layers, max_size=num_layers),
            "num_hash_bits": st.integers(1, 5),
            "page_size": st.integers(1, 9) | st.integers(60, 80) | HUGE,
            "dense_below": st.sampled_from([0, 0, 0, 0, 1, 7, 19, 40]),
        },
        optional={
            "by_layer": st.lists(own, max_size=2),
            "by_kv_head": st.lists(own, max_size=num_kv_heads),
            "hash": st.sampled_from(["calibrated", "random"]),
            "seed": st.integers(0, 2**16),
            "dense_layers": st.lists(st.integers(0, 2), max_size=1),
            "implementation": st.sampled_from(["auto", "torch", "reference"]),
        },
    )
    return st.builds(operator.or_, fixed_keys(), others)


@st.composite
def cases(draw, head_dims=range(1, 10), **choices):
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layer_idx = draw(st.sampled_from([0, 0, 1, 2]))
    num_heads, head_dim = num_kv_heads * group, draw(st.sampled_from(head_dims))
    return Case(
        layout=draw(layouts(480 // num_heads, **choices)),
        sparse=draw(patterns(layer_idx + 1, num_heads, num_kv_heads)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, head_dim, 6])),
        scaling=draw(st.sampled_from([1.0, 0.4])),
        layer_idx=layer_idx,
        sliding_window=draw(st.none() | st.integers(2, 40)),  # DynamicCache itself can't do 1
        softcap=draw(st.sampled_from([None, None, 2.0])),
        has_sinks=draw(st.sampled_from([False, False, True])),
        seed=draw(st.integers(0, 2**16)),
    )


def count_layout(layout):
    """Have the statistics of a run show what the case covers."""
    sides = {(row.left > 0, row.right > 0) for row in layout.rows if row.documents}
    names = {(True, False): "left", (False, True): "right", (True, True): "both sides of a row"}
    padding = names.get(*sides, "whole rows") if len(sides) == 1 else "differs by row"
    event("padding", padding if layout.is_padded else "none")
    lengths = [len(row.documents) for row in layout.rows]
    forwards = [columns.stop - columns.start for columns in layout.forwards()]
    pieces = "one" if len(forwards) == 1 else "one token at a time" if forwards[-2:] == [1, 1] else "several"
    if min(lengths) == 0:
        event("a row of padding alone")
    if layout.is_packed:
        event("packed and padded" if layout.is_padded else "packed, no padding")
        event("packed, mask", layout.mask)
        event("packed, forwards", pieces)
    event("mask", layout.mask)
    event("position_ids", layout.positions)
    event("packing told by", layout.packing)
    event("cache", layout.cache)
    event("forwards", pieces)


def count_case(case):
    count_layout(case.layout)
    budget = case.sparse["key_budget"]
    layer_budget = budget if isinstance(budget, int) else budget[case.layer_idx]
    event("model's own window", "none" if case.sliding_window is None else "yes")
    event("softcap", "none" if case.softcap is None else "yes")
    event("sinks", "yes" if case.has_sinks else "none")
    event("hash", case.sparse.get("hash", "random"))
    event("budget", "by head" if isinstance(layer_budget, list) else "by layer" if isinstance(budget, list) else "one")
    event("min_weight" if case.sparse["min_weight"] else "reads every scored key")
    event("dense layer" if case.layer_idx in case.sparse.get("dense_layers", []) else "sparse layer")
    names = ("dense_below", "global_token_indices", "stride", "stride_offset", "num_random_keys", "dilated_window_size")
    names += ("slash_distances", "block_size", "num_neighbouring_blocks", "num_random_blocks", "by_layer", "by_kv_head")
    for name in (*names, "seed"):
        if case.sparse.get(name):
            event(name)
    event("implementation", case.sparse.get("implementation", "auto"))


@given(case=cases())
def test_output(case):
    count_case(case)
    inputs = case.inputs()
    with torch.no_grad():
        output, expected = attend(case, *inputs), attend_alone(case, *inputs)
    is_token = case.layout.document_numbers() > 0
    torch.testing.assert_close(output[is_token], expected[is_token], **TOLERANCE)
    # 4D masks let padding read.
    assert output.isfinite().all() if case.layout.mask in MASKS_4D else not output[~is_token].any()


@given(case=cases(caches=CACHES[:2]))  # a static cache overwrites what the backward needs
def test_gradients(case):
    count_case(case)
    gradients = []
    for compute in (attend, attend_alone):
        inputs = [x.requires_grad_() for x in case.inputs()]
        output = compute(case, *inputs)[case.layout.document_numbers() > 0]
        probe = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(case.seed + 1))
        gradients.append(torch.autograd.grad(output, inputs, probe, materialize_grads=True))
    torch.testing.assert_close(*gradients, **TOLERANCE)


@given(case=cases(masks_4d=()))  # under which padding reads
def test_what_is_read(case):
    """As sets, and no key twice: how many documents' rows at a position read each position."""
    count_case(case)
    inputs, width = case.inputs(), case.layout.width
    reads, expected = (Reads(case.num_heads, width, width) for _ in range(2))
    with torch.no_grad():
        attend(case, *inputs, recorder=reads)
        for _, _, attended in attended_alone(case, *inputs[:2], *inputs[3:]):
            length = attended.shape[1]
            expected.count[:, :length, :length] += attended
            if (attended.sum(-1) < torch.arange(length) + 1).any():
                event("a document with keys left out")
    assert torch.equal(reads.count, expected.count)


# Even, as under any RoPE: PyTorch rounds a dot product by whether its vectors start at multiples of 16 bytes.
@given(case=cases(head_dims=(2, 4, 6, 8)), cut=st.integers(0, 79))
def test_later_tokens_change_no_bit(case, cut):
    """Nor do what padding holds, and other tokens of the batch from the cut on."""
    count_case(case)
    cut = 1 + cut % max(case.layout.width - 1, 1)
    inputs, others = case.inputs(), replace(case, seed=case.seed + 1).inputs()
    changed = [
        torch.cat([x[:, :, :cut], other[:, :, cut:]], 2) for x, other in zip(inputs[:3], others[:3], strict=True)
    ]
    with torch.no_grad():
        before, after = attend(case, *inputs), attend(case, *changed, *inputs[3:])
    assert torch.equal(after[:, :cut], before[:, :cut])


@functools.cache
def model_of(family):
    return tiny_model(family)


def has_one_kind_of_layer(family):
    return len(set(getattr(model_of(family).config, "layer_types", None) or [None])) == 1


@st.composite
def model_cases(draw):
    family = draw(st.sampled_from(list(FAMILIES)))
    masks_4d = MASKS_4D if has_one_kind_of_layer(family) else ()  # one 4D mask holds for all layers
    return family, draw(layouts(60, masks_4d=masks_4d)), draw(patterns(num_layers=2, num_heads=4, num_kv_heads=2))


@given(case=model_cases())
@settings(max_examples=settings().max_examples // 2)
def test_logits_of_a_model(case):
    family, layout, sparse = case
    count_layout(layout)
    event("family", family)
    model, ids = model_of(family), tokens(layout.width, len(layout.rows))
    if sparse.get("hash") == "calibrated":
        sparse = {**sparse, "calibrated_hash": calibrated_hash_text()}
    model.config.sparse_attention = sparse
    cache = layout.new_cache(model.config)
    pieces = []
    with torch.no_grad():
        for columns, kwargs in layout.calls(cache, getattr(model.config, "sliding_window", None)):
            pieces.append(model(ids[:, columns], use_cache=cache is not None, **kwargs).logits)
        together = torch.cat(pieces, 1)
        assert together.isfinite().all()
        model.config.sparse_attention = {**sparse, "implementation": "reference"}
        positions = layout.position_ids()
        if positions is None:
            positions = torch.arange(layout.width)[None]
        for batch, columns in layout.documents():
            position_ids = positions[batch % len(positions), None, columns]
            row = ids[batch, None, columns]
            mask = torch.ones_like(row)  # one document, whatever position_ids are
            alone = model(row, position_ids=position_ids, attention_mask=mask, use_cache=False).logits[0]
            torch.testing.assert_close(together[batch, columns], alone, **TOLERANCE)
