"""The counts of the roofline, against the specification's keys."""

import json

import pytest
import torch
from helpers.operation import make_pattern

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.benchmarking.roofline import (
    Ceilings,
    TileCounts,
    count_stages,
    count_tiles,
    dense_floor_ms,
)
from hf_sparse_attn.ops import reference

FIELDS = {"window_size": 11, "num_global_tokens": 3, "key_budget": 14, "num_hash_bits": 3, "page_size": 8}
COUNTS = TileCounts(32, found=1000.0, listed_found=2000.0, row_blocks=40.0, blocks=80.0)
SHAPE = (32, 8, 128)


def test_tiles_hold_what_their_rows_find():
    config = SparseAttentionConfig(dense_below=0, **FIELDS)
    pattern = make_pattern(config, 4, 2, 8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads, 144, 8, generator=generator, dtype=torch.float64) for heads in (4, 2))
    counts = count_tiles(query, key, pattern, rows=4, num_tiles=3)
    _, routed = reference.scored_keys(query, key, pattern, 0)
    bucket = pattern.bucket_hash.assign(key)
    bucket[:, :3] = 8  # static keys stand last
    slot = bucket.argsort(stable=True).argsort() // 64
    found, listed, row_blocks, blocks = [], [], [], []
    for start in (72, 104, 136):
        for kv_head in range(2):
            tile = routed[2 * kv_head, start : start + 4]
            found.append(int(tile.sum()) / 4)
            listed.append(int(tile.any(0).sum()))
            row_blocks += [len(slot[kv_head][row].unique()) for row in tile]
            blocks.append(len(slot[kv_head][tile.any(0)].unique()))
    expected = (sum(x) / len(x) for x in (found, listed, row_blocks, blocks))
    assert counts == TileCounts(4, *map(pytest.approx, expected))


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [(3, 144, "rows=3 must divide page_size=8"), (4, 16, "16 tokens are too few for a window of 11")],
)
def test_impossible_tiles(rows, length, message):
    pattern = make_pattern(SparseAttentionConfig(dense_below=0, **FIELDS), 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        count_tiles(torch.zeros(4, length, 8), torch.zeros(2, length, 8), pattern, rows)


def test_a_row_reads_no_more_when_the_document_grows():
    """Sparse work grows with the tokens, dense work with their square."""
    floors = []
    for num_tokens in (2**16, 2**17):
        stages = count_stages(num_tokens, *SHAPE, SparseAttentionConfig(), COUNTS, Ceilings())
        floors.append(sum(stage["floor_ms"] for stage in stages))
        assert all(stage["floor_ms"] >= 0 for stage in stages)
    assert floors[1] / floors[0] == pytest.approx(2, rel=0.05)
    dense = [dense_floor_ms(n, 32, 128, Ceilings()) for n in (2**16, 2**17)]
    assert dense[1] / dense[0] == pytest.approx(4, rel=0.01)


def test_work_of_the_attention():
    """Two products with keys, as light keys are left out, and one with values: for 128 pairs with 2303 keys a tile."""
    stages = {x["stage"]: x for x in count_stages(34816, *SHAPE, SparseAttentionConfig(), COUNTS, Ceilings())}
    tiles, listed = 8 * 1024, 2000 + 256 + 31 + 16
    assert stages["attention"]["gflop"] == pytest.approx(tiles * listed * 128 * 128 * 2 * 3 / 1e9)
    once = SparseAttentionConfig(min_weight=0.0)
    stages = {x["stage"]: x for x in count_stages(34816, *SHAPE, once, COUNTS, Ceilings())}
    assert stages["attention"]["gflop"] == pytest.approx(tiles * listed * 128 * 128 * 2 * 2 / 1e9)


def test_the_backward_comes_on_top():
    """It chooses buckets again only where they are so many that the forward does not keep the choice."""
    own = {"lists, again", "rows of blocks", "gradient of queries", "gradient of keys and values"}
    for bits, others in ((10, {"chosen buckets, kept"}), (12, {"choice of buckets, again"})):
        config = SparseAttentionConfig(num_hash_bits=bits)
        forward, both = (count_stages(2**15, 32, 8, 64, config, COUNTS, Ceilings(), x) for x in (None, (COUNTS, 8192)))
        assert both[: len(forward)] == forward
        stages = {stage["stage"] for stage in both}
        assert stages >= own | others
        assert ("bucket scores, again" in stages) == (bits == 12)


def test_only_rows_that_read_a_block_are_multiplied_with_it():
    """Each of 30720 rows reads 40 blocks; in each of 4 chunks half a tile more; and the window."""
    config, num_tokens = SparseAttentionConfig(), 2**15
    stages = {x["stage"]: x for x in count_stages(num_tokens, *SHAPE, config, COUNTS, Ceilings(), (COUNTS, 8192))}
    rows = 30720 * 40 + 4 * 512 * 16
    pairs = 8 * 4 * (rows * 64 + 30720 * (256 + 32))
    assert stages["gradient of keys and values"]["gflop"] == pytest.approx(8 * pairs * 128 / 1e9)


def test_the_backward_has_tiles_of_its_own():
    """The queries' gradients go over the lists of the smaller tiles; the forward's stages stay as they are."""
    config, small = SparseAttentionConfig(), TileCounts(16, 1000.0, 1900.0, 40.0, 70.0)
    counts = TileCounts(64, 1000.0, 2100.0, 40.0, 90.0)
    stages = count_stages(34816, *SHAPE, config, counts, Ceilings(), (small, 8192))
    assert stages[:8] == count_stages(34816, *SHAPE, config, counts, Ceilings())
    gflop = {x["stage"]: x["gflop"] for x in stages}["gradient of queries"]
    assert gflop == pytest.approx(8 * 2048 * (1900 + 256 + 15 + 16) * 64 * 128 * 2 * 3 / 1e9)


@pytest.mark.parametrize("passes", ["forward", "forward_backward"])
def test_script(run_script, tmp_path, passes):
    pytest.importorskip("triton")
    output = tmp_path / "roofline.json"
    finished = run_script(
        "roofline.py", "--seq-lens", 8192, 16384, "--counted-tokens", 2048, "--pass", passes, "--output", output
    )
    assert finished.status == 0, finished.stderr
    result = json.loads(output.read_text())
    assert result["tile"]["rows"] == 64
    assert result.get("backward_tile", {"rows": 32})["rows"] == 32
    assert ("backward_tile" in result) == (passes == "forward_backward")
    assert result["tile"]["found"] <= result["tile"]["listed_found"]
    for row in result["rows"]:
        assert row["floor_ms"] == pytest.approx(sum(stage["floor_ms"] for stage in row["stages"]))
        assert row["dense_floor_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--counted-tokens", 128], "argument --counted-tokens: 128 tokens are too few"),
        (["--sparse-attention", '{"page_size": 24}'], "argument --counted-tokens: rows=32 must divide page_size=24"),
        (["--sparse-attention", '{"pages": 24}'], "argument --sparse-attention"),
        (["--output", "/dev/null/roofline.json"], "argument --output"),
    ],
)
def test_bad_arguments(run_script, arguments, message):
    pytest.importorskip("triton")
    finished = run_script("roofline.py", *arguments)
    assert finished.status == 2
    assert message in finished.stderr
