"""The curve of `recipe=sft` beside that of TRL's SFTTrainer, on the same chats, batch by batch.

    python -m tests.training.sft_curve benchmarks/results/sft-curve.md

Each step of TRL's loop gets the chats that the packs of the recipe's step hold; everything else is TRL's own: chat
template, tokens, loss mask, padding, optimizer, schedule. Takes about a minute on two cores.
"""

import json
import random
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ringattn.training.packs.ordering import Position
from ringattn.training.packs.packers import make_packer
from tests.training.chat_tokenizers import chat_tokenizer
from tests.training.recipe import prepared, save_model
from tests.training.test_runs import curve, run

STEPS, PACKS, RATE = 12, 2, 4e-2
TEMPLATES = ("llama3", "qwen3", "gemma")


def write_chats(folder: Path, template: str) -> None:
    """A model, a tokenizer with a model's template, and 30 chats of one to three questions, no two alike."""
    draw = random.Random(0)
    words = ["the", "sum", "of", "two", "and", "three", "is", "odd", "more"]
    save_model(folder / "model", vocab_size=320)
    chat_tokenizer(template).save_pretrained(folder / "model")
    lines = []
    for number in range(30):
        turns = []
        for _ in range(draw.randint(1, 3)):
            for role, most in (("user", 8), ("assistant", 12)):
                said = " ".join(draw.choice(words) for _ in range(draw.randint(1, most)))
                turns.append({"role": role, "content": f"{said} {number}."})
        lines.append(json.dumps({"messages": turns}) + "\n")
    (folder / "chats.jsonl").write_text("".join(lines))


def overrides(folder: Path) -> list[str]:
    """Of a short run of `recipe=sft`. Its warm-up begins a step later than that of transformers, so there is none."""
    return [
        "recipe=sft", f"model.path={folder}/model", f"data.sources=[{{path: {folder}/chats.jsonl, kind: chat}}]",
        "data.chat_template=trl", f"data.cache={folder}/cache", f"data.packs_per_step={PACKS}", f"optim.lr={RATE}",
        "optim.warmup_ratio=0", f"run.steps={STEPS}", "run.save_every=0",
    ]  # fmt: skip


def by_recipe(folder: Path, ranks: int) -> list[float]:
    """Losses with as many ranks, all of one sequence."""
    output = folder / f"ranks{ranks}"
    run(output, ranks, *overrides(folder))
    return [loss for _, loss, _ in curve(output)]


def batches_of(folder: Path) -> list[list[tuple[int, ...]]]:
    """The tokens of the chats of each step of the recipe."""
    job = prepared(*overrides(folder), "data.seq_len=384", "run.dtype=float32", f"run.output={folder}/none")
    packer = make_packer(job.cfg.data, job.corpus, job.cfg.run.seed, Position().state_dict(), lambda: None)  # type: ignore[arg-type, return-value]
    steps = []
    for _ in range(STEPS):
        segments = [segment for plan in packer.step(PACKS) for segment in plan.segments]
        steps.append([tuple(job.corpus.read(one.document, one.start, one.stop).tolist()) for one in segments])
    return steps


def by_trl(folder: Path, steps: list[list[tuple[int, ...]]]) -> list[float]:
    """Losses of TRL's trainer, whose step gets the chats of the recipe's step."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    losses: list[float] = []

    class Noted(SFTTrainer):
        def get_train_dataloader(self) -> Any:
            rows = {tuple(row["input_ids"]): number for number, row in enumerate(self.train_dataset)}
            chosen = [[rows[ids] for ids in step] for step in steps]
            loader = torch.utils.data.DataLoader(
                self.train_dataset, batch_sampler=chosen, collate_fn=self.data_collator
            )
            return self.accelerator.prepare(loader)

        def training_step(self, *args: Any, **more: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **more)
            losses.append(loss.item())
            return loss

    config = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=0, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        assistant_only_loss=True, max_length=None, bf16=False, gradient_checkpointing=False, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=STEPS,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    chats = load_dataset("json", data_files=f"{folder}/chats.jsonl", cache_dir=str(folder), split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = Noted(model, config, train_dataset=chats, processing_class=tokenizer)
    trainer.train()
    return losses


def apart(one: list[float], other: list[float]) -> float:
    """The largest difference of a step, relative."""
    return max(abs(a - b) / b for a, b in zip(one, other, strict=True))


def main(path: Path) -> None:
    """Runs all templates at 1, 2 and 4 ranks and writes the table."""
    rows = []
    for template in TEMPLATES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_chats(folder, template)
            trl = by_trl(folder, batches_of(folder))
            curves = {ranks: by_recipe(folder, ranks) for ranks in (1, 2, 4)}
            differ = [f"{apart(curves[1], trl):.1e}", *(f"{apart(curves[n], curves[1]):.1e}" for n in (2, 4))]
            rows.append(f"| {template} | {trl[0]:.4f} | {trl[-1]:.4f} | {' | '.join(differ)} |")
            print(rows[-1], flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
    path.write_text(
        "# The curve of `recipe=sft` and of TRL's SFTTrainer\n\n"
        f"`python -m tests.training.sft_curve {path}`, {date.today()}, {packages}, CPU, float32. {STEPS} steps of "
        f"{PACKS} packs of 384 tokens, 30 made-up chats, a Llama of two layers, AdamW with a cosine. TRL's step gets "
        "the chats that the recipe's packs hold; chat template, mask, loss, optimizer and schedule are its own. "
        "Largest relative difference of a step's loss:\n\n"
        "| template | first loss | last loss | one rank, beside TRL | 2 ranks, beside one | 4 ranks, beside one |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
