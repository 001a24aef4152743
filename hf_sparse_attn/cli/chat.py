"""Ask questions about a long document, one after the other: it is read once and stays in the cache.

    hf-sparse-attn chat --model demo --document README.md
    hf-sparse-attn chat --model converted --document book.txt --question "Who is Emma?" "Where does she live?"

Without --question, questions are read from the terminal until an empty line. Each answer is followed by its cost.
"""

from collections.abc import Iterator

from hf_sparse_attn.cli.argument_types import positive_int
from hf_sparse_attn.cli.arguments import OneLineErrors
from hf_sparse_attn.cli.options import MODEL_HELP, add, command_parser
from hf_sparse_attn.data.local_files import read_text
from hf_sparse_attn.errors import argument
from hf_sparse_attn.output_files import write_json


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    add(parser, "model", help=f"{MODEL_HELP} It must be tuned for chat.")
    parser.add_argument("--document", metavar="FILE", help="Put the text of this file before the first question.")
    parser.add_argument(
        "--question", nargs="+", metavar="TEXT", help="Ask these questions (default: those typed in the terminal)."
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=200,
        metavar="N",
        help="End each answer after N tokens (default: %(default)s).",
    )
    add(parser, "sparse-attention", "device", "dtype")
    add(parser, "output", help="Write the conversation to this JSON file after each answer.")
    return parser


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
    arguments = make_parser().parse_args()
    document = ""
    if arguments.document:
        with argument("document"):
            document = read_text(arguments.document)
            if not document.strip():
                raise ValueError(f"{arguments.document} is empty: it holds no text")

    from dataclasses import asdict

    from transformers import TextStreamer

    from hf_sparse_attn.cli.conversation import Conversation, check_chat_template
    from hf_sparse_attn.environment import describe_environment
    from hf_sparse_attn.loading import load_model, parse_device, parse_dtype, read_checkpoint

    device = parse_device(arguments.device)
    dtype = parse_dtype(arguments.dtype)
    path, _, tokenizer, _ = read_checkpoint(arguments.model, arguments.sparse_attention)
    with argument("model", arguments.model):
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
        with argument("model", arguments.model):
            answer = conversation.ask(question, streamer)
        turns.append({"question": question, **asdict(answer)})
        if arguments.output:
            environment = describe_environment(device)
            write_json(arguments.output, {"model": arguments.model, "turns": turns, "environment": environment})
        print(
            f"[{answer.read} tokens read in {answer.reading_seconds:.1f} s; {answer.generated} more, "
            f"{answer.ms_per_token:.0f} ms each; {answer.context} in all]\n"
        )
