"""Fine-tuning on long documents."""

from hf_sparse_attn.training.arguments import FinetuneArguments
from hf_sparse_attn.training.checkpoints import check_resumable, checkpoints, damage
from hf_sparse_attn.training.distillation import Distillation
from hf_sparse_attn.training.trainer import FinetuneTrainer, finetune, make_trainer, train

__all__ = [
    "Distillation",
    "FinetuneArguments",
    "FinetuneTrainer",
    "check_resumable",
    "checkpoints",
    "damage",
    "finetune",
    "make_trainer",
    "train",
]
