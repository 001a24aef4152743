import json
from importlib.util import find_spec

import pytest

SCRIPT = "leak_test.py"
VOTES = '{"preset": "minference-like", "block_size": 12, "num_voted_blocks": 2}'


@pytest.fixture
def arguments(tiny_model_path, text_directory, tmp_path):
    return {
        "--model": tiny_model_path,
        "--dataset": text_directory,
        "--context-length": 130,
        "--output": tmp_path / "leak.json",
    }


def flat(arguments):
    return [part for pair in arguments.items() for part in pair]


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
def test_no_leak(run_script, arguments, implementation):
    chosen = {} if implementation is None else {"--attn-implementation": implementation}
    finished = run_script(SCRIPT, *flat(arguments | chosen), "--positions", 3)
    assert finished.status == 0, finished.stderr
    result = json.loads(arguments["--output"].read_text())
    assert (result["leaks"], result["earliest_moved"], result["largest_difference"]) == (False, None, 0)
    assert [change["position"] for change in result["changes"]] == [42, 85, 129]
    assert (result["document"], result["context_length"]) == ("0.txt", 130)
    assert result["attn_implementation"] == (implementation or "sparse")
    assert (result["sparse_attention"] or {}).get("window_size") == (8 if implementation is None else None)
    assert "no leak" in finished.stdout


def test_blocks_that_vote_leak(run_script, arguments):
    finished = run_script(SCRIPT, *flat(arguments), "--sparse-attention", VOTES)
    assert finished.status == 1
    result = json.loads(arguments["--output"].read_text())
    assert result["leaks"]
    assert 120 <= result["earliest_moved"] < 129
    (line,) = [line for line in finished.stderr.splitlines() if "error" in line]
    assert line.startswith(
        f"{SCRIPT}: error: sparse attention leaks: a later token moves the logits of position "
        f"{result['earliest_moved']}"
    )
    assert finished.stdout.count("a leak") == 1


def test_sparse_attention_without_a_leak_can_be_given(run_script, arguments):
    finished = run_script(SCRIPT, *flat(arguments), "--sparse-attention", '{"preset": "bigbird", "block_size": 8}')
    assert finished.status == 0, finished.stderr
    assert json.loads(arguments["--output"].read_text())["sparse_attention"]["block_size"] == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "./missing"}, ["--model", "no such directory"]),
        ({"--dataset": "missing.txt"}, ["--dataset", "missing.txt"]),
        ({"--context-length": 100_000}, ["--dataset", "at least 100000 tokens"]),
        ({"--context-length": 1}, ["--context-length", "at least 2"]),
        ({"--positions": 66}, ["--positions", "from 1 to 65, half of the tokens, got 66"]),
        ({"--positions": 0}, ["--positions", "'0'"]),
        ({"--attn-implementation": "sdap"}, ["--attn-implementation", "sdap"]),
        ({"--attn-implementation": "sdpa", "--sparse-attention": VOTES}, ["--sparse-attention", "sdpa"]),
        ({"--sparse-attention": '{"windw_size": 4}'}, ["--sparse-attention", "windw_size"]),
        ({"--device": "gpu"}, ["--device", "'gpu'"]),
        ({"--dtype": "float33"}, ["--dtype", "'float33'"]),
    ],
    ids=lambda value: " ".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(run_script, assert_refused, arguments, monkeypatch, changes, words):
    monkeypatch.setattr("hf_sparse_attn.loading.read_weights", lambda *_, **__: pytest.fail("weights were read"))
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), *words)
    assert not arguments["--output"].exists()


@pytest.mark.skipif(find_spec("flash_attn") or find_spec("kernels"), reason="it is installed")
def test_an_attention_that_is_not_installed(run_script, assert_refused, arguments):
    changes = {"--attn-implementation": "flash_attention_2"}
    assert_refused(run_script(SCRIPT, *flat(arguments | changes)), "--attn-implementation", "FlashAttention2")
