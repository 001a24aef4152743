"""Directories that `convert --remote-code` writes, where the package is installed and where it is not."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.families import FAMILIES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

import hf_sparse_attn
from hf_sparse_attn.calibration.remote_code import MODULE, name_remote_code, write_remote_code
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.loading import load_sparse_model
from hf_sparse_attn.training import finetune

FIELDS = {"window_size": 16, "num_global_tokens": 2, "dense_below": 32}


@pytest.fixture(autouse=True, scope="module")
def module_cache(tmp_path_factory):
    """Where Transformers copies the files that it runs; one for all tests, as it is one for a process."""
    directory = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", directory)
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("HF_MODULES_CACHE", directory)  # of subprocesses
        yield


@pytest.fixture
def convert(tiny_model_path, text_directory, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sparse_attn.calibration.budget_allocation.BUDGETS", (0, 8, 16, 32))
    monkeypatch.setattr("hf_sparse_attn.calibration.budget_allocation.MIN_WEIGHTS", (0.0, 1e-2))

    def run(model=tiny_model_path, name="converted", **settings):
        settings = {"sparse_attention": FIELDS, "target_density": 0.3, "key_budget": 64, **settings}
        settings |= {"num_evaluation_documents": 0, "num_calibration_documents": 2, "context_length": 200}
        hf_sparse_attn.convert(model, tmp_path / name, calibration_dataset=str(text_directory), **settings)
        return tmp_path / name

    return run


def saved(family, directory):
    """A tiny model with the file, written as a conversion does it."""
    model = tiny_model(family, dtype=torch.float32)
    name_remote_code(model)
    model.save_pretrained(directory)
    write_remote_code(directory)
    return directory


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kwargs).eval()


def logits(model):
    ids = torch.randint(1, 60, (1, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


def names_the_file(path):
    return json.loads((path / "config.json").read_text()).get("auto_map")


def test_conversion_writes_it_and_says_so(convert):
    path = convert(remote_code=True)
    assert names_the_file(path) == {"AutoModelForCausalLM": f"{MODULE}.LlamaForCausalLM"}
    assert "trust_remote_code=True" in (path / "README.md").read_text()
    model = load(path)
    assert model.config._attn_implementation == "sparse"
    assert torch.equal(logits(model), logits(load_sparse_model(str(path)).eval()))


def test_nothing_of_it_unless_asked_for(convert):
    path = convert()
    assert names_the_file(path) is None
    assert not list(path.glob("*.py"))
    assert "trust_remote_code" not in (path / "README.md").read_text()


def test_refits_and_conversions_keep_it(convert):
    path = convert(remote_code=True)
    kept = {"target_density": None, "key_budget": None, "sparse_attention": {}, "refit": True}
    for again in (convert(path, "refitted", **kept), convert(path, "again")):
        assert names_the_file(again) == names_the_file(path)
        assert load(again).config._attn_implementation == "sparse"
        assert "trust_remote_code=True" in (again / "README.md").read_text()


def test_finetuning_keeps_it(tmp_path, tiny_tokenizer):
    model = load_sparse_model(str(saved("llama", tmp_path / "model")))
    rows = [{"input_ids": [*range(1, 61)], "labels": [*range(1, 61)]}] * 2
    arguments = TrainingArguments(str(tmp_path / "tuned"), max_steps=2, save_steps=1, use_cpu=True, report_to=[])
    finetune(model, tiny_tokenizer, rows, arguments)
    for path in (tmp_path / "tuned", tmp_path / "tuned" / "checkpoint-1"):
        assert load(path).config._attn_implementation == "sparse"


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_sparse_with_trust(self, family, tmp_path):
        path = saved(family, tmp_path / "model")
        model = load(path)
        assert isinstance(model, FAMILIES[family][1])
        plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparse").eval()
        assert torch.equal(logits(model), logits(plain))
        with torch.no_grad(), hf_sparse_attn.record_density(model) as density:
            logits(model)
        assert density.density < 1

    def test_saved_and_loaded_again(self, family, tmp_path):
        first = load(saved(family, tmp_path / "model"))
        first.save_pretrained(tmp_path / "again")
        load(tmp_path / "again").save_pretrained(tmp_path / "third")
        before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "third"))
        assert before == after
        assert torch.equal(logits(load(tmp_path / "third")), logits(first))

    def test_without_trust_it_is_the_dense_model(self, family, tmp_path):
        path = saved(family, tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        assert type(model) is FAMILIES[family][1]
        assert model.config._attn_implementation != "sparse"
        tiny_model(family, dtype=torch.float32).save_pretrained(tmp_path / "plain")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
        assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_attention_may_be_asked_for(implementation, tmp_path):
    model = load(saved("llama", tmp_path / "model"), attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model), logits(tiny_model("llama", implementation, torch.float32)))


def test_a_model_without_weights(tmp_path):
    config = AutoConfig.from_pretrained(saved("llama", tmp_path / "model"))
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert model.config._attn_implementation == "sparse"


def test_global_tokens_by_id_are_marked(tmp_path):
    model = tiny_model(global_token_ids=[7])
    name_remote_code(model)
    model.save_pretrained(tmp_path / "model")
    write_remote_code(tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), logits(model))


def test_classes_of_others_are_refused(tmp_path):
    model = tiny_model()
    model.__class__ = type("Mine", (type(model),), {"__module__": "mine"})
    with pytest.raises(ArgumentError, match=r"^remote_code: Mine is no class of Transformers"):
        name_remote_code(model)


@pytest.mark.parametrize(
    "auto_map",
    [
        None,
        {},
        {"AutoConfig": "configuration_a.A"},
        {"AutoModelForCausalLM": "modeling_a.A"},
        {"AutoModelForCausalLM": f"{MODULE}.import os"},
    ],
)
def test_files_of_others_are_left_alone(auto_map, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    write_remote_code(tmp_path)
    assert not (tmp_path / f"{MODULE}.py").exists()


def test_names_of_the_hub(tmp_path):
    reference = f"some/repository--{MODULE}.LlamaForCausalLM"
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": reference}}))
    write_remote_code(tmp_path)
    assert "class LlamaForCausalLM(" in (tmp_path / f"{MODULE}.py").read_text()


WITHOUT_THE_PACKAGE = """
import sys, warnings
sys.modules["hf_sparse_attn"] = None  # cannot be imported
import torch
from transformers import AutoModelForCausalLM
path, copy = sys.argv[1:3]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
print(*(str(each.message) for each in caught), sep="\\n")
dense = AutoModelForCausalLM.from_pretrained(path).eval()
ids = torch.arange(1, 60)[None]
assert torch.equal(model(ids).logits, dense(ids).logits)
model.generate(ids, max_new_tokens=2, do_sample=False)
model.save_pretrained(copy)
try:
    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, attn_implementation="sparse")
except ImportError as error:
    print(error)
"""


def test_where_the_package_is_missing(tmp_path):
    """One warning, then a dense model; saved there, it is sparse again where the package is installed."""
    path, copy = saved("llama", tmp_path / "model"), tmp_path / "copy"
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(path), str(copy)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    warned, refused = finished.stdout.splitlines()
    told = "for its sparse attention this checkpoint needs `pip install hf_sparse_attn` ("
    assert warned.startswith(told)
    assert warned.endswith("; until then it is a dense model")
    assert refused.startswith(told)
    assert torch.equal(logits(load(copy)), logits(tiny_model(dtype=torch.float32)))
