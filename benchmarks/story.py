"""From made-up data to a model that transformers loads: the story of docs/tutorial.md, at several scales and seeds.

    python -m benchmarks.story cpu --seeds 0 1 2 --out benchmarks/results
    python -m benchmarks.story gpu --out "$OUT"           # one GPU of 80 GB or more
    python -m benchmarks.story tiny --out /tmp/story      # whether everything runs, in a minute

A small model is trained on short documents, evaluated on needles in longer ones, extended with `recipe=extend`,
evaluated again, exported, loaded by transformers, and told of on a page. Every step is a command of `ringattn` in a
process of its own; those of `cpu` with seed 0 are the tutorial's, word by word. What is kept in `--out` is small: a
table, which has seeds of earlier calls too, and for each seed the page and both heat maps. All else is in `--work`, or
gone at the end.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Stage:
    """One training.

    Arguments:
        corpus: options of `ringattn corpus`.
        length: tokens of a pack, and of the longest document.
        theta: base of the rotary frequencies.
        steps, lr, packs: of the optimizer; packs of a step.
    """

    corpus: str
    length: int
    theta: float
    steps: int
    lr: float
    packs: int = 1


@dataclass(frozen=True)
class Scale:
    """Numbers of a story.

    Arguments:
        model: keys of `model.config`.
        short, long: what is trained first, and what extends it.
        lengths, depths, samples: of the needles.
        at_most, at_least: shares of right answers of needles further than `short.length` from their question, before
            and after.
        apart: what log-probabilities of the reloaded model may differ by.
        float32: the run computes in another dtype, and is exported and compared in float32.
    """

    model: str
    short: Stage
    long: Stage
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    at_most: float
    at_least: float
    apart: float = 1e-5
    float32: bool = False


CPU = Scale(
    model="hidden_size=64 intermediate_size=128 num_hidden_layers=2 num_attention_heads=2 num_key_value_heads=2",
    short=Stage("--words 600000", 1024, 1e4, 600, 3e-3),
    long=Stage("--words 400000 --shortest 2048 --longest 8192 --dense 0.2", 8192, 1.6e5, 40, 2e-3),
    lengths=(512, 1024, 4096, 8192),
    depths=(0.0, 0.25, 0.5),
    samples=8,
    at_most=0.2,
    at_least=0.6,
)
TINY = Scale(
    model=CPU.model,
    short=Stage("--words 20000", 512, 1e4, 4, 3e-3),
    long=Stage("--words 20000 --shortest 512 --longest 1024", 1024, 8e4, 3, 1e-3),
    lengths=(256, 1024),
    depths=(0.0, 1.0),
    samples=2,
    at_most=1.0,
    at_least=0.0,
)
# 34 million parameters. With the base of the first training the slowest angle has turned by 1 at 8K: beyond, all is
# new to the model. Documents of the second corpus are long, so that facts are met as far away as a pack can hold them.
GPU = Scale(
    model="hidden_size=512 intermediate_size=2048 num_hidden_layers=8 num_attention_heads=8 num_key_value_heads=8",
    short=Stage("--words 3000000 --shortest 1024 --longest 8192", 8192, 1e4, 1000, 1e-3, 2),
    long=Stage("--words 4000000 --shortest 40960 --longest 65536 --dense 0.15", 65536, 1e6, 250, 5e-4),
    lengths=(4096, 8192, 16384, 32768, 65536),
    depths=(0.0, 0.25, 0.5, 0.75, 1.0),
    samples=8,
    at_most=0.2,
    at_least=0.95,
    apart=1e-4,
    float32=True,
)
SCALES = {"cpu": CPU, "gpu": GPU, "tiny": TINY}


def commands(scale: Scale, seed: int) -> list[str]:
    """The shell commands of a story, in a folder of its own."""
    short, long = scale.short, scale.long
    needles = (
        f"'tasks=[needle]' wording=plain distractors=7 'lengths={_listed(scale.lengths)}' "
        f"'depths={_listed(scale.depths)}' samples={scale.samples}"
    )
    config = " ".join(f"model.config.{one}" for one in scale.model.split())
    dtype = (" dtype=float32", " --dtype float32") if scale.float32 else ("", "")
    return [
        f"ringattn corpus short.jsonl {short.corpus} --seed {seed} --tokenizer tokenizer",
        f"ringattn corpus long.jsonl {long.corpus} --seed {seed + 1000}",
        f"ringattn train data=text 'data.files=[short.jsonl]' data.tokenizer=tokenizer data.pad=true "
        "data.packing=best_fit "
        f"data.seq_len={short.length} data.packs_per_step={short.packs} model.name=small "
        f"model.config.vocab_size=1024 {config} model.config.max_position_embeddings={short.length} "
        f"'model.rope={{type: theta, theta: {short.theta:g}}}' "
        f"optim.lr={short.lr:g} run.steps={short.steps} run.save_every=0 run.seed={seed} run.output=short",
        "ringattn export short base",
        f"ringattn evaluate model.path=base '+model.config.max_position_embeddings={long.length}' {needles} "
        "output=long/evaluation/before",
        f"ringattn train recipe=extend model.path=base 'data.files=[long.jsonl]' data.pad=true "
        "data.packing=best_fit "
        f"data.seq_len={long.length} data.packs_per_step={long.packs} model.rope.theta={long.theta:g} "
        f"optim.lr={long.lr:g} run.steps={long.steps} run.save_every=0 run.seed={seed} run.output=long",
        f"ringattn evaluate model.run=long {needles} output=long/evaluation/after",
        f"ringattn evaluate model.run=long 'tasks=[logprobs]' 'texts.files=[long.jsonl]' texts.documents=4{dtype[0]}",
        f"ringattn export long extended{dtype[1]}",
        "ringattn report long",
    ]


def _listed(numbers: Sequence[float]) -> str:
    return f"[{','.join(map(str, numbers))}]"


@dataclass(frozen=True)
class Told:
    """What a story has to show.

    Arguments:
        seed: of data, weights and order.
        before, after: (lengths,) shares of right answers, means over depths.
        beyond: shares before and after, mean over the cells of the heat map whose needle is further from its question
            than the first training ever saw.
        least: of all cells of the heat map after.
        logprob_error: of log-probabilities by transformers, against the run's own, at most.
        seconds: of each command, in their order.
    """

    seed: int
    lengths: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    beyond: tuple[float, float]
    least: float
    logprob_error: float
    seconds: tuple[float, ...]

    @property
    def whole(self) -> float:
        """The mean of all cells of the heat map after."""
        return sum(self.after) / len(self.after)


def shell(command: str, folder: Path) -> None:
    """A command of `ringattn` in a folder, in a process of its own; what it writes goes on to the screen."""
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)
    words = [sys.executable, "-m", *shlex.split(command)]
    subprocess.run(words, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, check=True)


def tell(scale: Scale, seed: int, folder: Path, run: Callable[[str, Path], None] = shell) -> Told:
    """Runs a story in a folder, which must be empty, new, or that of the same story, broken off: what was done stays.
    Raises CalledProcessError if a command fails."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "seconds.json"
    seconds = json.loads(done.read_text()) if done.exists() else []
    for command in commands(scale, seed)[len(seconds) :]:
        print(f"$ {command}", flush=True)
        started = time.perf_counter()
        run(command, folder)
        seconds.append(time.perf_counter() - started)
        done.write_text(json.dumps(seconds))
        print(f"  {seconds[-1]:.1f} s", flush=True)
    before, after = (_right(folder / "long" / "evaluation" / name / "needle.json") for name in ("before", "after"))
    means = _means(before), _means(after)
    far = beyond(before, scale), beyond(after, scale)
    least = min(map(min, after))
    return Told(seed, scale.lengths, *means, far, least, reloaded(folder), tuple(seconds))


def _right(path: Path) -> list[list[float]]:
    """Shares of right answers by depth and length."""
    found: list[list[float]] = json.loads(path.read_text())["right"]
    return found


def _means(table: list[list[float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(column) for column in zip(*table, strict=True))


def beyond(table: list[list[float]], scale: Scale) -> float:
    """The mean over needles that are further from their question than `scale.short.length`: a long document alone asks
    nothing new of a model whose answer stands at its end."""
    rows = [zip(scale.lengths, row, strict=True) for row in table]
    cells = [
        right
        for depth, row in zip(scale.depths, rows, strict=True)
        for length, right in row
        if length * (1 - depth) > scale.short.length
    ]
    return sum(cells) / len(cells)


def reloaded(folder: Path) -> float:
    """By how much log-probabilities differ at most: of the exported model by transformers alone, and of the run.

    Both in float32 on a device of the same kind, for each token of a few documents. They are logits less the logarithm
    of their sum of exponentials.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder / "extended", dtype="float32").eval().to(device)
    AutoTokenizer.from_pretrained(folder / "extended")
    worst = torch.zeros(())
    for line in (folder / "long" / "evaluation" / "logprobs.jsonl").read_text().splitlines():
        one = json.loads(line)
        ids = torch.tensor([one["tokens"]], device=device)
        with torch.no_grad():
            found = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        worst = torch.maximum(worst, (found.cpu() - torch.tensor(one["logprobs"][1:])).abs().max())  # NaN stays NaN
    return worst.item()


def table(name: str, told: Sequence[Told]) -> str:
    """The results as Markdown, with how they came about."""
    scale = SCALES[name]
    lengths = [_tokens(length) for length in scale.lengths]
    columns = ["seed", *(f"{when}, {one}" for when in ("before", "after") for one in lengths)]
    columns += ["before, beyond", "after, beyond", "whole map after", "least cell", "logprobs apart", "minutes"]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for one in told:
        shares = [f"{100 * share:.0f} %" for share in (*one.before, *one.after, *one.beyond, one.whole, one.least)]
        cells = [str(one.seed), *shares, f"{one.logprob_error:.1e}", f"{sum(one.seconds) / 60:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = " ".join(str(one.seed) for one in told)
    spent = [f"{seconds:.0f} s" for seconds in told[0].seconds]
    done = [f"- {took}: `{command}`" for took, command in zip(spent, commands(scale, told[0].seed), strict=True)]
    packages = ", ".join(f"{one} {metadata.version(one)}" for one in ("torch", "transformers", "tokenizers"))
    return "\n".join(
        [
            f"# A model extended from {_tokens(scale.short.length)} to {_tokens(scale.long.length)} tokens: {name}",
            "",
            f"`python -m benchmarks.story {name} --seeds {seeds}`, {date.today()}; {_hardware()}; {packages}.",
            "",
            f"Right answers of needles, mean over depths {_listed(scale.depths)}, {scale.samples} documents each, "
            "seven other facts in the document; *beyond*: mean over needles further than "
            f"{_tokens(scale.short.length)} from their question, at the end of the document. Wanted there are at most "
            f"{scale.at_most} before, and there and over the whole map at least {scale.at_least} after. *Logprobs "
            "apart*: of the exported model by transformers alone and of the run, at most, over all tokens of four "
            "documents.",
            "",
            *lines,
            "",
            f"Seconds of seed {told[0].seed}:",
            "",
            *done,
            "",
        ]
    )


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def keep(folder: Path, out: Path, name: str) -> None:
    """The page and the heat maps of a story."""
    shutil.copyfile(folder / "long" / "report.html", out / f"{name}.html")
    for when in ("before", "after"):
        shutil.copyfile(folder / "long" / "evaluation" / when / "needle.png", out / f"{name}-{when}.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 if a story did not show what it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=sorted(SCALES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for what is kept")
    parser.add_argument(
        "--work", type=Path, help="folder for everything else, in which a story goes on; default: one that is removed"
    )
    args = parser.parse_args(arguments)
    scale = SCALES[args.scale]
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / f"story-{args.scale}.json"
    told = {one["seed"]: Told(**one) for one in (json.loads(results.read_text()) if results.exists() else [])}
    with tempfile.TemporaryDirectory(prefix="story-") as temporary:
        for seed in args.seeds:
            name = f"story-{args.scale}-{seed}"
            folder = (args.work or Path(temporary)) / name
            told[seed] = tell(scale, seed, folder)
            keep(folder, args.out, name)
            every = [told[one] for one in sorted(told)]  # what is known is kept at once
            results.write_text(json.dumps([asdict(one) for one in every], indent=1) + "\n")
            (args.out / f"story-{args.scale}.md").write_text(table(args.scale, every))
            print(f"seed {seed}: {told[seed].beyond[0]:.2f} before, {told[seed].beyond[1]:.2f} after")
    print(table(args.scale, every))
    return int(not all(shown(scale, told[seed]) for seed in args.seeds))


def shown(scale: Scale, one: Told) -> bool:
    """Whether a story shows what it should."""
    before, after = one.beyond
    return before <= scale.at_most and min(after, one.whole) >= scale.at_least and one.logprob_error <= scale.apart


if __name__ == "__main__":
    sys.exit(main())
