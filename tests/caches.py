"""What ringattn keeps from call to call in one process: everything that a test must not leave to the next."""

import sys
from functools import _lru_cache_wrapper


def cached_functions() -> list["_lru_cache_wrapper[object]"]:
    """Every function of the loaded modules of ringattn that keeps its results."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "ringattn"]
    return [value for module in modules for value in vars(module).values() if isinstance(value, _lru_cache_wrapper)]


def clear_caches() -> None:
    """Forget all results of cached functions and of self-tests."""
    from ringattn.kernels import selftest
    from ringattn.recurrent.kernels import selftest as of_recurrences

    for function in cached_functions():
        function.cache_clear()
    selftest.forget()
    of_recurrences.forget()
