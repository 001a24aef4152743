"""Ask questions about a long document, one after the other: it is read once and stays in the cache.

    hf-sparse-attn chat --model demo --document README.md
    hf-sparse-attn chat --model converted --document book.txt --question "Who is Emma?" "Where does she live?"

Without --question they are read from the terminal, until an empty line. After each answer stands what it took.
"""

from collections.abc import Iterator
from typing import Any

from hf_sparse_attn.cli.argument_types import json_object, output_file, positive_int
from hf_sparse_attn.cli.arguments import (
    OneLineErrors,
    argument,
    choose_device,
    choose_dtype,
    load_model,
    read_checkpoint,
)
from hf_sparse_attn.cli.output_files import write_json
from hf_sparse_attn.local_files import read_text


def parse_arguments() -> Any:
    parser = OneLineErrors(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id, directory, or demo; tuned for chat")
    parser.add_argument("--document", help="text file that stands before the first question")
    parser.add_argument("--question", nargs="+", help="what is asked (default: asked for in the terminal)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=200, help="of each answer (default: %(default)s)"
    )
    parser.add_argument(
        "--sparse-attention", type=json_object, default={}, help="JSON object of fields to override, or @FILE"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ... (default: the checkpoint's own)")
    parser.add_argument("--output", type=output_file, help="JSON file to write, after each answer")
    return parser.parse_args()


def questions(given: list[str] | None) -> Iterator[str]:
    if given is not None:
        yield from given
        return
    while question := _typed():
        yield question


def _typed() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def main() -> None:
    arguments = parse_arguments()
    document = ""
    if arguments.document:
        with argument("--document"):
            document = read_text(arguments.document)
            if not document.strip():
                raise ValueError(f"{arguments.document} is empty: it holds no text")

    from dataclasses import asdict

    from transformers import TextStreamer

    from hf_sparse_attn.cli.conversation import Conversation, check_chat_template
    from hf_sparse_attn.cli.environment import describe_environment

    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype)
    path, _, tokenizer, _ = read_checkpoint(arguments.model, arguments.sparse_attention)
    with argument(f"--model {arguments.model}"):
        check_chat_template(tokenizer)
    num_tokens = len(tokenizer(document, verbose=False)["input_ids"])
    model = load_model(
        arguments.model, path, arguments.sparse_attention, device=device, num_tokens=num_tokens, dtype=dtype
    )
    conversation = Conversation(model, tokenizer, document, arguments.max_new_tokens)
    turns = []
    for question in questions(arguments.question):
        if arguments.question:
            print(f"> {question}")
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with argument(f"--model {arguments.model}"):
            answer = conversation.ask(question, streamer)
        turns.append({"question": question, **asdict(answer)})
        if arguments.output:
            environment = describe_environment(device)
            write_json(arguments.output, {"model": arguments.model, "turns": turns, "environment": environment})
        print(
            f"[{answer.read} tokens read in {answer.reading_seconds:.1f} s; {answer.generated} more, "
            f"{answer.ms_per_token:.0f} ms each; {answer.context} in all]\n"
        )
