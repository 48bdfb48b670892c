"""Vectorized-timestep video diffusion: one noise level per latent frame.

`pusa.load`, `pusa.run` and `pusa.PusaPipeline` are for Python code and notebooks; see `pusa.api`. They are imported
when they are first used, since torch takes seconds. All their errors are a `pusa.PusaError`; see `pusa.errors`.
"""

import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pusa.api.given import Condition as Condition
    from pusa.api.models import load as load
    from pusa.api.pipeline import PusaPipeline as PusaPipeline
    from pusa.api.stages import run as run
    from pusa.errors import PartlyFailed as PartlyFailed
    from pusa.errors import PusaError as PusaError

PUBLIC = {  # name -> module
    "Condition": "pusa.api.given",
    "PartlyFailed": "pusa.errors",
    "PusaError": "pusa.errors",
    "PusaPipeline": "pusa.api.pipeline",
    "load": "pusa.api.models",
    "run": "pusa.api.stages",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())  # quiet, unless a program asks for the log


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():  # of a kernel without ipywidgets, which libraries would use for their bars
        warnings.filterwarnings("ignore", "IProgress not found")
        return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
