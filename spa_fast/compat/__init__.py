"""Fronts shaped like POT, GeomLoss, PLOT and SuperGlue: their arguments and results over the solvers here."""

from spa_fast.compat.geomloss import SamplesLoss
from spa_fast.compat.plot import plot_sinkhorn
from spa_fast.compat.pot import ot_sinkhorn, ot_sinkhorn2
from spa_fast.compat.superglue import log_optimal_transport

__all__ = ["SamplesLoss", "log_optimal_transport", "ot_sinkhorn", "ot_sinkhorn2", "plot_sinkhorn"]
