"""Ask questions about a long document, one after the other: it is read once and stays in the cache.

    python scripts/chat.py --model demo --document README.md
    python scripts/chat.py --model converted --document book.txt --question "Who is Emma?" "Where does she live?"

Without --question they are read from the terminal, until an empty line. After each answer stands what it took.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_sparse_attn.command_line import (
    OneLineErrors,
    argument,
    check_output_file,
    json_object,
    positive_int,
    read_checkpoint,
    run,
    write_json,
)


def parse_arguments() -> Any:
    parser = OneLineErrors(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id, directory, or demo; tuned for chat")
    parser.add_argument("--document", help="text file that stands before the first question")
    parser.add_argument("--question", nargs="+", help="what is asked (default: asked for in the terminal)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=200, help="of each answer (default: %(default)s)"
    )
    parser.add_argument("--sparse-attention", type=json_object, default={}, help="JSON object of fields to override")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ... (default: the checkpoint's own)")
    parser.add_argument("--output", help="JSON file to write, when all is asked")
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
    if arguments.output:
        with argument("--output"):
            check_output_file(arguments.output)
    document = ""
    if arguments.document:
        with argument("--document"):
            document = Path(arguments.document).read_text(encoding="utf-8")

    from dataclasses import asdict

    from transformers import TextStreamer

    from hf_sparse_attn.conversation import Conversation, check_chat_template
    from hf_sparse_attn.environment import describe_environment
    from hf_sparse_attn.loading import load_sparse_model, parse_device, parse_dtype

    with argument("--device"):
        device = parse_device(arguments.device)
    with argument("--dtype"):
        dtype = parse_dtype(arguments.dtype)
    path, _, tokenizer, _ = read_checkpoint(arguments.model, arguments.sparse_attention)
    with argument(f"--model {arguments.model}"):
        check_chat_template(tokenizer)
        model = load_sparse_model(path, arguments.sparse_attention, dtype=dtype).to(device).eval()
    conversation = Conversation(model, tokenizer, document, arguments.max_new_tokens)
    turns = []
    for question in questions(arguments.question):
        if arguments.question:
            print(f"> {question}")
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = conversation.ask(question, streamer)
        turns.append({"question": question, **asdict(answer)})
        print(
            f"[{answer.read} tokens read in {answer.reading_seconds:.1f} s; {answer.generated} more, "
            f"{answer.ms_per_token:.0f} ms each; {answer.context} in all]\n"
        )
    if arguments.output:
        environment = describe_environment(device)
        write_json(arguments.output, {"model": arguments.model, "turns": turns, "environment": environment})


if __name__ == "__main__":
    run(main)
