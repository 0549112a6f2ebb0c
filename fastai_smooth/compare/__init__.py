"Does smoothing help on my data? Methods side by side, over seeds, with a verdict and a page"
from .comparison import Comparison
from .methods import Method, each_method, method_callbacks, parse_method, read_method
from .page import pictures, render, versions # noqa: F401  (for pages of trainings)
from .pictures import STYLES, picture, png_of, shorten, show_image # noqa: F401
from .scores import METRICS, score
from .verdict import differences, mean_ci, table, verdict

__all__ = ['METRICS', 'Comparison', 'Method', 'differences', 'each_method', 'mean_ci', 'method_callbacks', 'parse_method', 'read_method', 'score', 'table',
           'verdict']
