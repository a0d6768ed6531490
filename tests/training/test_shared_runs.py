"""Runs on conversations with a common system prompt: computed once, the curve is that of separate documents."""

import json
import random
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from ringattn.training.engines.deepspeed import available as deepspeed_available
from ringattn.training.packs.packing import Packer, counted, read_pack
from ringattn.training.packs.sharing import read_shared
from ringattn.training.report.records import read_metrics
from tests.training.chat_tokenizers import chat_tokenizer
from tests.training.recipe import prepared
from tests.training.test_runs import curve, run

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Conversations behind two system prompts, some of which also have their first turns in common."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    chat_tokenizer("qwen3").save_pretrained(folder / "t")

    def words(count: int) -> str:
        return " ".join(draw.choice(["the", "sum", "of", "two", "and", "three"]) for _ in range(count))

    def talk(first: list[tuple[str, str]]) -> list[dict[str, str]]:
        turns = [*first, ("user", words(4)), ("assistant", words(draw.randint(1, 20)))]
        return [{"role": role, "content": said} for role, said in turns]

    openings = [[("system", words(25))] for _ in range(2)]
    openings.append([*openings[0], ("user", words(9)), ("assistant", words(9))])
    rows = [{"messages": talk(draw.choice(openings))} for _ in range(60)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def overrides(data: Path, *more: str) -> list[str]:
    own = ["data=sources", f"data.sources=[{{path: {data}/chats.jsonl, kind: chat}}]", f"data.tokenizer={data}/t"]
    own += [f"data.cache={data}/cache", "model.config.vocab_size=320", f"run.steps={STEPS}", "run.save_every=4"]
    return [*own, *more]


@pytest.fixture(scope="module")
def separate(data, tmp_path_factory) -> list[tuple[int, float, float]]:
    output = tmp_path_factory.mktemp("separate")
    run(output, 1, *overrides(data, "memory.loss_tile=64"))
    found = curve(output)
    assert len(found) == STEPS
    assert found[-1][1] < found[0][1] - 0.3
    return found


def assert_same(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-5), f"step {one[0]}"


TILES = ("memory.loss_tile=32", "memory.mlp_tile=64", "memory.keep=attention")
needs_deepspeed = [pytest.mark.skipif(not deepspeed_available(), reason="deepspeed is not installed"), pytest.mark.slow]


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, ()),
        pytest.param(
            4, ("parallel.data=2", "run.recompute_every=3", "data.ahead=process", *TILES), marks=pytest.mark.slow
        ),
        pytest.param(2, ("engine=deepspeed", "engine.zero_stage=3", *TILES), marks=needs_deepspeed),
    ],
)
def test_the_curve_is_that_of_separate_documents(ranks, more, data, separate, tmp_path):
    run(tmp_path, ranks, *overrides(data, "data.share_prefixes=true", *more))
    assert_same(curve(tmp_path), separate)


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint_with_and_without(data, separate, tmp_path):
    run(tmp_path, 1, *overrides(data, "data.share_prefixes=true"))
    first = read_metrics(tmp_path / "metrics.jsonl")
    for more, ranks in ((("data.share_prefixes=true",), 2), ((), 1)):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{STEPS:08d}")
        said = run(tmp_path, ranks, *overrides(data, *more))
        assert "from step 4" in said
        assert_same(curve(tmp_path), separate)
    assert [one["targets"] for one in first] == [one["targets"] for one in read_metrics(tmp_path / "metrics.jsonl")]


@pytest.mark.slow
def test_windows_capped_scores_and_the_least_memory(data, tmp_path):
    """Gemma 2 with memory=longest on four ranks, and from its checkpoint on one."""
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 4096}
    tiny_model(tiny_config(read_config("gemma2"), vocab_size=320, **small, **layers)).save_pretrained(
        tmp_path / "model"
    )
    more = (f"model.path={tmp_path}/model", "memory=longest")
    run(tmp_path / "apart", 1, *overrides(data, *more))
    expected, output = curve(tmp_path / "apart"), tmp_path / "shared"
    for ranks, own in ((4, ("parallel.data=2",)), (1, ())):
        said = run(output, ranks, *overrides(data, "data.share_prefixes=true", *more, *own))
        assert_same(curve(output), expected)
        shutil.rmtree(output / "checkpoints" / f"step-{STEPS:08d}")
    assert "from step 4" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("data.share_prefixes=maybe",), "data.share_prefixes must be true, false or null, got 'maybe'"),
        (("memory.loss_tile=null",), "data.share_prefixes=true gives tokens several targets.*memory.loss_tile is null"),
        (("data.delay=2", "data.packs_per_step=2"), "data.delay=2 evens out what packs of separate documents cost"),
    ],
)
def test_what_cannot_be_is_one_line(more, words, data, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        prepared(*overrides(data, "data.share_prefixes=true", f"run.output={tmp_path}", *more))
    assert "\n" not in str(error.value)


def test_packs_are_shorter_and_hold_as_many_targets(data, tmp_path):
    job = prepared(*overrides(data, "data.share_prefixes=true", "data.seq_len=384", f"run.output={tmp_path}"))
    plan = counted(Packer(job.corpus, 384, 0).next(), job.corpus)
    shared, plain = read_shared(plan, job.corpus), read_pack(plan, job.corpus)
    assert len(shared.tokens) < 0.8 * len(plain.tokens)
    assert len(shared.docs.segments) > len(shared.docs)
    assert shared.labels.items == plain.targets


def test_a_tiled_loss_is_chosen_where_it_was_left_open(data, tmp_path):
    own = overrides(data, "data.share_prefixes=true", f"run.output={tmp_path}")
    for memory in ("auto", "off"):
        job = prepared(*own, f"memory={memory}", *(["memory.loss_tile=auto"] if memory == "off" else []))
        assert job.plan.memory.loss_tile == job.cfg.memory.loss_tile == 2048
    assert prepared(*own, "memory.loss_tile=100").plan.memory.loss_tile == 100
