"""The rows that `finetune` trains and evaluates on, made from what its options say."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_sparse_attn.cli.arguments import argument, warn
from hf_sparse_attn.data import StreamedRows, best_fit, load_documents, mixed, packed, tokenize, windowed
from hf_sparse_attn.data.rows import dataset_of_rows, lengths

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_sparse_attn.training import FinetuneArguments


@dataclass
class SourceOfRows:
    """How documents become rows: the options `--context-length`, `--rows`, `--eos` and `--streaming`."""

    context_length: int
    kind: str
    eos: bool
    streaming: bool
    _documents: dict[tuple[str, str], Dataset] = field(default_factory=dict)

    def read(self, option: str, datasets: list[str], split: str) -> None:
        """Read the documents of datasets, unless they are streamed; what is wrong with one is told before long work.

        Raises:
            UserError: naming the option.
        """
        for dataset in [] if self.streaming else datasets:
            with argument(option):
                self._documents[dataset, split] = load_documents(dataset, split)

    def train_rows(
        self, datasets: list[str], shares: list[float] | None, tokenizer: Any, training: FinetuneArguments
    ) -> tuple[Dataset | StreamedRows, list[str]]:
        """The rows to train on, and a line on each dataset that tells how many tokens are read of it.

        Rows of a mixture with shares are read in their order, which `training` is told.

        Raises:
            UserError: a dataset gives no row, or the shares are too far apart.
        """
        if self.streaming:
            stream = self._stream(datasets, shares, tokenizer, "train")
            for dataset in datasets:
                with _naming("--dataset", dataset, datasets):
                    stream.first_rows(dataset, 1)
            parts_read = [_percent(share, sum(stream.shares)) for share in stream.shares]
            pairs = zip(datasets, parts_read, strict=True)
            return stream, [f"{dataset}: streamed, {part} of the tokens to be read" for dataset, part in pairs]
        parts, lines = [], []
        for dataset in datasets:
            with _naming("--dataset", dataset, datasets):
                tokens = tokenize(self._documents.pop((dataset, "train")), tokenizer, self._eos(tokenizer))
                parts.append(self._rows(tokens, tokenizer))
            lines.append(f"{dataset}: {self._filled(lengths(tokens), len(parts[-1]))}")
        seed = training.seed if training.data_seed is None else training.data_seed
        with argument("--dataset"):
            mixture = mixed(parts, shares, rows_to_read(training), seed)
        total = sum(mixture.tokens)
        if len(datasets) > 1:
            parts_read = [f"; {_percent(number, total)} of the tokens to be read" for number in mixture.tokens]
            lines = [line + part for line, part in zip(lines, parts_read, strict=True)]
        if shares:
            training.train_sampling_strategy = "sequential"
            for dataset, epochs in zip(datasets, mixture.epochs, strict=True):
                if epochs > 1:
                    warn(f"dataset {dataset!r} is read {epochs:.3g} times for its share of the tokens")
        return mixture.rows, lines

    def eval_rows(self, dataset: str, number: int, tokenizer: Any) -> Dataset:
        """Rows to evaluate on: spread over the validation split's documents, or its first ones if it is streamed.

        Raises:
            UserError: naming `--eval-dataset`.
        """
        with argument("--eval-dataset"):
            if self.streaming:
                stream = self._stream([dataset], None, tokenizer, "validation")
                return dataset_of_rows(stream.first_rows(dataset, number))
            tokens = tokenize(self._documents.pop((dataset, "validation")), tokenizer, self._eos(tokenizer))
            rows = self._rows(tokens, tokenizer)
            # Spread over the documents: the first rows are all of the first one.
            return rows.select(range(0, len(rows), -(-len(rows) // number)))

    def _rows(self, tokens: Dataset, tokenizer: Any) -> Dataset:
        if self.kind == "best-fit":
            return best_fit(tokens, self.context_length, _pad_token_id(tokenizer))
        return (packed if self.kind == "packed" else windowed)(tokens, self.context_length)

    def _stream(self, datasets: list[str], shares: list[float] | None, tokenizer: Any, split: str) -> StreamedRows:
        return StreamedRows(
            datasets,
            tokenizer,
            self.context_length,
            self.kind,
            split,
            shares,
            self._eos(tokenizer),
            _pad_token_id(tokenizer),
        )

    def _eos(self, tokenizer: Any) -> bool:
        return self.eos and tokenizer.eos_token_id is not None

    def _filled(self, found: list[int], num_rows: int) -> str:
        total, used = sum(found), num_rows * self.context_length
        padding = ""
        if self.kind == "best-fit":  # which leaves out rests and documents of one token, and nothing else
            room, used = used, sum(number - (number % self.context_length == 1) for number in found)
            padding = f", {_percent(room - used, room)} of them padding"
        left_out = f", {_percent(total - used, total)} of the tokens in no row" if used < total else ""
        rows = f"{num_rows:,} {self.kind} rows of {self.context_length:,}{padding}"
        return f"{len(found):,} documents of {total:,} tokens, {rows}{left_out}"


def rows_to_read(training: FinetuneArguments) -> int | None:
    """How many rows the training reads with `--max-steps`; None without."""
    if training.max_steps < 1:
        return None
    per_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return training.max_steps * per_step


def _pad_token_id(tokenizer: Any) -> int:
    """Any token will do for padding, which has no targets and is not seen by documents."""
    return tokenizer.pad_token_id or tokenizer.eos_token_id or 0


def _naming(option: str, dataset: str, datasets: list[str]) -> AbstractContextManager[None]:
    return argument(option if len(datasets) == 1 else f"{option} {dataset}")


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.2%}"
