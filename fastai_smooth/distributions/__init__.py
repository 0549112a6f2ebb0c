"Distributions: where the smoothing mass goes"
# ruff: noqa: F401  (names that other rooms import, beside the public ones)
from .base import Distribution, Mixture, check_distribution, without_autocast
from .fixed import ClassPrior, Similarity, Taxonomy, Uniform, training_labels
from .learned import Online, Teacher
from .predicted import PossibleClasses, Zipf
from .spatial import Spatial

__all__ = ['ClassPrior', 'Distribution', 'Mixture', 'Online', 'PossibleClasses', 'Similarity', 'Spatial', 'Taxonomy', 'Teacher', 'Uniform', 'Zipf']
