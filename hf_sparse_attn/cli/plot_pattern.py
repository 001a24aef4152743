"""A picture of which keys each row attends to, on one document.

    hf-sparse-attn plot --model converted --output pattern.png
    hf-sparse-attn plot --model demo --dataset book.txt --context-length 4096 --layers 0 12 --heads 0 4 \
        --output pattern.png
"""

from typing import Any

from hf_sparse_attn.cli.argument_types import PICTURE_SUFFIXES, json_object, picture_file, positive_int
from hf_sparse_attn.cli.arguments import OneLineErrors, UserError, argument, choose_device, load_model, read_checkpoint
from hf_sparse_attn.cli.output_files import replaced
from hf_sparse_attn.config import text_config


def parse_arguments(words: list[str] | None = None) -> Any:
    """The arguments of the command line, or of a list of its words.

    Raises:
        UserError: they cannot be.
    """
    parser = OneLineErrors(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id, directory, or demo")
    parser.add_argument("--dataset", default="demo", help="its first long enough document (default: %(default)s)")
    parser.add_argument("--split", default="validation", help="where a dataset has splits (default: %(default)s)")
    parser.add_argument("--context-length", type=positive_int, default=8192, help="default: %(default)s")
    parser.add_argument("--layers", type=int, nargs="+", help="layer indices (default: three across the depth)")
    parser.add_argument("--heads", type=int, nargs="+", help="query head indices (default: three across the heads)")
    parser.add_argument("--bins", type=positive_int, default=128, help="cells a side (default: %(default)s)")
    parser.add_argument(
        "--sparse-attention", type=json_object, default={}, help="JSON object of fields to override, or @FILE"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--output", type=picture_file, required=True, help="picture to write: " + ", ".join(PICTURE_SUFFIXES)
    )
    return parser.parse_args(words)


def choose(name: str, given: list[int] | None, count: int) -> list[int]:
    """The given indices, checked, or up to three spread over all of them."""
    if given is None:
        return sorted({0, count // 3, 2 * count // 3})
    for index in given:
        if not 0 <= index < count:
            raise UserError(f"argument {name}: {index} is out of range; the model has 0 to {count - 1}")
    return list(dict.fromkeys(given))


def main() -> None:
    print(plot(parse_arguments()))


def plot(arguments: Any) -> str:
    """Draw as `parse_arguments` says; what was drawn, in a line."""
    import torch

    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.integration import record
    from hf_sparse_attn.visualization import PatternRecorder, plot_pattern

    device = choose_device(arguments.device)
    with argument("--dataset"):
        texts = load_documents(arguments.dataset, arguments.split)
    path, config, tokenizer, _ = read_checkpoint(arguments.model, arguments.sparse_attention)
    config = text_config(config)
    layers = choose("--layers", arguments.layers, config.num_hidden_layers)
    heads = choose("--heads", arguments.heads, config.num_attention_heads)
    with argument("--dataset"):
        (document,) = long_documents(texts, tokenizer, arguments.context_length, max_documents=1)
    num_tokens = arguments.context_length
    model = load_model(arguments.model, path, arguments.sparse_attention, device=device, num_tokens=num_tokens)

    input_ids = torch.tensor([document["input_ids"]], device=device)
    recorder = PatternRecorder(num_tokens, min(arguments.bins, num_tokens), layers)
    with torch.no_grad(), record(model, recorder):
        model.base_model(input_ids=input_ids, use_cache=False)
    for layer in layers:
        if (layer, heads[0]) not in recorder.counts:
            raise UserError(f"argument --layers: layer {layer} of the model has no attention")
    with replaced(arguments.output) as picture:
        plot_pattern(
            torch.stack([recorder.counts[layer, head] for layer in layers for head in heads]),
            num_tokens,
            [f"layer {layer}, head {head}" for layer in layers for head in heads],
            picture,
            num_columns=len(heads),
        )
    return f"{arguments.output}: {document['name']}, {num_tokens} tokens, layers {layers}, heads {heads}"
