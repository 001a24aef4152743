"""Convert and evaluate models of other shapes than the demo model's: trained small, on the demo documents.

    python scripts/measure_other_shapes.py --models build/shapes --output benchmarks/other_shapes.json

Each is made of a LLaMA model's weights, trained for a few steps with dense attention, converted with the defaults and
evaluated on held-out documents, converted and not:

  one-kv-head  all query heads share one KV head, the model's own side by side: head_dim is as many times as large
  wide-heads   head_dim is twice as large; the new channels begin at 0
  hybrid       Qwen2's: biases of queries, keys and values, drawn at random; three of four layers have a window of 512.
               The biases make another function: it is trained for longer
  yarn         positions scaled to four times the context (YaRN), as in a model that was extended

What stands in --models already is not made again.
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.cli.argument_types import output_file, positive_int
from hf_sparse_attn.cli.arguments import print_table
from hf_sparse_attn.environment import describe_environment
from hf_sparse_attn.loading import read_checkpoint
from hf_sparse_attn.output_files import write_json
from hf_sparse_attn.training import extend_context

BIASES = {"q_proj": 0.5, "k_proj": 0.5, "v_proj": 0.05}  # standard deviations of the biases that are drawn
SLIDING_WINDOW = 512


def one_kv_head(model: LlamaForCausalLM) -> PreTrainedModel:
    """Nearly the same function: each query reads the channels of its own KV head, and is 0 in all others'.

    The channels of a rotary frequency, one for each KV head, lie beside each other, at frequencies next to it.
    """
    config, weights = copy.deepcopy(model.config), model.state_dict()
    heads, head_dim = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // heads
    own = torch.eye(heads)  # [KV head of a query, KV head of a channel]
    for name, weight in weights.items():
        if "q_proj" in name:  # scores are divided by sqrt(head_dim)
            queries = weight.view(heads, group, 2, head_dim // 2, -1) * heads**0.5
            weights[name] = torch.einsum("hgacm,hk->hgackm", queries, own).flatten(0, -2)
        elif "k_proj" in name:
            weights[name] = weight.view(heads, 2, head_dim // 2, -1).permute(1, 2, 0, 3).flatten(0, 2)
        elif "o_proj" in name:
            outputs = weight.view(-1, heads, group, head_dim)
            weights[name] = torch.einsum("mhgc,hk->mhgkc", outputs, own).flatten(1)
    config.num_key_value_heads, config.head_dim = 1, heads * head_dim
    return _loaded(LlamaForCausalLM(config), weights)


def wide_heads(model: LlamaForCausalLM) -> PreTrainedModel:
    """The same function: each channel keeps its rotary frequency, which is every other one of twice as many."""
    config, weights = copy.deepcopy(model.config), model.state_dict()
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            halves = weight.unflatten(0, (-1, 2, config.head_dim // 2))  # the channels of a frequency are in both
            spread = torch.stack([halves, torch.zeros_like(halves)], 3).flatten(0, 3)
            weights[name] = spread * (2**0.5 if "q_proj" in name else 1.0)  # scores are divided by sqrt(head_dim)
        elif "v_proj" in name:
            heads = weight.unflatten(0, (-1, config.head_dim))
            weights[name] = torch.cat([heads, torch.zeros_like(heads)], 1).flatten(0, 1)
        elif "o_proj" in name:
            heads = weight.unflatten(1, (-1, config.head_dim))
            weights[name] = torch.cat([heads, torch.zeros_like(heads)], 2).flatten(1)
    config.head_dim *= 2
    return _loaded(LlamaForCausalLM(config), weights)


def hybrid(model: LlamaForCausalLM) -> PreTrainedModel:
    old, weights = model.config, model.state_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    names += ("rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id")
    kinds = ["full_attention" if layer % 4 == 3 else "sliding_attention" for layer in range(old.num_hidden_layers)]
    config = Qwen2Config(
        **{name: copy.deepcopy(getattr(old, name)) for name in names},
        use_sliding_window=True,
        sliding_window=SLIDING_WINDOW,
        layer_types=kinds,
    )
    new, generator = Qwen2ForCausalLM(config), torch.Generator().manual_seed(0)
    biases = {name: value for name, value in new.state_dict().items() if name.endswith("_proj.bias")}
    drawn = {
        name: BIASES[name.split(".")[-2]] * torch.randn(value.shape, generator=generator)
        for name, value in biases.items()
    }
    return _loaded(new, weights | drawn)


def yarn(model: LlamaForCausalLM) -> PreTrainedModel:
    config = extend_context(copy.deepcopy(model.config), "yarn", 4 * model.config.max_position_embeddings)
    return _loaded(LlamaForCausalLM(config), model.state_dict())


class Shape(NamedTuple):
    """How a model of another shape is made, and the training that it needs.

    Args:
        make: from the model; shares its weights.
        max_steps: of one row each.
    """

    make: Callable[[LlamaForCausalLM], PreTrainedModel]
    max_steps: int = 20


SHAPES = {
    "one-kv-head": Shape(one_kv_head),
    "wide-heads": Shape(wide_heads),
    "hybrid": Shape(hybrid, max_steps=60),
    "yarn": Shape(yarn),
}


def _loaded(model: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    model.load_state_dict(weights)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a LLaMA model: Hub id, directory, or demo (default: demo)")
    parser.add_argument("--dataset", default="demo", help="Hub id, file, directory, or demo (default: demo)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which ones (default: all)")
    parser.add_argument("--models", type=Path, required=True, help="directory for the models")
    parser.add_argument("--max-steps", type=positive_int, help="steps of training (default: by shape, 20 or 60)")
    parser.add_argument("--train-length", type=positive_int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--context-length", type=positive_int, default=4096, help="tokens (default: %(default)s)")
    parser.add_argument("--max-documents", type=positive_int, default=4, help="documents (default: %(default)s)")
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    result = {"settings": {name: str(value) for name, value in vars(arguments).items() if name != "output"}}
    result |= {"environment": describe_environment(torch.device("cpu")), "shapes": {}}
    for shape in arguments.shapes:
        folder = arguments.models / shape
        trained, converted = folder / "trained", folder / "converted"
        if not trained.exists():
            start = folder / "start"
            _write(arguments.model, shape, start)
            _run(
                "finetune",
                model=start,
                dataset=arguments.dataset,
                context_length=arguments.train_length,
                max_steps=arguments.max_steps or SHAPES[shape].max_steps,
                learning_rate=1e-4,
                lr_scheduler_type="cosine",
                sparse_attention=json.dumps({"dense_below": 10**9}),
                bf16="true",
                save_strategy="no",
                seed=0,
                output=trained,
            )
        length = arguments.context_length
        if not converted.exists():
            data = {"calibration_dataset": arguments.dataset, "num_evaluation_documents": 0}
            _run("convert", model=trained, context_length=length, **data, output=converted)
        found = {}
        for name in ("trained", "converted"):
            report = folder / f"{name}.json"
            data = {"dataset": arguments.dataset, "max_documents": arguments.max_documents}
            if name == "trained":  # dense
                data["sparse_attention"] = json.dumps({"dense_below": SparseAttentionConfig.dense_below})
            _run("eval-perplexity", model=folder / name, context_length=length, **data, output=report)
            found[name] = json.loads(report.read_text())
        result["shapes"][shape] = found
        write_json(arguments.output, result)
    print_result(result)


def _write(model: str, shape: str, path: Path) -> None:
    """The model of another shape, before its training."""
    source, _, tokenizer, _ = read_checkpoint(model)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    SHAPES[shape].make(loaded).save_pretrained(path)
    tokenizer.save_pretrained(path)


def _run(command: str, **options: object) -> None:
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    subprocess.run([sys.executable, "-m", "hf_sparse_attn", command, *given], check=True)


def print_result(result: dict) -> None:
    rows = []
    for shape, found in result["shapes"].items():
        for name, label in (("trained", "not converted"), ("converted", "converted")):
            one = found[name]
            low, high = one["delta_nll"]["ci95"]
            rows.append(
                [
                    shape,
                    label,
                    f"{one['dense']['perplexity']:.3f}",
                    f"{one['sparse']['density']:.4f}",
                    f"{one['perplexity_ratio']:.4f}",
                    f"{low:+.4f} .. {high:+.4f}",
                    f"{one['kl']['median']:.2g}",
                    f"{one['top1_agreement']:.4f}",
                ]
            )
    columns = ["shape", "", "dense perplexity", "density", "ratio", "95%, nats", "median KL", "top-1"]
    print_table("Other shapes", columns, rows)


if __name__ == "__main__":
    main()
