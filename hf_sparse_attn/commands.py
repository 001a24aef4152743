"""What `hf-sparse-attn` does, from Python: the same checks and the same results as the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_sparse_attn.config import SparseAttentionConfig, text_config
from hf_sparse_attn.errors import ArgumentError, argument, check_integer
from hf_sparse_attn.pattern_fields import check_causal

# Pairs of sampled rows and keys in a picture, and rows at least, if nobody says how many rows.
_NUM_PAIRS = 2**20
_LEAST_ROWS = 128


def load_model(model: str, sparse_attention: dict[str, Any] | None = None, **kwargs: Any) -> PreTrainedModel:
    """A causal language model with `attn_implementation="sparse"`, converted or not.

    Args:
        model: a Hub id, a directory, or "demo".
        sparse_attention: single fields of `SparseAttentionConfig` in place of the model's own.
        kwargs: go to `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        ValueError: for a field that `SparseAttentionConfig` refuses, a damaged checkpoint, or a family of models whose
            attention does not go through Transformers' registry.
        OSError: there is no such model.
        ImportError: "demo" was asked for and its packages are not installed.
    """
    from hf_sparse_attn.loading import load_sparse_model, resolve_model

    return load_sparse_model(resolve_model(model), sparse_attention, **kwargs)


def convert(model: str, output: str | Path, **settings: Any) -> dict[str, Any]:
    """Convert a dense checkpoint: fit the hash and what every head reads on sample documents.

    The directory that is written loads with stock `from_pretrained(output, attn_implementation="sparse")`, and as an
    ordinary dense model without this package.

    Args:
        model: a Hub id, a directory, or "demo".
        output: a directory, new or empty.
        settings: fields of `hf_sparse_attn.calibration.convert.ConversionSettings`: calibration_dataset,
            num_calibration_documents, context_length, target_density or max_loss, key_budget, sparse_attention (a
            dict), dense_below, num_evaluation_documents, device, dtype, offload, refit (for a converted model that was
            trained since), remote_code (a file for `trust_remote_code=True`).

    Returns:
        "output" (a path), "sparse_attention" (the fitted fields), "density" (expected, attended over admissible pairs),
        "predicted_loss" (rise in nats a token; the real one is higher), "evaluation": what `evaluate_perplexity`
        returns on documents that calibrated nothing, or None, "loss_factor": how many times the prediction was measured
        there, or None, and "refit": what a refit moved (`hf_sparse_attn.calibration.refit.Refit`), or None.

    Raises:
        ValueError: for a setting, a model or a dataset that cannot be, before any long work; the message names it.
        RuntimeError: what was computed cannot be written; the message says where it is kept.
    """
    from hf_sparse_attn.calibration.convert import convert
    from hf_sparse_attn.calibration.settings import ConversionSettings
    from hf_sparse_attn.progress import ProgressBars

    done = convert(str(model), output, ConversionSettings(**settings), progress=ProgressBars(), tell=print)
    return {
        "output": done.output,
        "sparse_attention": done.config.to_dict(),
        "density": done.choice.density,
        "predicted_loss": done.choice.loss,
        "evaluation": done.evaluation,
        "loss_factor": done.loss_factor,
        "refit": done.refit,
    }


def evaluate_perplexity(
    model: str,
    dataset: str = "demo",
    context_length: int = 8192,
    *,
    split: str = "validation",
    max_documents: int = 4,
    sparse_attention: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Perplexity of the same weights over the same tokens, dense (SDPA) and sparse, and KL(dense || sparse).

    Args:
        model: a Hub id, a directory, or "demo".
        dataset: a Hub id[:config[:split[:column]]], a file, a directory, or "demo".
        context_length: tokens read of each document, at least 2; shorter documents are left out.
        split: where a dataset has splits.
        max_documents: at least 1; the first documents that are long enough.
        sparse_attention: single fields of `SparseAttentionConfig` in place of the model's own.
        device: such as "cpu" or "cuda"; None takes the GPU if there is one.
        dtype: "auto" for the checkpoint's own, or the name of a floating-point dtype.

    Returns:
        See `hf_sparse_attn.evaluation.perplexity.compare_perplexity`; for a loaded model and tokens at hand, call that.
        In addition "model", "dataset", "sparse_attention" (without the calibrated hash) and "environment".

    Raises:
        ValueError: for an argument that cannot be, before any long work; the message names it.
    """
    from tqdm import tqdm

    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.environment import describe_environment, written_fields
    from hf_sparse_attn.evaluation.perplexity import compare_perplexity
    from hf_sparse_attn.loading import load_model, parse_device, parse_dtype, read_checkpoint

    model, dataset = str(model), str(dataset)
    check_integer("context_length", context_length, 1)
    if context_length < 2:
        raise ArgumentError("context_length", "must be at least 2: the first token is not predicted")
    check_integer("max_documents", max_documents, 1)
    found_device, found_dtype = parse_device(device), parse_dtype(dtype)
    with argument("dataset"):
        texts = load_documents(dataset, split)
    path, _, tokenizer, fields = read_checkpoint(model, sparse_attention)
    with argument("sparse_attention"):
        check_causal(SparseAttentionConfig.from_dict(fields))
    with argument("dataset"):
        documents = long_documents(texts, tokenizer, context_length, max_documents)
    loaded = load_model(
        model, path, sparse_attention, device=found_device, num_tokens=context_length, dtype=found_dtype
    )
    with argument("model", model):
        progress = partial(tqdm, desc="evaluating", unit="forward")
        result = compare_perplexity(loaded, documents, tokenizer=tokenizer, progress=progress)
    return result | {
        "model": model,
        "dataset": dataset,
        "sparse_attention": written_fields(fields),
        "environment": describe_environment(found_device),
    }


def plot_pattern(
    model: str,
    output: str | Path,
    *,
    dataset: str = "demo",
    split: str = "validation",
    context_length: int = 8192,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    rows: int | None = None,
    bins: int | None = None,
    sparse_attention: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> str:
    """Draw which keys each row attends to, on one document, and where the mass of the dense softmax lies.

    Args:
        model: a Hub id, a directory, or "demo".
        output: the picture to write, .png, .svg or .pdf, or .html for a page that shows each row's keys in the text.
        dataset: a Hub id[:config[:split[:column]]], a file, a directory, or "demo"; its first document that is long
            enough is read.
        split: where a dataset has splits.
        context_length: tokens of the document, at least 1.
        layers: indices of the layers to draw; None takes three across the depth.
        heads: indices of the query heads to draw; None takes three across the heads.
        rows: sampled rows, spread over the document, at least 1, whose softmax is computed; None takes 2**20 /
            context_length, or 128 if that is less, of which a page shows what 5 MB hold.
        bins: cells a side of a picture, at least 1; None takes 128. A page has none.
        sparse_attention: single fields of `SparseAttentionConfig` in place of the model's own.
        device: such as "cpu" or "cuda"; None takes the GPU if there is one.

    Returns:
        A line that says what was drawn.

    Raises:
        ValueError: for an argument that cannot be, before any long work; the message names it.
        RuntimeError: the picture cannot be written.
    """
    import torch

    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.environment import written_fields
    from hf_sparse_attn.integration import observe, record
    from hf_sparse_attn.loading import load_model, parse_device, read_checkpoint
    from hf_sparse_attn.output_files import PAGE_SUFFIX, check_drawing_file, replaced
    from hf_sparse_attn.pictures import MOST_BYTES, PageDocument, RowReader, readable_tokens, spread_rows, write_page
    from hf_sparse_attn.recording import Recorders
    from hf_sparse_attn.visualization import PatternRecorder
    from hf_sparse_attn.visualization import plot_pattern as draw

    model, dataset = str(model), str(dataset)
    check_integer("context_length", context_length, 1)
    for name, number in (("rows", rows), ("bins", bins)):
        if number is not None:
            check_integer(name, number, 1)
    if rows is not None and rows > context_length:
        raise ArgumentError(
            "rows", f"{rows} are more than the {context_length} of {{context_length}}", others=("context_length",)
        )
    with argument("output"):
        output = check_drawing_file(output)
    is_page = output.suffix == PAGE_SUFFIX
    if is_page and bins is not None:
        raise ArgumentError("bins", f"a page ({PAGE_SUFFIX}) has no cells; give it for a picture")
    found_device = parse_device(device)
    with argument("dataset"):
        texts = load_documents(dataset, split)
    path, config, tokenizer, fields = read_checkpoint(model, sparse_attention)
    config = text_config(config)
    layers = _chosen("layers", layers, config.num_hidden_layers)
    heads = _chosen("heads", heads, config.num_attention_heads)
    with argument("dataset"):
        (document,) = long_documents(texts, tokenizer, context_length, max_documents=1)
    loaded = load_model(model, path, sparse_attention, device=found_device, num_tokens=context_length)

    input_ids = torch.tensor([document["input_ids"]], device=found_device)
    counter = PatternRecorder(context_length, min(bins or 128, context_length), layers)
    num_rows = min(rows or max(_NUM_PAIRS // context_length, _LEAST_ROWS), context_length)
    reader = RowReader(context_length, spread_rows(context_length, num_rows), layers, heads)
    recorder = reader if is_page else Recorders([counter, reader])
    with torch.no_grad(), record(loaded, recorder), observe(loaded, reader.observe):
        loaded.base_model(input_ids=input_ids, use_cache=False)
    for layer in layers:
        if layer not in reader.layers:
            raise ArgumentError("layers", f"layer {layer} of the model has no attention")
        if max(heads) >= (num_heads := len(reader.layers[layer].density)):
            raise ArgumentError("heads", f"{max(heads)} is out of range; layer {layer} has 0 to {num_heads - 1}")
    with replaced(output) as file:
        if is_page:
            tokens = readable_tokens(tokenizer, document["input_ids"])
            shown = PageDocument(document["name"], model, written_fields(fields), tokens)
            write_page(shown, reader, file, most_bytes=MOST_BYTES if rows is None else None)
        else:
            draw(
                torch.stack([counter.counts[layer, head] for layer in layers for head in heads]),
                context_length,
                [f"layer {layer}, head {head}" for layer in layers for head in heads],
                file,
                num_columns=len(heads) if len(heads) > 1 else 3,
                layers=reader.layers,
            )
    found = reader.layers.values()
    density = torch.cat([layer.density for layer in found]).mean().item()
    kept = torch.cat([layer.kept for layer in found]).mean().item()
    return (
        f"{output}: {document['name']}, {context_length} tokens, layers {layers}, heads {heads}; over all layers and "
        f"heads, density {density:.3f} and {kept:.3f} of the softmax mass kept (of {num_rows} rows)"
    )


def _chosen(name: str, given: Sequence[int] | None, count: int) -> list[int]:
    """The given indices, checked, or up to three spread over all of them."""
    if given is None:
        return sorted({0, count // 3, 2 * count // 3})
    for index in given:
        if not 0 <= index < count:
            raise ArgumentError(name, f"{index} is out of range; the model has 0 to {count - 1}")
    return list(dict.fromkeys(given))
