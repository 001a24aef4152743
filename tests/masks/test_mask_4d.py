"""A caller's own 4D mask is read back into padding, documents and positions, or refused."""

import pytest
import torch

from hf_sparse_attn.masks.documents import documents
from hf_sparse_attn.masks.mask_4d import read_custom_mask
from hf_sparse_attn.masks.mask_function import signed_positions


def causal(length, sliding_window=None):
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    return mask if sliding_window is None else mask & ~mask.tril(-sliding_window)


def packed(*lengths, sliding_window=None):
    return torch.block_diag(*(causal(length, sliding_window) for length in lengths)).bool()


def split(mask, q_length, kv_length, position_ids=None, sliding_window=None):
    """Documents with plain lists for indices, and the window that holds."""
    ids = None if position_ids is None else torch.tensor(position_ids)
    signed, window = read_custom_mask(mask, ids, sliding_window)
    found = [
        (
            document.batch,
            torch.arange(q_length)[document.queries].tolist(),
            torch.arange(kv_length)[document.keys].tolist(),
            document.query_offset,
            document.key_offset,
        )
        for document in documents(signed, len(mask), q_length, kv_length)
    ]
    return found, window


def additive(mask, masked=-torch.inf, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, masked)


def span(start, stop):
    return list(range(start, stop))


FORMS = {
    "bool": lambda mask: mask,
    "-inf": additive,
    "least float32": lambda mask: additive(mask, torch.finfo(torch.float32).min),
    "least bfloat16": lambda mask: additive(mask, torch.finfo(torch.bfloat16).min, torch.bfloat16),
    "-10000 in float16": lambda mask: additive(mask, -10000, torch.float16),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


@every_form
def test_causal(form):
    assert split(form(causal(5)[None, None]), 5, 5) == ([(0, span(0, 5), span(0, 5), 0, 0)], None)


@every_form
def test_packed(form):
    mask = form(packed(3, 1, 2)[None, None])
    expected = [(0, [0, 1, 2], [0, 1, 2], 0, 0), (0, [3], [3], 0, 0), (0, [4, 5], [4, 5], 0, 0)]
    assert split(mask, 6, 6) == (expected, None)


@every_form
def test_padding_of_several_kinds(form):
    columns = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    expected = documents(signed_positions(5, 5, 5, attention_mask=columns), 5, 5, 5)
    expected = [
        (d.batch, span(d.queries.start, d.queries.stop), span(d.keys.start, d.keys.stop), 0, 0) for d in expected
    ]
    assert split(form((causal(5) & columns[:, None])[:, None]), 5, 5) == (expected, None)


def test_padded_queries_that_read_everything():
    """Some masks open rows that would read nothing, so that no softmax gives NaN."""
    mask = causal(5) & torch.tensor([0, 0, 1, 1, 1]).bool()
    mask[:2] = True
    assert split(mask[None, None], 5, 5)[0] == [(0, [2, 3, 4], [2, 3, 4], 0, 0)]


@pytest.mark.parametrize("num_queries", [1, 2, 4])
def test_cached_keys(num_queries):
    mask = causal(6)[None, None, -num_queries:]
    rows = span(0, num_queries)
    assert split(mask, num_queries, 6)[0] == [(0, rows, span(0, 6), 6 - num_queries, 0)]


def test_cached_keys_of_an_ended_document():
    mask = packed(3, 4)[None, None, -2:]
    assert split(mask, 2, 7)[0] == [(0, [0, 1], span(3, 7), 2, 0)]


def test_slots_of_a_static_cache_that_are_not_filled_yet():
    mask = torch.nn.functional.pad(causal(5), (0, 3))[None, None, 3:]
    assert split(mask, 2, 8)[0] == [(0, [0, 1], span(0, 5), 3, 0)]


@pytest.mark.parametrize("slots", [4, 9], ids=["dynamic cache", "static cache"])
def test_a_padded_query_that_reads_what_came_before(slots):
    """As Transformers builds masks; here padding and the only token disagree on where the queries stand."""
    mask = torch.nn.functional.pad(causal(4) & torch.tensor([1, 1, 1, 0]).bool(), (0, slots - 4))
    assert split(mask[None, None, 2:], 2, slots)[0] == [(0, [0], [0, 1, 2], 2, 0)]


def test_a_finished_row_of_a_batch_that_goes_on():
    """Its query is padding that reads what came before it; the other row says where the queries stand."""
    mask = torch.stack([causal(4), causal(4) & torch.tensor([1, 1, 1, 0]).bool()])[:, None, 3:]
    assert split(mask, 1, 4)[0] == [(0, [0], span(0, 4), 3, 0)]


def test_a_batch_row_of_padding_alone():
    mask = torch.stack([causal(4), torch.zeros(4, 4).bool()])[:, None, 2:]
    assert split(mask, 2, 4)[0] == [(0, [0, 1], span(0, 4), 2, 0)]


def test_open_rows_in_a_static_cache():
    mask = torch.nn.functional.pad(causal(5) & torch.tensor([0, 0, 1, 1, 1]).bool(), (0, 4))
    mask[:2] = True
    assert split(mask[None, None], 5, 9)[0] == [(0, [2, 3, 4], [2, 3, 4], 0, 0)]


def test_the_models_window():
    mask = causal(7, sliding_window=3)[None, None]
    assert split(mask, 7, 7, sliding_window=3) == ([(0, span(0, 7), span(0, 7), 0, 0)], 3)


def test_a_mask_that_reaches_beyond_the_models_window():
    mask = causal(7)[None, None]
    assert split(mask, 7, 7, sliding_window=3) == ([(0, span(0, 7), span(0, 7), 0, 0)], None)


def test_the_models_window_in_packed_documents():
    mask = packed(5, 4, sliding_window=3)[None, None]
    expected = [(0, span(0, 5), span(0, 5), 0, 0), (0, span(5, 9), span(5, 9), 0, 0)]
    assert split(mask, 9, 9, sliding_window=3) == (expected, 3)


@pytest.mark.parametrize("kv_length", [4, 9], ids=["dropped by a sliding cache", "held by a dynamic cache"])
def test_keys_that_the_models_window_hides(kv_length):
    """Two rows at positions 7 and 8; position_ids alone tell how many keys came before."""
    mask = causal(9, sliding_window=3)[None, None, -2:, -kv_length:]
    found, window = split(mask, 2, kv_length, [[7, 8]], sliding_window=3)
    assert (found, window) == ([(0, [0, 1], span(kv_length - 4, kv_length), 7, 5)], 3)


def test_one_row_of_the_mask_for_the_batch_is_read_once_per_row():
    mask = causal(4)[None, None].expand(2, -1, -1, -1)
    assert split(mask, 4, 4)[0] == [(batch, span(0, 4), span(0, 4), 0, 0) for batch in (0, 1)]


def prefix(length, size):
    mask = causal(length)
    mask[:size, :size] = True
    return mask


def holes(length):
    mask = causal(length)
    mask[4, 2] = False
    return mask


REFUSED = {
    "prefix": prefix(6, 3),
    "everything": torch.ones(6, 6).bool(),
    "a hole": holes(6),
    "one later token": causal(6) | torch.eye(6).roll(1, 1).bool(),
    "no row reads itself": causal(6).tril(-1),
    "a window that the model does not have": causal(6, sliding_window=2),
    "chunks that overlap": packed(3, 3) | torch.eye(6).roll(-2, 1).tril().bool(),
}


@pytest.mark.parametrize("mask", REFUSED.values(), ids=REFUSED.keys())
def test_not_causal_inside_documents(mask):
    with pytest.raises(ValueError, match="does not support a 4D attention_mask other"):
        read_custom_mask(mask[None, None], None, None)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (additive(causal(4), -1.0)[None, None], "adds biases other than 0"),
        (additive(causal(4))[None, None] + 0.5, "adds biases other than 0"),
        (causal(4)[None, None].int(), "of dtype torch.int32"),
        (causal(4)[None, None].expand(1, 2, -1, -1), r"differs by head \(shape \(1, 2, 4, 4\)\)"),
    ],
    ids=["small bias", "bias everywhere", "integers", "heads"],
)
def test_other_masks(mask, message):
    with pytest.raises(ValueError, match=message) as error:
        read_custom_mask(mask, None, None)
    assert "\n" not in str(error.value)
