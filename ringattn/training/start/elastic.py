"""A run that goes on with another number of ranks: which sizes they share the work by then (`run.elastic`)."""

from pathlib import Path

from omegaconf import DictConfig

from ringattn.parallel.mesh.shape import resolve_mesh
from ringattn.training.start.output import read_config


def fitted(cfg: DictConfig, output: Path, world_size: int, ranks_per_node: int) -> tuple[DictConfig, list[str]]:
    """A configuration whose sizes fit the ranks that there are, and what is to be said about it.

    Without run.elastic nothing changes. With it, sizes of `parallel` that do not fit give way: first the ring, then
    data, then ulysses. The packs of a step stay those of the run in `output`, since the curve depends on them.

    Raises ValueError if no sizes fit, and for an engine whose checkpoints only as many ranks can read.
    """
    if cfg.run.elastic is not True:
        return cfg, []
    if cfg.engine.name == "deepspeed":
        raise ValueError(
            "run.elastic=true: a DeepSpeed checkpoint is read by as many ranks as wrote it; use engine=fsdp2"
        )
    cfg = cfg.copy()
    saved = (read_config(output)[0] or {}).get("data", {}).get("packs_per_step")
    if cfg.data.packs_per_step is None and saved is not None:
        cfg.data.packs_per_step = saved
    parallel = cfg.parallel
    data, ring, ulysses = parallel.data, parallel.ring, parallel.ulysses
    candidates = [(data, ring, ulysses), (data, None, ulysses), (None, None, ulysses), (data, None, None)]
    for sizes in (*candidates, (None, None, None)):
        if _fits(cfg, sizes, world_size, ranks_per_node):
            break
    else:
        raise ValueError(
            f"run.elastic=true: no parallel.data, parallel.ring and parallel.ulysses fit {world_size} ranks and "
            f"data.packs_per_step={cfg.data.packs_per_step}"
        )
    if sizes == (data, ring, ulysses):
        return cfg, []
    parallel.data, parallel.ring, parallel.ulysses = sizes
    changed = [
        f"parallel.{name}={before}"
        for name, before, after in zip(("data", "ring", "ulysses"), (data, ring, ulysses), sizes, strict=True)
        if before != after
    ]
    return cfg, [f"run.elastic: {', '.join(changed)} does not fit {world_size} ranks, and is left to them"]


def _fits(cfg: DictConfig, sizes: tuple[int | None, int | None, int | None], ranks: int, ranks_per_node: int) -> bool:
    data, ring, ulysses = sizes
    if cfg.parallel.scheme == "ulysses" and ring is None:  # it has no ring
        ring, data = 1, 1 if data is None and ulysses is None else data
    across = cfg.parallel.ulysses_across_nodes is True
    try:
        shape = resolve_mesh(ranks, data, ring, ulysses, ranks_per_node, across)
    except (ValueError, TypeError):
        return False
    packs = cfg.data.packs_per_step
    return not isinstance(packs, int) or packs % shape.data == 0
