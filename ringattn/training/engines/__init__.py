"""Engines: who holds the parameters and moves the gradients. The loop knows only `Engine`."""

from ringattn.training.engines.build import build_engine
from ringattn.training.engines.interface import Engine, EngineOptions

__all__ = ["Engine", "EngineOptions", "build_engine"]
