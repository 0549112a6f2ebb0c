"Training recipes, and comparisons that tell whether smoothing helps"
from .comparison import METRICS, Comparison, mean_ci, method_callbacks, score, table, verdict
from .models import CharacterModel, CharacterNet, build_model, load_weights, small_convnet, small_segmenter
from .registry import Recipe, recipe, recipes
from .training import calibrate, train

__all__ = ['METRICS', 'CharacterModel', 'CharacterNet', 'Comparison', 'Recipe', 'build_model', 'calibrate', 'load_weights', 'mean_ci', 'method_callbacks',
           'recipe', 'recipes', 'score', 'small_convnet', 'small_segmenter', 'table', 'train', 'verdict']
