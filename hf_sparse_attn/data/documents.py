"""Long documents: where they come from, and their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from hf_sparse_attn.data.hub import read_hub, stream_hub
from hf_sparse_attn.data.local_files import batches, local_documents, local_path, read_local
from hf_sparse_attn.data.named import copy_of_named
from hf_sparse_attn.data.progress import document_bar, quiet_if_short
from hf_sparse_attn.data.tables import temporary_dataset
from hf_sparse_attn.demo import demo_documents

if TYPE_CHECKING:
    from datasets import Dataset


def load_documents(dataset: str, split: str = "train") -> Dataset:
    """Documents of a dataset: a `datasets.Dataset` with the columns "name" and "text".

    `dataset` is one of
    - `demo`: the documents of `hf_sparse_attn.demo`;
    - a .txt or .md file (one document), a .jsonl or .parquet file (one document a line or row, in its "text" column
      or in the one named by `FILE:column`), or a directory of such files, searched recursively and read in order of
      path; links to directories are not followed, and pipes, devices and links to nothing are passed over. Text is
      UTF-8, with or without a byte order mark. Local data has no splits: all of it is returned whatever `split` is;
    - a Hub id with optional parts, `id:config:split:column`; an empty part keeps its default, and a split given
      here goes before the `split` argument;
    - `pg19`, `arxiv`, `govreport` or `booksum`, with the same optional parts: a Hub id whose columns are known
      (`hf_sparse_attn.data.named`). Of the last three a document is the article, a line "Summary:" and the summary.
      `NAME=PATH` reads a copy of one: a .parquet, .jsonl, .json or .csv file, or a directory as the Hub has it,
      whose files are named after splits.

    Names come from the column "name" where a row has one. Nulls in the column are documents without text, which are
    left out. Local documents wait in a temporary file (under TMPDIR), of which memory holds what is being read.

    Raises:
        FileNotFoundError: a local file or directory does not exist.
        OSError: a file or directory cannot be opened; the message names it.
        ValueError: the dataset is empty, or a file of it lacks the column, holds something else than text in it, or
            cannot be read; the message starts with the dataset and names the file, and the line of a .jsonl file.
    """
    from datasets import Dataset

    if dataset == "demo":
        return Dataset.from_list(demo_documents(split))
    local = _local(dataset)
    documents = read_hub(dataset, split) if local is None else read_local(dataset, *local)
    with quiet_if_short(documents):
        documents = documents.filter(_has_text, input_columns="text")
    if len(documents) == 0:
        raise ValueError(_empty(dataset))
    return documents


def stream_documents(dataset: str, split: str = "train") -> Iterator[tuple[str, str]]:
    """Names and texts of what `load_documents` returns, read or downloaded as they are asked for.

    Raises:
        What `load_documents` raises, when the document at fault is reached.
    """
    if dataset == "demo":
        yield from ((document["name"], document["text"]) for document in demo_documents(split))
        return
    local = _local(dataset)
    empty = True
    for name, text in stream_hub(dataset, split) if local is None else local_documents(dataset, *local):
        if text is not None and _has_text(text):
            empty = False
            yield name, text
    if empty:
        raise ValueError(_empty(dataset))


def tokenize(documents: Dataset, tokenizer: Any, eos: bool = False) -> Dataset:
    """Documents with their tokens: the columns "name" and "input_ids" (a list of ints per document, maybe empty).

    A tokenizer with threads of its own uses them: documents go to it a million characters at a time.

    Args:
        eos: end each document that has tokens with the tokenizer's EOS token, unless the tokenizer does.

    Raises:
        ValueError: `eos` is asked for, and the tokenizer has no EOS token.
    """
    import pyarrow as pa

    schema = pa.schema({"name": pa.large_string(), "input_ids": pa.list_(pa.int32())})
    bar = document_bar(documents, "tokenizing")

    def tokenized() -> Iterator[pa.RecordBatch]:
        groups = documents.select_columns(["name", "text"]).iter(batch_size=8)
        pairs = chain.from_iterable(zip(group["name"], group["text"], strict=True) for group in groups)
        for batch in batches(pairs):
            bar.set_postfix_str(f"reading {sum(len(document['text'] or '') for document in batch):,} characters")
            ids = token_ids([document["text"] or "" for document in batch], tokenizer, eos)
            names = [document["name"] for document in batch]
            yield pa.RecordBatch.from_pydict({"name": names, "input_ids": ids}, schema=schema)
            bar.update(len(batch))

    with bar:
        return temporary_dataset(tokenized(), schema)


def token_ids(texts: list[str], tokenizer: Any, eos: bool = False) -> list[list[int]]:
    """Tokens of each text, as `tokenize` makes them."""
    last = None
    if eos:
        last = tokenizer.eos_token_id
        if last is None:
            raise ValueError("the tokenizer has no EOS token to end documents with")
    # verbose=False: the tokenizer's warning about its maximum length says nothing new about long documents.
    found: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    if last is None:
        return found
    return [[*ids, last] if ids and ids[-1] != last else ids for ids in found]


def long_documents(
    documents: Dataset, tokenizer: Any, num_tokens: int, max_documents: int | None = None
) -> list[dict[str, Any]]:
    """The first `max_documents` documents of at least `num_tokens` tokens, each cut to its first `num_tokens`.

    Documents are tokenised as they are needed, so a large dataset is read only as far as it must be.

    Returns:
        Dicts with "name" and "input_ids" (a list of `num_tokens` ints).

    Raises:
        ValueError: no document is long enough; the message says how long the longest one is.
    """
    chosen: list[dict[str, Any]] = []
    longest = 0
    for document in documents.select_columns(["name", "text"]):
        [ids] = token_ids([document["text"]], tokenizer)
        longest = max(longest, len(ids))
        if len(ids) >= num_tokens:
            chosen.append({"name": document["name"], "input_ids": ids[:num_tokens]})
        if max_documents is not None and len(chosen) >= max_documents:
            break
    if not chosen:
        raise ValueError(
            f"dataset has no document of at least {num_tokens} tokens: the longest of its {len(documents)} "
            f"documents has {longest}"
        )
    return chosen


def _local(dataset: str) -> Any:
    return None if copy_of_named(dataset) else local_path(dataset)


def _has_text(text: str | None) -> bool:
    return bool(text and text.strip())


def _empty(dataset: str) -> str:
    return f"dataset {dataset!r} is empty: it holds no document with any text"
