"""Fine-tuning on long documents."""

from hf_sparse_attn.training.arguments import FinetuneArguments
from hf_sparse_attn.training.checkpoints import check_resumable, checkpoints, damage
from hf_sparse_attn.training.context_extension import check_first_loss, extend_context
from hf_sparse_attn.training.trainer import FinetuneTrainer, finetune, make_trainer, train

__all__ = [
    "FinetuneArguments",
    "FinetuneTrainer",
    "check_first_loss",
    "check_resumable",
    "checkpoints",
    "damage",
    "extend_context",
    "finetune",
    "make_trainer",
    "train",
]
