"Label noise with a known transition: the same names as in `fastai_smooth.data`"
from ..data.noise import corrupt_labels, transition_matrix

__all__ = ['corrupt_labels', 'transition_matrix']
