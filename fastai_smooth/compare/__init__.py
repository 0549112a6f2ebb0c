"Does smoothing help on my data? Methods side by side, over seeds, with a verdict and a page"
from .comparison import Comparison
from .labels import Suspects, find_suspects, write_suspects
from .methods import method_callbacks
from .page import pictures, render, versions # noqa: F401  (for pages of trainings)
from .pictures import STYLES, picture, png_of, shorten, show_image # noqa: F401
from .scores import METRICS, score
from .verdict import Difference, Evidence, differences, mean_ci, table, verdict
from ..method_names import Method, each_method, parse_method, read_method

__all__ = ['METRICS', 'Comparison', 'Difference', 'Evidence', 'Method', 'Suspects', 'differences', 'each_method', 'find_suspects', 'mean_ci',
           'method_callbacks', 'parse_method', 'read_method', 'score', 'table', 'verdict', 'write_suspects']
