"Training recipes"
from .models import CharacterModel, CharacterNet, build_model, load_weights, network_for, small_convnet, small_segmenter
from .registry import Recipe, recipe, recipes, register

__all__ = ['CharacterModel', 'CharacterNet', 'Recipe', 'build_model', 'load_weights', 'network_for', 'recipe', 'recipes', 'register', 'small_convnet',
           'small_segmenter']

def __getattr__(name): # these modules import `models` themselves
    from .. import compare
    from . import training
    for module in (compare, training):
        if name in module.__all__: return getattr(module, name)
    raise AttributeError(name)
