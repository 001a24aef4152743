"""Fine-tuning on long documents."""

from hf_sparse_attn.training.arguments import FinetuneArguments, check_hub, check_packages
from hf_sparse_attn.training.checkpoints import check_resumable, checkpoints, damage
from hf_sparse_attn.training.context_extension import check_first_loss, extend_context
from hf_sparse_attn.training.distillation import Distillation
from hf_sparse_attn.training.memory_estimate import TrainingMemory, tell_memory, training_memory
from hf_sparse_attn.training.processes import check_parts_of_rows
from hf_sparse_attn.training.trainer import FinetuneTrainer, finetune, make_trainer, train

__all__ = [
    "Distillation",
    "FinetuneArguments",
    "FinetuneTrainer",
    "TrainingMemory",
    "check_first_loss",
    "check_hub",
    "check_packages",
    "check_parts_of_rows",
    "check_resumable",
    "checkpoints",
    "damage",
    "extend_context",
    "finetune",
    "make_trainer",
    "tell_memory",
    "train",
    "training_memory",
]
