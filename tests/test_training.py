import json
import shutil
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attn.data import load_documents, packed, tokenize, windowed
from hf_sparse_attn.evaluation.perplexity import token_nll
from hf_sparse_attn.loading import load_sparse_model
from hf_sparse_attn.training import FinetuneArguments, finetune

CONTEXT_LENGTH = 48


@pytest.fixture
def tokens(tiny_tokenizer, text_directory):
    return tokenize(load_documents(str(text_directory)), tiny_tokenizer)


def training_arguments(output, **changes):
    defaults = {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True, "use_cpu": True}
    return FinetuneArguments(output_dir=str(output), **defaults | changes)


def tune(model_path, tokenizer, rows, arguments, eval_rows=None):
    return finetune(load_sparse_model(str(model_path)), tokenizer, rows, arguments, eval_rows)


@pytest.mark.parametrize("make_rows", [packed, windowed])
def test_loss_falls_and_the_checkpoint_loads_like_any_other(
    tmp_path, tiny_model_path, tiny_tokenizer, tokens, make_rows
):
    rows = make_rows(tokens, CONTEXT_LENGTH)
    results = tune(tiny_model_path, tiny_tokenizer, rows, training_arguments(tmp_path / "out", max_steps=12), rows)
    assert results["steps"] == 12
    assert results["last_loss"] < results["first_loss"]
    assert results["eval_loss_after"] < results["eval_loss_before"]

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sparse")
    assert reloaded.config.sparse_attention == load_sparse_model(str(tiny_model_path)).config.sparse_attention
    assert reloaded.config.use_cache, "Trainer's use_cache=False must not be saved with the model"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == tiny_tokenizer("ab").input_ids
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 12
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == results


def test_resumed_training_ends_where_the_uninterrupted_one_does(tmp_path, tiny_model_path, tiny_tokenizer, tokens):
    rows = packed(tokens, CONTEXT_LENGTH)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    tune(tiny_model_path, tiny_tokenizer, rows, training_arguments(whole, save_steps=3))
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    arguments = training_arguments(resumed, save_steps=3, resume_from_checkpoint=str(resumed / "checkpoint-3"))
    assert tune(tiny_model_path, tiny_tokenizer, rows, arguments)["steps"] == 6
    expected = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(resumed).state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "sparse"])
def test_packed_documents_do_not_see_each_other(tiny_model_path, tokens, implementation):
    """The loss of packed rows, as Trainer feeds them, is the mean over the documents' pieces, each alone."""
    rows = packed(tokens, CONTEXT_LENGTH)
    model = load_sparse_model(str(tiny_model_path)).eval()
    model.set_attn_implementation(implementation)
    row = next(row for row in rows if 0 in row["position_ids"][1:-2])
    starts = [index for index, position in enumerate(row["position_ids"]) if position == 0] + [CONTEXT_LENGTH]
    pieces = [row["input_ids"][start:end] for start, end in pairwise(starts)]
    expected = torch.cat([token_nll(model, torch.tensor([piece])) for piece in pieces if len(piece) > 1]).mean()
    with torch.no_grad():
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        loss = model(**batch, use_cache=False).loss
    torch.testing.assert_close(loss, expected)
