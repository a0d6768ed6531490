"""Engines: who holds the parameters and moves the gradients. The loop knows only `Engine`."""

from ringattn.training.engines.interface import Engine, EngineOptions, build_engine

__all__ = ["Engine", "EngineOptions", "build_engine"]
