"Training recipes"
from importlib import import_module

from .models import CharacterModel, CharacterNet, build_model, load_weights, network_for, small_convnet, small_segmenter
from .registry import Recipe, recipe, recipes, register

__all__ = ['CharacterModel', 'CharacterNet', 'Recipe', 'build_model', 'load_weights', 'network_for', 'recipe', 'recipes', 'register', 'small_convnet',
           'small_segmenter']

_LATER = {**dict.fromkeys(('METRICS', 'Comparison', 'mean_ci', 'method_callbacks', 'read_method', 'score', 'table', 'verdict'), 'fastai_smooth.compare'),
          **dict.fromkeys(('calibrate', 'train'), 'fastai_smooth.recipes.training')}

def __getattr__(name): # these modules import `models` themselves
    if name not in _LATER: raise AttributeError(name)
    return getattr(import_module(_LATER[name]), name)
