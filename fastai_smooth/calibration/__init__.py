"Whether probabilities can be believed: metrics, temperature scaling, pictures, and the smoothing strength that helps"
from .eps_find import SuggestedEps
from .interpretation import CalibrationInterpretation
from .metrics import AURC, ECE, MCE, NLL, AdaptiveECE, Brier, ClasswiseECE
from .predictions import Predictions, gather
from .temperature import ScaledModel, TemperatureScaling, cross_fit, fit_temperature, nll_split

__all__ = ['AURC', 'ECE', 'MCE', 'NLL', 'AdaptiveECE', 'Brier', 'CalibrationInterpretation', 'ClasswiseECE', 'Predictions', 'ScaledModel',
           'SuggestedEps', 'TemperatureScaling', 'cross_fit', 'fit_temperature', 'gather', 'nll_split']
