"""A program for launchers: the console command in several processes on the CPU, with what accelerate leaves to GPUs.

accelerate launch ... tests/helpers/launched.py fsdp|deepspeed|nan|plain finetune ...
"""

import os
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

from hf_sparse_attn import logits
from hf_sparse_attn.cli.main import main


def allow_fsdp():
    """accelerate takes FSDP for GPUs alone, and falls back to DDP without a word."""
    original = AcceleratorState.__init__

    def initialize(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if "fsdp_plugin" in self.__dict__:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = initialize


def allow_deepspeed():
    """accelerate counts DeepSpeed's processes only on GPUs."""
    original = PartialState.__init__

    def initialize(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if torch.distributed.is_initialized():
            self.distributed_type, self.device, self.backend = DistributedType.DEEPSPEED, torch.device("cpu"), "gloo"
            self.num_processes, self.process_index = torch.distributed.get_world_size(), torch.distributed.get_rank()
            self.local_process_index = int(os.environ["LOCAL_RANK"])

    PartialState.__init__ = initialize


def lose_one_loss():
    """The second process's second loss is NaN."""
    original = Trainer.training_step

    def step(trainer, *args):
        loss = original(trainer, *args)
        return loss * float("nan") if trainer.args.process_index == trainer.state.global_step == 1 else loss

    Trainer.training_step = step


if __name__ == "__main__":
    kinds = {"fsdp": allow_fsdp, "deepspeed": allow_deepspeed, "nan": lose_one_loss, "plain": lambda: None}
    kinds[sys.argv.pop(1)]()
    logits.LEAST_ROWS, logits.CHUNK_BYTES = 7, 1  # several chunks of so short rows, too
    main()
