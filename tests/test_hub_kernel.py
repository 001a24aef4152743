"""A Hub kernel, loaded by its name with nothing imported, is bit-equal to the installed package and leaves it alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.batches import packed_documents, padded_batch, tokens
from helpers.families import tiny_model
from helpers.hub_kernel import REPO, offer_kernel
from helpers.paths import ROOT, script_module
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

import hf_sparse_attn
from hf_sparse_attn import SparseCache, configure, record_density
from hf_sparse_attn.cache.policies import Recency, Sinks
from hf_sparse_attn.integration import sparse_attention_forward
from hf_sparse_attn.masks.mask_function import signed_positions


@pytest.fixture(scope="module")
def kernel_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "kernel"
    script_module("build_hub_kernel").build(path)
    return path


@pytest.fixture
def kernel(kernel_path, monkeypatch):
    """The kernel's module, as Transformers finds it."""
    return offer_kernel(kernel_path, monkeypatch).get_kernel(REPO, version=1)


def saved(path, family="llama", implementation="torch"):
    model = tiny_model(family, dtype=torch.float32)
    model.config.sparse_attention["implementation"] = implementation
    model.save_pretrained(path)
    return path


def load(path, implementation=REPO):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=implementation, allow_all_kernels=True).eval()


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny converted model that PyTorch's operations compute, which takes no compilation."""
    return saved(tmp_path / "model")


def plain():
    return {"input_ids": tokens(40, 2)}


def left_padded():
    ids, mask, position_ids = padded_batch([tokens(length, seed=length)[0] for length in (40, 33)], "left", 3)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}


def packed():
    rows, position_ids = packed_documents()
    return {"input_ids": torch.cat(rows)[None], "position_ids": position_ids, "use_cache": False}


CALLS = [plain, left_padded, packed]


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def test_global_token_ids(kernel, checkpoint):
    outputs = []
    for name, package in (("sparse", hf_sparse_attn), (REPO, kernel)):
        model = load(checkpoint, name)
        model.config.sparse_attention |= {"global_token_ids": [7, 11], "dense_below": 0}
        package.mark_global_tokens(model)
        outputs.append(logits(model, plain()))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("call", CALLS)
def test_bit_equal(family, call, kernel, tmp_path):
    path = saved(tmp_path / "model", family)
    model, expected = load(path), logits(load(path, "sparse"), call())
    if (family, call) == ("gpt_oss", packed):
        with pytest.raises(ValueError, match=r"first call of a Hub kernel in gpt_oss .*of packed documents"):
            logits(model, call())
    assert torch.equal(logits(model, call()), expected)  # reads SDPA's mask, but for the case above
    assert torch.equal(logits(model, call()), expected)  # reads its own


@pytest.mark.nightly  # compiles Numba's loop once more
def test_bit_equal_with_numba(kernel, tmp_path):
    path = saved(tmp_path / "model", implementation="numba")
    assert torch.equal(logits(load(path), left_padded()), logits(load(path, "sparse"), left_padded()))


def test_mask_function_is_its_own_after_the_first_call(kernel, checkpoint):
    model = load(checkpoint)
    assert ALL_MASK_ATTENTION_FUNCTIONS[REPO] is sdpa_mask
    logits(model, left_padded())
    assert ALL_MASK_ATTENTION_FUNCTIONS[REPO].__module__ == f"{kernel.__name__}.masks.mask_function"


def test_what_is_registered_stays(kernel, checkpoint):
    logits(load(checkpoint), plain())
    assert AttentionInterface()["sparse"] is sparse_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["sparse"] is signed_positions
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask


def test_masks_of_other_implementations_stay(kernel):
    kernel._register_mask_function("sdpa")
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask


CACHES = {
    "dynamic": lambda package, config: {},
    "static": lambda package, config: {"cache_implementation": "static", "disable_compile": True},
    "sparse": lambda package, config: {"past_key_values": package(config)},
}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_generate(cache, kernel, checkpoint):
    inputs = {name: left_padded()[name] for name in ("input_ids", "attention_mask")}
    texts = []
    for package, implementation in ((kernel.SparseCache, REPO), (SparseCache, "sparse")):
        model = load(checkpoint, implementation)
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        texts.append(model.generate(**inputs, **cache(package, model.config), **options))
    assert torch.equal(texts[0].sequences, texts[1].sequences)
    assert torch.equal(torch.stack(texts[0].logits), torch.stack(texts[1].logits))


def test_cache_with_a_policy(kernel, checkpoint):
    model, installed = load(checkpoint), load(checkpoint, "sparse")
    cache = kernel.SparseCache(model.config, policy=kernel.Sinks(2) + kernel.Recency(), budget=12)
    expected = SparseCache(installed.config, policy=Sinks(2) + Recency(), budget=12)
    for piece in tokens(40).split(8, 1):
        found = logits(model, {"input_ids": piece, "past_key_values": cache})
        assert torch.equal(found, logits(installed, {"input_ids": piece, "past_key_values": expected}))
    assert cache.nbytes == expected.nbytes
    with pytest.raises(ValueError, match=f"is '{REPO}'"):
        SparseCache(model.config, policy=Sinks(2) + Recency(), budget=12)
    with pytest.raises(ValueError, match="is 'sparse'"):
        kernel.SparseCache(installed.config, policy=kernel.Sinks(2) + kernel.Recency(), budget=12)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients(checkpointing, kernel, checkpoint):
    gradients = []
    for implementation in (REPO, "sparse"):
        model, inputs = load(checkpoint, implementation).train(), left_padded()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for _ in range(2):  # the first reads SDPA's mask
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], expected) for name, expected in gradients[1].items())


@pytest.mark.parametrize("call", CALLS)
def test_saved_and_loaded_again(call, kernel, checkpoint, tmp_path):
    model, again = load(checkpoint), tmp_path / "again"
    kernel.configure(model, window_size=9)
    model.save_pretrained(again)
    config = json.loads((again / "config.json").read_text())
    assert config["sparse_attention"]["window_size"] == 9
    assert REPO not in (again / "config.json").read_text()
    expected = logits(model, call())
    assert torch.equal(logits(load(again), call()), expected)
    assert torch.equal(logits(load(again, "sparse"), call()), expected)
    assert not torch.equal(logits(load(checkpoint), call()), expected)


def test_graphs(kernel, checkpoint):
    """Each copy has an operation of its own; the second to be defined would take the place of the first."""
    torch.compiler.reset()
    expected = logits(load(checkpoint, "sparse"), left_padded())
    for implementation in ("sparse", REPO, "sparse"):
        graph = torch.compile(load(checkpoint, implementation), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(graph, left_padded()), expected)
    operations = [getattr(torch.ops, name).attention for name in ("hf_sparse_attn", kernel.__name__)]
    assert operations[0] is not operations[1]
    torch.compiler.reset()


def test_one_model_by_turns(kernel, checkpoint):
    """What one copy leaves on layers, masks and caches is not the other's to read."""
    model = load(checkpoint, "sparse")
    expected = logits(model, left_padded())
    for implementation in (REPO, "sparse", REPO):
        model.set_attn_implementation(implementation, allow_all_kernels=True)
        assert torch.equal(logits(model, left_padded()), expected)
    configure(model, window_size=9)
    found = logits(model, left_padded())
    assert not torch.equal(found, expected)
    cached = logits(model, {**left_padded(), "past_key_values": SparseCache(model.config)})
    assert torch.equal(cached, found)


def test_density(kernel, checkpoint):
    model, installed = load(checkpoint), load(checkpoint, "sparse")
    with kernel.record_density(model) as found:
        logits(model, plain())
    with record_density(installed) as expected:
        logits(installed, plain())
    assert 0 < found.density == expected.density < 1


def test_what_it_offers(kernel):
    assert kernel.supports_flash_attn()
    assert all(hasattr(kernel, name) for name in kernel.__all__)


ALONE = """
import importlib, os, sys
sys.modules["hf_sparse_attn"] = None  # importing it is an error
from transformers.utils import import_utils
import_utils.is_kernels_available = lambda *_: True  # of whatever release
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

repo, checkpoint, inputs, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=repo, allow_all_kernels=True)
with torch.no_grad():
    torch.save(model(**torch.load(inputs)).logits, output)
name = AttentionInterface()[repo].__module__
folder = os.path.dirname(sys.modules[name].__file__)
assert "sparse" not in AttentionInterface()
for parent, _, files in os.walk(folder):
    for file in files:
        module = os.path.relpath(os.path.join(parent, file), folder).removesuffix(".py").replace(os.sep, ".")
        if file.endswith(".py") and module != "__init__":
            importlib.import_module(f"{name}.{module.removesuffix('.__init__')}")
"""


def test_nothing_is_installed(kernel, kernel_path, checkpoint, tmp_path):
    """In a process of its own, every module of the kernel is found in the kernel."""
    files = [str(tmp_path / name) for name in ("inputs", "output")]
    torch.save(left_padded(), files[0])
    command = [sys.executable, "-c", ALONE, REPO, str(checkpoint), *files]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert torch.equal(torch.load(files[1]), logits(load(checkpoint, "sparse"), left_padded()))


COMPILED = """
import importlib.util, sys
import numpy as np

name, folder = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
link_keys = importlib.import_module(f"{name}.ops.numba.kernels").link_keys
previous = np.full((1, 4), -1, np.int32)
link_keys(np.zeros((1, 4), np.int32), previous, np.full((1, 1), -1, np.int32), 0, 4)
assert previous.tolist() == [[-1, 0, 1, 2]]
print(sum(link_keys.stats.cache_hits.values()))
"""


@pytest.mark.nightly
def test_compiled_code_of_another_build_is_not_taken(kernel_path, tmp_path, monkeypatch):
    """What Numba keeps names its module, of which the next build has another in the same place."""
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    hits = []
    for name in ("one", "one", "two"):
        command = [sys.executable, "-c", COMPILED, name, str(kernel_path / "build" / "torch-cpu")]
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        hits.append(int(finished.stdout))
    assert hits == [0, 1, 0]


def test_page(kernel, checkpoint):
    """The Python blocks of docs/hub_kernel.md."""
    text = Path(ROOT, "docs", "hub_kernel.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 1
    names = {"inputs": {"input_ids": tokens(40)}}
    for block in blocks:
        block = block.replace("ORG/hf-sparse-attn", REPO).replace('"my-model"', repr(str(checkpoint)))
        exec(compile(block, "hub_kernel.md", "exec"), names)
    assert names["density"].density > 0
