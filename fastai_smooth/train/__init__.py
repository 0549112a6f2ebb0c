"Named recipes, and trainings that survive"
from importlib import import_module

from . import recipes as _named # noqa: F401  (registers them)
from .registry import Recipe, recipe, recipes, register

__all__ = ['Checkpoints', 'Recipe', 'calibrate', 'export_safe', 'load_safe', 'model_card', 'push_to_hub', 'read_checkpoint', 'recipe', 'recipes',
           'register', 'train', 'write_checkpoint']

_LATER = {'train': 'training', 'calibrate': 'exported', 'Checkpoints': 'checkpoints', 'read_checkpoint': 'checkpoints', 'write_checkpoint': 'checkpoints',
          'export_safe': 'safe', 'load_safe': 'safe', 'model_card': 'card', 'push_to_hub': 'card'}

def __getattr__(name): # what needs torch is imported when it is asked for, so that settings can be listed without it
    if name not in _LATER: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f'.{_LATER[name]}', __name__), name)
