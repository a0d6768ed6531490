"""Launching compiled variants: what chooses one, and what does not."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ringattn.kernels.movement import launch as module
from ringattn.kernels.movement.launch import launch, power_of_two


@dataclass
class Place:
    """What a launch asks of a tensor."""

    address: int = 256
    dtype: torch.dtype = torch.bfloat16
    device: int = 0

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.device


@dataclass
class Kernel:
    """Counts compilations; a variant remembers its launches."""

    compiled: list["Variant"] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Any:
        def first(*arguments: Any) -> "Variant":
            self.compiled.append(Variant([(grid, arguments)]))
            return self.compiled[-1]

        return first


@dataclass
class Variant:
    launches: list[Any]

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.launches.append((grid, arguments))


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_compiled", {})


def launched(
    kernel: Kernel, *tensors: Place, sizes: Any = (5,), numbers: Any = (64,), constants: Any = (True,)
) -> None:
    launch(kernel, (3, 2), tensors, sizes, numbers, constants)  # type: ignore[arg-type]


def test_the_second_launch_is_of_the_compiled_variant() -> None:
    kernel, one, other = Kernel(), Place(256), Place(512)
    launched(kernel, one, sizes=(5,))
    launched(kernel, other, sizes=(7,))  # another address and size, of the same kind
    (variant,) = kernel.compiled
    assert variant.launches == [((3, 2), (one, 5, 64, True)), ((3, 2, 1), (other, 7, 64, True))]


@pytest.mark.parametrize(
    "changed",
    [
        {"tensor": Place(264)},
        {"tensor": Place(dtype=torch.float32)},
        {"numbers": (65,)},
        {"numbers": (1,)},
        {"constants": (False,)},
        {"sizes": (2**31,)},
    ],
)
def test_what_triton_specialises_for_is_another_variant(changed: dict[str, Any]) -> None:
    kernel, first = Kernel(), Place()
    launched(kernel, first)
    launched(kernel, changed.pop("tensor", first), **changed)
    assert len(kernel.compiled) == 2


def test_kernels_do_not_share_variants() -> None:
    kernels = Kernel(), Kernel()
    for kernel in kernels:
        launched(kernel, Place())
    assert [len(kernel.compiled) for kernel in kernels] == [1, 1]


def test_sizes_are_rounded_up_to_powers_of_two() -> None:
    assert [power_of_two(number) for number in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
