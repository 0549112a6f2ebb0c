"Losses on fastai's contract that take index, dense and mixed targets"
from .binary import LabelSmoothingBCE
from .combined import CombinedLoss, EachClass, LogitPenalty, MultiTargetLoss
from .overlap import LabelSmoothingDice, LabelSmoothingFocal
from .settings import LossSettings, loss_settings
from .softmax import (
    LabelRelaxation,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    LabelSmoothingNLL,
    MultiLabelSmoothingCrossEntropy,
    SmoothingLoss,
)

__all__ = ['CombinedLoss', 'EachClass', 'LabelRelaxation', 'LabelSmoothingBCE', 'LabelSmoothingCrossEntropy', 'LabelSmoothingCrossEntropyFlat',
           'LabelSmoothingDice', 'LabelSmoothingFocal', 'LabelSmoothingNLL', 'LogitPenalty', 'MultiLabelSmoothingCrossEntropy', 'MultiTargetLoss',
           'SmoothingLoss', 'loss_settings']
