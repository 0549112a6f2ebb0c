"Whether probabilities can be believed: metrics, temperature scaling, pictures, and the smoothing strength that helps"
from .eps_find import SuggestedEps
from .interpretation import CalibrationInterpretation
from .intervals import calibrated_error, calibration_test, intervals
from . import label_issues # gives the Learner `find_label_issues`
from .metrics import AUGRC, AURC, ECE, MCE, NLL, AdaptiveECE, Brier, ClasswiseECE, DebiasedCE, SmoothECE
from .predictions import Predictions, gather
from .temperature import ScaledModel, TemperatureScaling, cross_fit, fit_temperature, folds_of, nll_split

__all__ = ['AUGRC', 'AURC', 'ECE', 'MCE', 'NLL', 'AdaptiveECE', 'Brier', 'CalibrationInterpretation', 'ClasswiseECE', 'DebiasedCE', 'Predictions',
           'ScaledModel', 'SmoothECE', 'SuggestedEps', 'TemperatureScaling', 'calibrated_error', 'calibration_test', 'cross_fit', 'fit_temperature', 'gather',
           'intervals', 'nll_split']
