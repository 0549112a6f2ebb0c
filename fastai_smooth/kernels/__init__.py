"The losses as functions: a formula and faster paths for each, and the choice between them"
from .formulas import (
    REDUCTIONS,
    all_classes,
    all_possible,
    check_class_weight,
    check_several_classes,
    class_axis,
    cross_entropy_of_log_probs,
    in_single_precision,
    log_softmax,
    reduce,
    smooth_binary_cross_entropy_reference,
    smooth_cross_entropy_reference,
    surely,
    without_ignored,
)
from .gpu import check_reported_labels
from .heads import smooth_linear_cross_entropy
from .lazy_logits import LazyHead, LazyLogits
from .one_pass import dice_loss, focal_loss, logit_penalty
from .paths import (
    binary_cross_entropy,
    binary_entries,
    cross_entropy,
    cross_entropy_with,
    single_like,
    smooth_binary_cross_entropy,
    smooth_cross_entropy,
)

__all__ = ['smooth_cross_entropy', 'smooth_binary_cross_entropy', 'smooth_linear_cross_entropy', 'smooth_cross_entropy_reference',
           'smooth_binary_cross_entropy_reference']
