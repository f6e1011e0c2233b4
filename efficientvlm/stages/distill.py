"""distill: pre-training with a teacher beside the student; the same code as pretrain."""

from efficientvlm.stages.pretrain import run

__all__ = ["run"]
