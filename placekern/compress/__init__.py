"""From a trained network to a compressed one: pruning, codebooks, the swap and its report."""

from .config import CompressConfig
from .cost import CostReport, LayerCost, predict
from .cost_work import Rates
from .fine_tune import FineTune
from .prune import PruneSchedule
from .quantize import fit_kmeans, fit_uniform
from .recipe import Recipe
from .recipe_config import RecipeConfig
from .recipe_report import RecipeLayer, RecipeReport
from .report import CompressReport, LayerReport
from .sensitivity import Sensitivity, sensitivity
from .sensitivity_rows import SensitivityRow
from .suggest import SuggestedLayer, Suggestion, suggest
from .swap import compress_
from .train import FitRecord, FitStep, fit

__all__ = [
    "CompressConfig",
    "CompressReport",
    "CostReport",
    "FineTune",
    "FitRecord",
    "FitStep",
    "LayerCost",
    "LayerReport",
    "PruneSchedule",
    "Rates",
    "Recipe",
    "RecipeConfig",
    "RecipeLayer",
    "RecipeReport",
    "Sensitivity",
    "SensitivityRow",
    "SuggestedLayer",
    "Suggestion",
    "compress_",
    "fit",
    "fit_kmeans",
    "fit_uniform",
    "predict",
    "sensitivity",
    "suggest",
]
