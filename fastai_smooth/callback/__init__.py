"One callback that smooths the targets of any `Learner`, the losses that it trains with, and mixers"
from .fused_head import FusedHead
from .mixers import CutMixMask, OneOf, TimmMix
from .smoothing import LabelSmoothing
from .soft_loss import soft_loss
from .training_pass import TrainingPassCallback

__all__ = ['soft_loss', 'TrainingPassCallback', 'LabelSmoothing', 'FusedHead', 'OneOf', 'CutMixMask', 'TimmMix']
