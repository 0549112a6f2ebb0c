"Training recipes, and comparisons that tell whether smoothing helps"
from .comparison import Comparison
from .methods import method_callbacks, read_method
from .models import CharacterModel, CharacterNet, build_model, load_weights, network_for, small_convnet, small_segmenter
from .registry import Recipe, recipe, recipes, register
from .scores import METRICS, mean_ci, score, table, verdict
from .training import calibrate, train

__all__ = ['METRICS', 'CharacterModel', 'CharacterNet', 'Comparison', 'Recipe', 'build_model', 'calibrate', 'load_weights', 'mean_ci', 'method_callbacks',
           'network_for', 'read_method', 'recipe', 'recipes', 'register', 'score', 'small_convnet', 'small_segmenter', 'table', 'train', 'verdict']
