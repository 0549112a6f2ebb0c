"""What a user writes, for the type checker: it is read by mypy and never run.

What is right must pass, and each call that is wrong must be reported: `# type: ignore[code]` waits for that very error, and mypy complains where it does not
come (`warn_unused_ignores`). fastai has no types of its own, so that a `Learner` or `DataLoaders` may be anything here."""
from typing import Any

import numpy as np
import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SchedCos
from fastai.losses import CrossEntropyLossFlat
from torch import Tensor
from typing_extensions import assert_type

from fastai_smooth.all import (
    AURC,
    ECE,
    NLL,
    CalibrationInterpretation,
    ClassPrior,
    CombinedLoss,
    Comparison,
    CutMixMask,
    DawidSkene,
    EachClass,
    LabelSmoothing,
    LabelSmoothingBCE,
    LabelSmoothingCrossEntropy,
    LabelSmoothingDice,
    LabelSmoothingFocal,
    LogitPenalty,
    MixedTarget,
    MultiTargetLoss,
    OneOf,
    Online,
    Similarity,
    Taxonomy,
    TemperatureScaling,
    Uniform,
    convert_eps,
    corrupt_labels,
    smooth_binary,
    smooth_cross_entropy,
    smooth_labels,
    smooth_linear_cross_entropy,
    soft_loss,
    to_dense,
)


def callbacks() -> None:
    LabelSmoothing(0.1)
    LabelSmoothing([.1, .2], n_classes=2)
    LabelSmoothing(np.full(3, .1), Online(3))
    LabelSmoothing(torch.full((3,), .1), 0.7*Uniform() + 0.3*ClassPrior([1, 2, 3]))
    LabelSmoothing(SchedCos(.2, 0.))
    LabelSmoothing(lambda share: .1*share)
    LabelSmoothing({0: .1, 1: .2}, target=(0, 1))
    OneOf(MixUp(), CutMix(), CutMixMask(1.), p=[.4, .4, .1])
    LabelSmoothing('a lot')  # type: ignore[arg-type]
    LabelSmoothing(.1, smoothing=.1)  # type: ignore[call-arg]
    LabelSmoothing(.1, n_classes='ten')  # type: ignore[arg-type]
    LabelSmoothing(.1, 'uniform')  # type: ignore[arg-type]
    LabelSmoothing(.1, None, 10)  # type: ignore[call-arg]
    OneOf(MixUp(), p=.5)  # type: ignore[arg-type]
    CutMixMask('a lot')  # type: ignore[arg-type]


def losses(z: Tensor, y: Tensor, features: Tensor) -> None:
    loss = LabelSmoothingCrossEntropy(.1, [1., 2., 3.], dist=Taxonomy(['x/a', 'x/b', 'y/c']))
    mixed = MixedTarget(y[:, None], torch.ones(4, 1), 3)
    assert_type(loss(z, y), Tensor)
    assert_type(loss(z, mixed, inputs=(features,)), Tensor)
    assert_type(loss.decodes(z), Tensor)
    loss.eps, loss.reduction = [.1, .2, .3], 'none'
    assert_type(mixed.dense(), Tensor)
    assert_type(LabelSmoothingBCE(.1, pos_weight=torch.ones(3), eps_neg=[.1, 0., .1])(z, y), Tensor)
    assert_type(CombinedLoss(LabelSmoothingDice(), LabelSmoothingFocal(.1, gamma=3.), weights=[1., .5])(z, y), Tensor)
    assert_type(MultiTargetLoss(CrossEntropyLossFlat(), loss)([z, z], y, y), Tensor)
    assert_type(EachClass(torch.nn.CrossEntropyLoss())(z, y), Tensor)
    assert_type(LogitPenalty(loss, 'confidence', strength=.1)(z, y), Tensor)
    LabelSmoothingCrossEntropy('a lot')  # type: ignore[arg-type]
    LabelSmoothingCrossEntropy(.1, smoothing=.1)  # type: ignore[call-arg]
    LabelSmoothingCrossEntropy(.1, dist=torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    LabelSmoothingCrossEntropy(.1, weight=2.)  # type: ignore[arg-type]
    LabelSmoothingBCE(thresh='half')  # type: ignore[arg-type]
    CombinedLoss(CrossEntropyLossFlat, torch.nn.CrossEntropyLoss())  # type: ignore[arg-type]
    LogitPenalty(torch.nn.CrossEntropyLoss())  # type: ignore[arg-type]
    EachClass('cross entropy')  # type: ignore[arg-type]
    loss(z)  # type: ignore[call-arg]
    loss(z, [0, 1])  # type: ignore[arg-type]
    loss(z, y, weight=z)  # type: ignore[call-arg]
    loss.eps = 'a lot'  # type: ignore[assignment]


def functions(z: Tensor, y: Tensor, weight: Tensor) -> None:
    assert_type(to_dense(y, 3), Tensor)
    assert_type(smooth_labels(y, [.1, .2, .3], 3, dist=Similarity(np.eye(3))), Tensor)
    assert_type(smooth_binary(y, .1, eps_pos=.2), Tensor)
    assert_type(smooth_cross_entropy(z, y, torch.tensor(.1), reduction='sum'), Tensor)
    assert_type(smooth_linear_cross_entropy(z, weight, MixedTarget(y[:, None], z, 3), dist=ClassPrior(np.ones(3)), chunk=64), Tensor)
    assert_type(convert_eps(.1, 10, 'uniform', 'others'), float)
    assert_type(Uniform()(z, axis=1), Tensor)
    assert_type(ClassPrior([1, 2]).matrix(2), Tensor)
    assert_type(Online(3).n_classes, int)
    soft_loss(torch.nn.CrossEntropyLoss())
    corrupt_labels([0, 1, 2], .2, seed=1)
    to_dense(y)  # type: ignore[call-arg]
    to_dense([0, 1], 3)  # type: ignore[arg-type]
    smooth_labels(y, 'a lot')  # type: ignore[arg-type]
    smooth_cross_entropy(z, y, .1, -1)  # type: ignore[call-arg]
    smooth_linear_cross_entropy(z, weight, y, dist='uniform')  # type: ignore[arg-type]
    convert_eps([.1], 10, 'uniform', 'others')  # type: ignore[arg-type]
    Online('ten')  # type: ignore[arg-type]
    ClassPrior('cats')  # type: ignore[arg-type]
    Uniform() + 'half'  # type: ignore[operator]
    corrupt_labels(y, 'a few')  # type: ignore[arg-type]


def calibration(learn: Any) -> None:
    metrics = [ECE(), ECE(10, 'l2'), NLL(), AURC('logit_norm')]
    assert_type(metrics[0].value, float)
    seen = CalibrationInterpretation.from_learner(learn, ds_idx=0)
    assert_type(seen, CalibrationInterpretation)
    assert_type(seen.temperature(), float | Tensor)
    assert_type(seen.calibrated(), CalibrationInterpretation)
    seen.plot_reliability(n_bins=10)
    scaling = TemperatureScaling(learn, act=torch.sigmoid)
    scaling.fit(allow_train=True).export('learner.pkl')
    assert_type(scaling.temperature, float | Tensor | None)
    DawidSkene(np.zeros((3, 2)))
    ECE('many')  # type: ignore[arg-type]
    ECE(bins=10)  # type: ignore[call-arg]
    CalibrationInterpretation.from_learner()  # type: ignore[call-arg]
    CalibrationInterpretation.from_learner(learn, 'valid')  # type: ignore[arg-type]
    TemperatureScaling()  # type: ignore[call-arg]
    TemperatureScaling(learn, act='sigmoid')  # type: ignore[arg-type]
    scaling.fit(allow_training=True)  # type: ignore[call-arg]


def comparison() -> None:
    compared = Comparison('digits', methods=('ce', 'ls'), eps=(.1, .2), seeds=2)
    assert_type(compared.run(), dict[Any, Any])
    Comparison('digits', seeds='two')  # type: ignore[arg-type]
    Comparison('digits', repeats=2)  # type: ignore[call-arg]
