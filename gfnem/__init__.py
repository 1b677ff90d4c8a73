"""Latent variable models with discrete, compositional latents, trained by GFlowNet-EM.

The public nouns are imported when they are asked for: `gfnem.EM` needs torch, `import gfnem` does
not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gfnem.app.trained import load
    from gfnem.em import EM
    from gfnem.errors import UserError
    from gfnem.gflownet.policy import Policy
    from gfnem.gflownet.sequence import SequencePolicy
    from gfnem.latents import EStep, Latents, LatentTable
    from gfnem.model import (
        ClosedFormModel,
        FactorisedModel,
        LatentVariableModel,
        PriorModel,
        TractableModel,
    )
    from gfnem.posterior import Posterior
    from gfnem.posteriors.exact import ExactPosterior
    from gfnem.posteriors.gflownet import GFlowNetPosterior
    from gfnem.posteriors.importance import ImportancePosterior
    from gfnem.posteriors.mcmc import MCMC
    from gfnem.posteriors.mean_field import MeanField
    from gfnem.run import Run
    from gfnem.schedule import AdaptiveThreshold, Alternation

__version__ = "0.1.0"
__all__ = [
    "EM",
    "MCMC",
    "AdaptiveThreshold",
    "Alternation",
    "ClosedFormModel",
    "EStep",
    "ExactPosterior",
    "FactorisedModel",
    "GFlowNetPosterior",
    "ImportancePosterior",
    "LatentTable",
    "LatentVariableModel",
    "Latents",
    "MeanField",
    "Policy",
    "Posterior",
    "PriorModel",
    "Run",
    "SequencePolicy",
    "TractableModel",
    "UserError",
    "load",
]

_MODULES = {
    "load": "gfnem.app.trained",
    "EM": "gfnem.em",
    "UserError": "gfnem.errors",
    "Policy": "gfnem.gflownet.policy",
    "SequencePolicy": "gfnem.gflownet.sequence",
    "EStep": "gfnem.latents",
    "LatentTable": "gfnem.latents",
    "Latents": "gfnem.latents",
    "ClosedFormModel": "gfnem.model",
    "FactorisedModel": "gfnem.model",
    "LatentVariableModel": "gfnem.model",
    "PriorModel": "gfnem.model",
    "TractableModel": "gfnem.model",
    "Posterior": "gfnem.posterior",
    "ExactPosterior": "gfnem.posteriors.exact",
    "GFlowNetPosterior": "gfnem.posteriors.gflownet",
    "ImportancePosterior": "gfnem.posteriors.importance",
    "MCMC": "gfnem.posteriors.mcmc",
    "MeanField": "gfnem.posteriors.mean_field",
    "Run": "gfnem.run",
    "AdaptiveThreshold": "gfnem.schedule",
    "Alternation": "gfnem.schedule",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
