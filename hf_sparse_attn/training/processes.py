"""Several processes that train one model: work that is done once, errors that end all of them, Trainer's part in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_sparse_attn.config import SparseAttentionConfig, layer_shape, sliding_windows, sparse_config
from hf_sparse_attn.errors import ArgumentError, OtherProcessError

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")


def agreed(work: Callable[[], T]) -> T:
    """Do `work` in every process, and go on only if none failed: one that goes on alone waits for the others for ever.

    Calls may nest: an error goes up through all of them in every process.

    Raises:
        OtherProcessError: it failed in another process, whose error is raised there; of several, in the first of them.
    """
    try:
        result = work()
    except Exception as error:
        if not getattr(error, "_agreed", False):
            _exchange(None, error)
        raise
    _exchange(None)
    return result


def made_once(make: Callable[[], Dataset]) -> Dataset:
    """A dataset that the main process of each machine makes, and of which the others read its temporary files.

    Errors as in `agreed`. All processes map the same files (under TMPDIR) into their memory.
    """
    from datasets import load_from_disk

    state = PartialState()
    if state.num_processes == 1:
        return make()
    is_main = state.is_local_main_process
    own = tempfile.mkdtemp(prefix="hf_sparse_attn-rows-") if is_main else ""
    try:
        agreed(lambda: make().save_to_disk(own) if is_main else None)
        directory = _exchange(own)[state.process_index - state.local_process_index]
        return agreed(lambda: load_from_disk(directory))
    finally:
        if is_main:
            shutil.rmtree(own, ignore_errors=True)  # what is mapped stays readable


def any_process(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds in one of the processes, all of which must ask."""
    if PartialState().num_processes == 1:
        return condition
    found = torch.tensor(float(condition), device=device)
    torch.distributed.all_reduce(found)
    return bool(found)


def _exchange(value: Any, failure: Exception | None = None) -> list[Any]:
    """Every process's value, unless one has failed."""
    state = PartialState()
    if state.num_processes == 1:
        return [value]
    values = gather_object([(failure is None, value)])
    failed = [process for process, (succeeded, _) in enumerate(values) if not succeeded]
    if not failed:
        return [value for _, value in values]
    if failure is None or failed[0] != state.process_index:
        error = OtherProcessError("another process ended in an error")
        error._agreed = True  # type: ignore[attr-defined]
        raise error from failure
    failure._agreed = True  # type: ignore[attr-defined]
    return []


def parts_of_rows(arguments: TrainingArguments) -> int:
    """The number of processes among which Ulysses is to divide each row's tokens, by the arguments or the launcher."""
    config = arguments.parallelism_config
    if config is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        config = ParallelismConfig()
    return 1 if config is None else config.sp_size


def check_parts_of_rows(
    arguments: TrainingArguments, config: Any, context_length: int, sparse: SparseAttentionConfig | None = None
) -> None:
    """Make sure that Ulysses can divide the heads and rows of a model; quick, for before a model is loaded.

    Args:
        config: the model's.
        sparse: its sparse attention, if not what `config` says.

    Raises:
        ArgumentError: for "parallelism_config".
    """
    size = parts_of_rows(arguments)
    if size > 1 and (sparse or sparse_config(config)).global_token_ids:
        raise ArgumentError("parallelism_config", f"sp_size={size} (Ulysses) cannot go with global_token_ids")
    counts = {"tokens of a row": context_length}
    for layer in sliding_windows(config):
        if (shape := layer_shape(config, layer)) is not None:
            counts[f"KV heads of layer {layer}"] = shape[1]
    for what, count in counts.items():
        if count % size:
            raise ArgumentError("parallelism_config", f"sp_size={size} does not divide the {count} {what}")


class _AtBeginning(TrainerCallback):
    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._work()


class TrainerOfProcesses(Trainer):
    """A Trainer whose processes end together, save together, and exchange heads where Ulysses is asked for."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.by_sequence:
            # accelerate takes only the names that it knows; DeepSpeed takes any registered attention.
            model, accelerator = cast(PreTrainedModel, self.model), cast(Any, self.accelerator)
            accelerator.parallelism_config.sp_handler.sp_attn_implementation = model.config._attn_implementation

    @property
    def by_sequence(self) -> bool:
        """Whether each row's tokens are divided among processes, by Ulysses."""
        config: Any = getattr(self.accelerator, "parallelism_config", None)
        return config is not None and config.sp_enabled

    @property
    def is_sharded(self) -> bool:
        """Whether no process has all of the model, whose forward then is the Trainer's alone to call."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def can_save_alone(self) -> bool:
        """Whether this process has the whole model and is the one that saves it."""
        return not self.is_sharded and self.is_world_process_zero()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "labels" not in inputs and "shift_labels" in inputs:  # DeepSpeed's, of this process's part of the tokens
            inputs = {**inputs, "labels": inputs["shift_labels"]}
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if not (self.by_sequence and model.training):
            return found
        zero = self.accelerator.deepspeed_config["zero_optimization"]
        if zero["stage"] == 3 and zero.get("reduce_scatter", True):
            return found
        # Transformers gives each part of a sequence the loss of all of it. DeepSpeed then adds the parts' gradients up,
        # as if they were those of parts of the loss; only this kind of ZeRO-3 takes their mean.
        loss, *others = found if isinstance(found, tuple) else (found,)
        loss = loss.detach() + (loss - loss.detach()) / self.get_sp_size()
        return (loss, *others) if others else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ever; a model that was evaluated is wrapped for training all the same.

        accelerate takes a model that it has prepared for evaluation for one that is wrapped in DDP: each process would
        train on its own gradients.
        """
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            models: list[Any] = self.accelerator._models
            if any(model is self.model for model in models) and not self.is_sharded:
                model: Any = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
                model._is_accelerate_prepared = False
                models.clear()

    def at_beginning(self, work: Callable[[], object]) -> None:
        """Do `work`, such as an evaluation, before the first step: now, or where a model is sharded, when it is.

        Then a checkpoint to resume from has been loaded.
        """
        if self.is_sharded:
            self.add_callback(_AtBeginning(work))
        else:
            work()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raises OtherProcessError: the loss is not finite in another process."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.args.world_size > 1:
            finite = torch.isfinite(self.accelerator.gather(loss.detach().float().mean())).tolist()
            if not all(finite) and finite.index(False) != self.args.process_index:
                raise OtherProcessError("the loss is not finite in another process")
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model where it is sharded, too; checkpoints are as the plugin says."""
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled and not _internal_call else None
        before = plugin and plugin.state_dict_type
        try:
            if plugin:
                plugin.set_state_dict_type("FULL_STATE_DICT")
            super().save_model(output_dir, _internal_call)
        finally:
            if plugin:
                plugin.set_state_dict_type(before)
