"The names under which recipes, comparisons and networks were first published; they live in `train`, `compare` and `data`"
from ..compare import METRICS, Comparison, mean_ci, method_callbacks, read_method, score, table, verdict
from ..data import build_model, load_weights, network_for, small_convnet, small_segmenter
from ..train import Recipe, calibrate, recipe, recipes, register, train

__all__ = ['METRICS', 'Comparison', 'Recipe', 'build_model', 'calibrate', 'load_weights', 'mean_ci', 'method_callbacks', 'network_for', 'read_method', 'recipe',
           'recipes', 'register', 'score', 'small_convnet', 'small_segmenter', 'table', 'train', 'verdict']
