"""DeepSpeed ZeRO 1 to 3 over all ranks of data × sequence."""

import importlib.util
import logging
import os
from typing import Any

import torch
from torch import nn

from ringattn.hf.layers import decoder_layers
from ringattn.memory.settings import StateSettings
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.checkpoint.marker import BadCheckpoint
from ringattn.training.checkpoint.saved_state import SavedState
from ringattn.training.engines.alike import bits_of, numbers_of
from ringattn.training.engines.deepspeed_states import give_back, taken
from ringattn.training.engines.interface import STATE, EngineOptions
from ringattn.training.model.models import parameter_groups

LIVE = 10**9  # DeepSpeed's own bound of gathered parameters
ALL = 10**15  # more than there are


def available() -> bool:
    """Whether the package is installed; does not import it."""
    return importlib.util.find_spec("deepspeed") is not None


class DeepSpeedEngine:
    """AdamW under ZeRO: torch's, or DeepSpeed's where states are on the host.

    It computes in bf16 with float32 master weights on GPUs, in float32 on the CPU.

    DeepSpeed makes the master weights from weights that it has rounded to bf16, FSDP2 from those of the model: in bf16
    the two curves part by about 0.2 % at the second step. In float32 they are the same.

    Every rank builds the whole model on the host before it is partitioned: host memory for one copy per rank. A
    checkpoint can be read again by the same number of ranks and the same stage only.
    """

    goes_back_twice = False

    def __init__(self, mesh: SequenceMesh, options: EngineOptions) -> None:
        if (reason := why_not(options.states, options.zero_stage)) is not None:
            raise ValueError(reason)
        deepspeed = _import_deepspeed(options.device)
        model = options.load()
        self.num_parameters = sum(p.numel() for p in model.parameters())
        options.attach(model)
        model.to(options.device).train()
        layer = sum(p.numel() for p in decoder_layers(model)[0].parameters())
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=_adamw(model, options),
            config=zero_config(options, layer),
            dist_init_required=False,
        )
        self.model = self._engine
        self._frozen = any(not parameter.requires_grad for parameter in model.parameters())

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-step; the loss is already divided by the global count of all of them."""
        self._engine.backward(loss, scale_wrt_gas=False)
        self._micro_step()

    def _micro_step(self) -> None:
        # DeepSpeed counts micro-steps in step(), which acts at the last one only; the loop sets the rate before that.
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, learning_rate: float) -> torch.Tensor | float:
        """Clips, steps where the norm is finite, clears the gradients; returns the global norm before clipping.

        Every one of DeepSpeed's optimizers waits for the norm and leaves such a step out by itself; then it is infinite
        or NaN here.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm: torch.Tensor | float | None = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def norm(self) -> torch.Tensor:
        """Known after a step alone."""
        raise NotImplementedError("DeepSpeed computes the gradient norm in its step")

    def forget(self) -> None:
        """Nothing: a forward pass leaves nothing, and a backward pass cannot be undone."""

    def alike(self) -> dict[str, Any]:
        """Parameters that every rank holds whole (none at stage 3), buffers, and the optimizer's
        numbers."""
        parameters = bits_of(p for p in self._engine.module.parameters() if not hasattr(p, "ds_id"))
        numbers = numbers_of(self._engine.optimizer.optimizer)
        return {"parameters": parameters, "buffers": bits_of(self._engine.module.buffers())} | numbers

    def state(self) -> dict[str, Any]:
        """What the files of DeepSpeed's own checkpoint would hold of this rank."""
        return taken(self._engine)

    def load(self, saved: SavedState) -> None:
        """Reads what `state` was. Raises BadCheckpoint if it is not that of this number of ranks and stage."""
        try:
            loaded = give_back(self._engine, saved, STATE, strict=not self._frozen)
        except KeyError as error:
            raise BadCheckpoint(f"the checkpoint holds no {error} of this number of ranks and ZeRO stage") from None
        if not loaded:
            raise BadCheckpoint("the checkpoint is not one of DeepSpeed, this number of ranks and this ZeRO stage")


def _adamw(model: nn.Module, options: EngineOptions) -> torch.optim.Optimizer:
    groups = parameter_groups(model, options.weight_decay)
    given: dict[str, Any] = {"lr": 0.0, "betas": options.betas, "eps": options.eps}
    if options.states.states_on == "device":
        return torch.optim.AdamW(groups, **given)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    made: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **given)
    return made


def zero_config(options: EngineOptions, layer: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Its batch size only fixes the number of micro-steps: the loss has its own count.

    Arguments:
        layer: parameters of a decoder layer.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": options.micro_steps,
        "gradient_clipping": options.clip,
        "zero_optimization": _zero(options, layer),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": options.dtype == torch.bfloat16},
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[options.states.reduce],
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _zero(options: EngineOptions, layer: int) -> dict[str, Any]:
    """What is partitioned, where it is, and at stage 3 how weights are gathered."""
    states, on_gpu = options.states, options.device.type == "cuda"
    config: dict[str, Any] = {"stage": options.zero_stage, "overlap_comm": on_gpu}
    host = {"device": "cpu", "pin_memory": on_gpu}
    if states.states_on == "host":
        config["offload_optimizer"] = host
    if options.zero_stage == 3:
        # DeepSpeed counts in parameters: those that it gathers ahead, and how far off the next use of some may be for
        # them to stay.
        config["stage3_prefetch_bucket_size"] = states.prefetch * layer
        config["stage3_max_reuse_distance"] = 0 if states.reshard else ALL
        config["stage3_max_live_parameters"] = max(LIVE, (states.prefetch + 1) * layer) if states.reshard else ALL
        if states.states_on == "host":
            config["offload_param"] = host
    return config


def why_not(states: StateSettings, stage: int) -> str | None:
    """Which of the states DeepSpeed cannot do at a stage, and why, or None."""
    if states.weights != "float32":
        return (
            f"weights={states.weights} is not for engine=deepspeed, which rounds to the nearest, so that small updates "
            "are lost; use engine=fsdp2"
        )
    if states.moments != "float32":
        return (
            f"moments={states.moments} is not for engine=deepspeed, whose flat partitions do not fit torchao's blocks; "
            "use engine=fsdp2"
        )
    for name, usual in (("reshard", True), ("prefetch", 1)):
        value = getattr(states, name)
        if stage != 3 and value != usual:
            return (
                f"{name}={value} is about weights that are gathered, and with engine.zero_stage={stage} every rank "
                "holds them whole; use engine.zero_stage=3 or engine=fsdp2"
            )
    return None


def why_no_cpu_adam(device_type: str) -> str | None:
    """Why DeepSpeed's AdamW for the host cannot be had here, or None.

    Its C++ is compiled at the first call on a machine, which takes a minute or two.
    """
    _import_deepspeed(torch.device(device_type))
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # compilers fail in many ways
        return (
            f"DeepSpeed's CPU Adam cannot be built here ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        )
    return None


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
