import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_sparse_attn import SparseAttentionConfig, loading
from hf_sparse_attn.integration import merge_sparse_attention


def test_resolve_model_takes_directories_and_hub_ids(tiny_model_path):
    assert loading.resolve_model(str(tiny_model_path)) == str(tiny_model_path)
    assert loading.resolve_model("org/name") == "org/name"


@pytest.mark.parametrize("model", ["./missing", "/no/such/model", "a/b/c"])
def test_resolve_model_refuses_missing_paths(model):
    with pytest.raises(FileNotFoundError, match=f"'{model}': no such directory"):
        loading.resolve_model(model)


def test_resolve_model_refuses_what_holds_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model: it is not a directory with a config\.json"):
        loading.resolve_model(str(tmp_path))


def test_overrides_are_merged_into_the_models_own_fields():
    config = LlamaConfig(sparse_attention={"window_size": 8, "seed": 3})
    merged = merge_sparse_attention(config, {"window_size": 16})
    assert (merged["window_size"], merged["seed"]) == (16, 3)
    assert merge_sparse_attention(LlamaConfig(), {}) == merge_sparse_attention(LlamaConfig())


@pytest.mark.parametrize("overrides", [{"windw_size": 4}, {"window_size": 0}])
def test_bad_overrides_name_the_field(overrides):
    with pytest.raises(ValueError, match=next(iter(overrides))):
        merge_sparse_attention(LlamaConfig(), overrides)


def test_loaded_model_is_sparse_with_its_overrides(tiny_model_path):
    model = loading.load_sparse_model(str(tiny_model_path), {"window_size": 5})
    assert model.config._attn_implementation == "sparse"
    assert model.config.sparse_attention["window_size"] == 5
    assert model.config.sparse_attention["num_global_tokens"] == 2


def test_model_without_a_sparse_attention_of_its_own_takes_overrides(tmp_path, tiny_llama_config):
    LlamaForCausalLM(tiny_llama_config).save_pretrained(tmp_path)
    assert loading.load_sparse_model(str(tmp_path)).config.sparse_attention == SparseAttentionConfig().to_dict()
    assert loading.load_sparse_model(str(tmp_path), {"window_size": 5}).config.sparse_attention["window_size"] == 5


def test_model_that_never_calls_the_registry_is_refused(tmp_path):
    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bloom, which never calls its attention through"):
        loading.load_sparse_model(str(tmp_path))


def test_parse_device():
    assert loading.parse_device("cpu") == torch.device("cpu")
    assert loading.parse_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"'{device}' is not a device of this machine"):
            loading.parse_device(device)


def test_parse_dtype():
    assert loading.parse_dtype("auto") == "auto"
    assert loading.parse_dtype("bfloat16") == torch.bfloat16
    for dtype in ("int8", "nn", "float33"):
        with pytest.raises(ValueError, match=f"'{dtype}' is not a floating-point dtype"):
            loading.parse_dtype(dtype)
