"""DeepSpeed ZeRO 1 to 3 over all ranks of data × sequence."""

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch

from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.engines.interface import EngineOptions
from ringattn.training.models import checkpoint_layers, parameter_groups

TAG = "zero"


def available() -> bool:
    """Whether the package is installed; does not import it."""
    return importlib.util.find_spec("deepspeed") is not None


class DeepSpeedEngine:
    """torch's AdamW under ZeRO, bf16 with float32 master weights on GPUs, float32 on the CPU.

    DeepSpeed makes the master weights from weights that it has rounded to bf16, FSDP2 from those of the model: in bf16
    the two curves part by about 0.2 % at the second step. In float32 they are the same.

    Every rank builds the whole model on the host before it is partitioned: host memory for one copy per rank. A
    checkpoint can be read again by the same number of ranks and the same stage only.
    """

    def __init__(self, mesh: SequenceMesh, options: EngineOptions) -> None:
        deepspeed = _import_deepspeed(options.device)
        model = options.load()
        self.num_parameters = sum(p.numel() for p in model.parameters())
        options.attach(model)
        if options.checkpoint_layers:
            checkpoint_layers(model)
        model.to(options.device).train()
        optimizer = torch.optim.AdamW(
            parameter_groups(model, options.weight_decay), lr=0.0, betas=options.betas, eps=options.eps
        )
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=zero_config(options), dist_init_required=False
        )
        self.model = self._engine

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-step; the loss is already divided by the global count of all of them."""
        self._engine.backward(loss, scale_wrt_gas=False)
        self._micro_step()

    def _micro_step(self) -> None:
        # DeepSpeed counts micro-steps in step(), which acts at the last one only; the loop sets the rate before that.
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, learning_rate: float) -> torch.Tensor | float:
        """Clips, steps, clears the gradients; returns the global gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm: torch.Tensor | float | None = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def save(self, folder: Path) -> None:
        """Writes DeepSpeed's own checkpoint files: torch.distributed.checkpoint does not know ZeRO's partitions."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote. Raises ValueError if the files are not those of this number of ranks and stage."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise ValueError(f"{folder} holds no DeepSpeed checkpoint of this number of ranks and ZeRO stage")


def zero_config(options: EngineOptions) -> dict[str, Any]:
    """DeepSpeed's configuration. Its batch size only fixes the number of micro-steps: the loss has its own count."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": options.micro_steps,
        "gradient_clipping": options.clip,
        "zero_optimization": {"stage": options.zero_stage, "overlap_comm": options.device.type == "cuda"},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": options.dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _import_deepspeed(device: torch.device) -> Any:
    """Raises ValueError if the package is missing. It is told to use the CPU only where there is no GPU to use."""
    if not available():
        raise ValueError("engine=deepspeed needs the package: pip install 'ringattn[deepspeed]', or use engine=fsdp2")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On the CPU it would compile this one at the first start: for all-reduces of inference, which training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
