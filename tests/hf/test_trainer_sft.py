"""TRL's SFTTrainer on a mesh: every option that changes batches or the loss, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl", reason="TRL is not installed (pip install 'ringattn[dev]')")

from tests.hf.trainer_runs import QUIET, failure, history, mesh, same_history, small_model
from tests.pool import Pools

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} <eos>"
    "{% endgeneration %}{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
)
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "padded": ("text", {}),
    "multiple": ("text", {"pad_to_multiple_of": 16}),
    "bfd": ("text", {"packing": True, "max_length": 48}),
    "bfd_split": ("text", {"packing": True, "packing_strategy": "bfd_split", "max_length": 24}),
    "wrapped": ("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 32}),
    "padding free": ("text", {"padding_free": True, "max_length": None}),
    "evaluation alone packed": ("text", {"eval_packing": True, "max_length": 40}),
    "completion": ("completion", {"completion_only_loss": True}),
    "whole": ("completion", {"completion_only_loss": False}),
    "assistant": ("messages", {"assistant_only_loss": True}),
}
# Where stock attention sees one document for each row, and so is right.
STOCK = ("padded", "multiple", "completion", "whole", "assistant")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{n}": n for n in range(3, 97)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE
    )


def rows(kind: str, count: int, seed: int) -> Any:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)

    def words() -> str:
        size = int(torch.randint(3, 12, (), generator=generator))
        return " ".join(f"w{n}" for n in torch.randint(3, 97, (size,), generator=generator).tolist())

    def row() -> dict[str, Any]:
        if kind == "text":
            return {"text": f"{words()} {words()}"}
        if kind == "completion":
            return {"prompt": f"{words()} ", "completion": words()}
        return {"messages": [{"role": role, "content": words()} for role in ("user", "assistant", "user", "assistant")]}

    return Dataset.from_list([row() for _ in range(count)])


def tuned(folder: str, ring: int, name: str, stock: bool = False) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    from ringattn.hf.trainer import OnMesh

    class Mine(OnMesh, SFTTrainer):
        pass

    kind, changes = OPTIONS[name]
    quiet = QUIET | {"max_steps": 3, "num_train_epochs": -1, "per_device_train_batch_size": 2}
    config = SFTConfig(
        output_dir=folder, bf16=False, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=3,
        gradient_checkpointing=False, **(quiet | changes),
    )  # fmt: skip
    given = {"train_dataset": rows(kind, 14, 0), "eval_dataset": rows(kind, 3, 1), "processing_class": tokenizer()}
    on_mesh: dict[str, Any] = {} if stock else {"mesh": mesh(1, ring), "policy": "zigzag"}
    trainer = (SFTTrainer if stock else Mine)(small_model(), config, **given, **on_mesh)
    trainer.train()
    return history(trainer)


@pytest.mark.nightly
def test_the_same_curve(pool: Pools, tmp_path: Path) -> None:
    one = pool(1).run_many(tuned, [(str(tmp_path), 1, name) for name in OPTIONS], timeout=300.0)
    two = pool(2).run_many(tuned, [(str(tmp_path), 2, name) for name in OPTIONS], timeout=300.0)
    for name, (expected,), found in zip(OPTIONS, one, two, strict=True):
        assert len(expected["loss"]) == 3, name
        for mine in found:
            same_history(mine, expected)
    stock = pool(1).run_many(tuned, [(str(tmp_path), 1, name, True) for name in STOCK], timeout=300.0)
    for name, (expected,) in zip(STOCK, stock, strict=True):
        found = two[list(OPTIONS).index(name)][0]
        assert [x for _, x in found["loss"]] == pytest.approx([x for _, x in expected["loss"]], rel=2e-5), name


def adapted(folder: str, ring: int) -> dict[str, Any]:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from ringattn.hf.trainer import OnMesh

    class Mine(OnMesh, SFTTrainer):
        pass

    config = SFTConfig(
        output_dir=folder, bf16=False, gradient_checkpointing=False, **(QUIET | {"max_steps": 3, "learning_rate": 0.1})
    )
    trainer = Mine(
        small_model(), config, mesh=mesh(1, ring), train_dataset=rows("text", 8, 0), processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    trainer.train()
    return history(trainer) | {"weights": {}}


def test_adapters(pool: Pools, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (pip install 'ringattn[hf]')")
    expected = pool(1).run(adapted, str(tmp_path), 1)[0]
    for found in pool(2).run(adapted, str(tmp_path), 2):
        same_history(found, expected)


def made(folder: str, family: str, changes: dict[str, Any]) -> str:
    from trl import SFTConfig, SFTTrainer

    from ringattn.hf.trainer import OnMesh

    class Mine(OnMesh, SFTTrainer):
        pass

    config = SFTConfig(output_dir=folder, bf16=False, **(QUIET | {"max_steps": 1} | changes))
    model = small_model(family=family)
    return failure(
        lambda: Mine(
            model, config, mesh=mesh(1, 1), train_dataset=rows("text", 4, 0), processing_class=tokenizer()
        ).train()
    )


def routed(folder: str, ring: int, coefficient: float | None, stock: bool = False) -> list[float]:
    from trl import SFTConfig, SFTTrainer

    from ringattn.hf.trainer import OnMesh

    class Mine(OnMesh, SFTTrainer):
        pass

    quiet = QUIET | {"max_steps": 3, "num_train_epochs": -1, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    config = SFTConfig(
        output_dir=folder, bf16=False, gradient_checkpointing=False, router_aux_loss_coef=coefficient, **quiet
    )
    on_mesh: dict[str, Any] = {} if stock else {"mesh": mesh(1, ring)}
    trainer = (SFTTrainer if stock else Mine)(
        small_model(family="mixtral"), config, train_dataset=rows("text", 8, 0), processing_class=tokenizer(), **on_mesh
    )
    trainer.train()
    return [loss for _, loss in history(trainer)["loss"]]


def test_routers(pool: Pools, tmp_path: Path) -> None:
    """SFTConfig adds a router's loss by default, with the model's own coefficient (0.001)."""
    found: dict[float | None, list[float]] = {}
    for coefficient in (None, 0.0, 0.5):
        expected = pool(1).run(routed, str(tmp_path), 1, coefficient, True)[0]
        for ring in (1, 2):
            for losses in pool(ring).run(routed, str(tmp_path), ring, coefficient):
                assert losses == pytest.approx(expected, rel=2e-5), (coefficient, ring)
        found[coefficient] = expected
    assert found[0.5][0] > found[0.0][0] + 0.5 > found[None][0]
    assert found[None][0] > found[0.0][0]


def test_other_losses(pool: Pools, tmp_path: Path) -> None:
    told = pool(1).run(made, str(tmp_path), "llama", {"loss_type": "dft"})[0]
    assert told.startswith("NotImplementedError: loss_type='dft' is not supported: OnMesh has the mean")


def offloaded(folder: str, offload: bool) -> list[float]:
    from trl import SFTConfig, SFTTrainer

    from ringattn import init_mesh
    from ringattn.hf.trainer import OnMesh

    class Mine(OnMesh, SFTTrainer):
        pass

    config = SFTConfig(output_dir=folder, activation_offloading=offload, **(QUIET | {"use_cpu": False, "max_steps": 3}))
    trainer = Mine(
        small_model().cuda(), config, mesh=init_mesh(ring=2), train_dataset=rows("text", 8, 0),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    return [loss for _, loss in history(trainer)["loss"]]


@pytest.mark.gpu(2)
def test_activation_offloading(pool: Pools, tmp_path: Path) -> None:
    expected = pool(2, "cuda").run(offloaded, str(tmp_path), False)[0]
    for found in pool(2, "cuda").run(offloaded, str(tmp_path), True):
        assert found == pytest.approx(expected, rel=1e-3)
