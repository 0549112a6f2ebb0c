"Targets: index labels, dense targets and mixtures; how they are encoded, checked and smoothed"
# ruff: noqa: F401  (names that other rooms import, beside the public ones)
from .binary import BINARY_CONVENTIONS, binary_levels, binary_target, check_probabilities, smooth_binary
from .dense import (SOFTMAX_CONVENTIONS, Eps, Inputs, Numbers, base_tensor, check_axis, check_choice, check_dense, check_dist, check_eps, check_labels,
                    check_not_nan, convert_eps, dense_target, eps_along, is_index, is_mixed, is_readable, label_error, per_class, read_eps, shape_error,
                    smooth_labels, spread, to_dense, transforms_active, uniform_eps)
from .mixed import MixedTarget, Target

__all__ = ['MixedTarget', 'binary_levels', 'convert_eps', 'smooth_binary', 'smooth_labels', 'to_dense']
