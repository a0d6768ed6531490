"""Python's garbage collector, and what lives as long as a run."""

import gc


class Garbage:
    """Keeps the collector off what a run is made of: modules, configurations, the model.

    A look at all objects takes a quarter of a second for the 400,000 of torch and transformers, on the host, in the
    middle of a step, on each rank at a time of its own; and all ranks wait for the one that looks. Use it as a context
    manager; afterwards the collector sees everything again.
    """

    def settle(self) -> None:
        """What there is now stays for the run; what of it is garbage goes. All ranks do it at the same place."""
        gc.collect()
        gc.freeze()

    def __enter__(self) -> "Garbage":
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
