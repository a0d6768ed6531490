"""What is measured: a model's shape, a stream of documents, what is done about memory, and where it runs.

Legend: T tokens of the stream, t of one rank, H query heads, K key heads, D head dim, E hidden size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringattn import Documents, SequenceMesh
from ringattn.benchmarking.workloads import workload
from ringattn.hf.loss import shifted_labels
from ringattn.kernels.spec import CallSpec
from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.training.model.architecture import configured

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
# A model for seconds on a CPU, under the same keys.
TINY = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Case:
    """One row at one length.

    Arguments:
        row: who trains, a name of `rows.ROWS`.
        config: the transformers configuration of the model.
        docs: the stream of T tokens.
        memory, states: what is done about memory; a peer takes of it what it has.
        updates: whether there is an optimizer. Without one its moments are left out, and weights stay.
        dtype: of the computation.
        dry: attention's kernel writes zeros.
        steps: those that are timed, beside one before them.
        host_room: GiB of host memory that one rank may keep layers' shares in; None: nobody looks.
        fused: by what ours has its elementwise work fused, "compile", "liger" or "none".
        head_chunks: chunks of heads that ours computes attention in, one after another.
    """

    row: str
    config: Any
    docs: Documents
    memory: MemorySettings
    states: StateSettings
    updates: bool = True
    dtype: torch.dtype = torch.bfloat16
    dry: bool = False
    steps: int = 1
    seed: int = 0
    host_room: float | None = None
    fused: str = "none"
    head_chunks: int = 1

    @property
    def mixed(self) -> bool:
        """Whether weights are held wider than they are computed with."""
        return self.states.weights != _name_of(self.dtype)

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.states.weights == "float32" else torch.bfloat16

    def ids(self, device: torch.device) -> Tensor:
        """(T,) the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, self.config.vocab_size, (self.docs.total,), generator=generator).to(device)

    def targets(self, ids: Tensor) -> Tensor:
        """(T,) each token's next one in its document, -100 at ends."""
        return shifted_labels(ids, self.docs)

    @property
    def num_targets(self) -> int:
        return sum(max(0, length - 1) for length in self.docs.lengths)


@dataclass(frozen=True)
class Place:
    """This rank, and all of them."""

    mesh: SequenceMesh
    device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def ranks(self) -> int:
        return dist.get_world_size()

    def most(self, *numbers: float) -> list[float]:
        """The largest of all ranks. Collective."""
        found = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    def total(self, number: Tensor) -> float:
        """The sum over all ranks. Collective."""
        found = number.detach().double().to(self.device)
        dist.all_reduce(found)
        return float(found)


def model_config(name: str, layers: int | None) -> Any:
    """The transformers configuration of a file of configs/model, or `tiny` for a CPU, with another number of layers.

    Raises ValueError for a name that there is not.
    """
    if name == "tiny":
        family, keys = "llama", dict(TINY)
    else:
        path = CONFIGS / f"{name}.yaml"
        if not path.exists():
            known = ", ".join(sorted(one.stem for one in CONFIGS.glob("*.yaml")))
            raise ValueError(f"--model must be tiny or one of {known}, got {name!r}")
        from omegaconf import OmegaConf

        found: Any = OmegaConf.to_container(OmegaConf.load(path))
        family, keys = found["family"], found["config"]
    return configured(family, None, keys | ({} if layers is None else {"num_hidden_layers": layers}))[0]


def kernel_spec(config: Any, device: torch.device, dtype: torch.dtype) -> CallSpec:
    """What a model's attention asks of a kernel."""
    dim = head_dim(config)
    return CallSpec(device.type, dtype, dim, dim, config.num_attention_heads, config.num_key_value_heads)


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def new_model(case: Case, device: torch.device, attention: str = "sdpa") -> nn.Module:
    """The model made where it is used, with weights of the seed: the same in every row and on every rank."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(case.seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            type(case.config).from_dict(case.config.to_dict()), dtype=case.weight_dtype, attn_implementation=attention
        )
    return model.train()


def packs(kind: str, tokens: int, seed: int) -> Documents:
    """Documents of so many tokens; kinds are those of `ringattn.benchmarking.workloads`.

    Raises ValueError for fewer tokens than the kind has documents.
    """
    docs = workload(f"{kind}{tokens}", seed).docs
    if docs.total != tokens:
        raise ValueError(f"--documents={kind} has {len(docs.lengths)} documents, too many for --seq-len={tokens}")
    return docs


def check_host_room(case: Case, wanted: int) -> None:
    """Raises MemoryError if layers' shares want more of the host than a rank may have: the system would end it."""
    if case.host_room is not None and wanted > case.host_room * 2**30:
        raise MemoryError(
            f"{wanted / 2**30:.1f} GiB are wanted to keep layers' shares in, and a rank may have {case.host_room:.1f}"
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
