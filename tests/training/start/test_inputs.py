"""What a user may get wrong in the recipe's inputs: one clear line that names the key or the path, and no traceback."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

pytest.importorskip("transformers")

from ringattn.training.checkpoint.marker import read_marker, write_marker
from ringattn.training.data.meter import Meter
from ringattn.training.packs.packers import make_packer
from ringattn.training.start import job as job_module
from ringattn.training.start.launched import Launch, pick_device
from ringattn.training.start.output import write_config
from tests.training.data.test_corpus import save_words
from tests.training.model.test_saved_models import with_checkpoint
from tests.training.recipe import prepared, save_model, started


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data=text", "data.files=5"], ["data.files", "5", "list"]),
        (["data=text", "data.files=[5]"], ["data.files", "5", "list of texts"]),
        (["data=text", "data.files=[null]"], ["data.files", "None"]),
        (["data=text", "data.files=[[a]]"], ["data.files", "a"]),
        (["data=text", "data.files=[{a: b}]"], ["data.files", "a"]),
        (["data=text", "data.files=['']"], ["data.files", "''"]),
        (["data=text", "data.files=[/etc/hostname]", "data.tokenizer=5"], ["data.tokenizer must be text, got 5"]),
        (["data=text", "data.files=[/etc/hostname]", "data.cache=null"], ["data.cache must be text, got None"]),
        (["data=text", "data.files=[/etc/hostname]", "data.text_field=[a]"], ["data.text_field must be text"]),
        (["data=text", "~data.cache"], ["data.cache", "configs/"]),
        (["~optim"], ["optim.betas", "optim.clip"]),
        (["~data.seq_len"], ["data.seq_len"]),
        (["~model.name"], ["model.name"]),
        (["run.output=7"], ["run.output must be text, got 7", "run.output='7'"]),
        (["run.output=''"], ["run.output"]),
        (["model.name=[a]"], ["model.name must be text"]),
        (["model.path=5"], ["model.path must be text, got 5"]),
        (["model.family=[llama]"], ["model.family must be text"]),
        (["model.family=null"], ["model.family", "llama, qwen3"]),
        (["model.config=5"], ["model.config", "5"]),
        (["model.allow_mismatch=lm_head", "model.path=/x"], ["model.allow_mismatch must be a list"]),
        (["optim.lr=fast"], ["optim.lr", "fast"]),
        (["optim.lr=.inf"], ["optim.lr", "inf"]),
        (["optim.clip=.inf"], ["optim.clip", "inf"]),
        (["model.lr=.nan"], ["model.lr", "nan"]),
        (["run.seed=99999999999999999999"], ["run.seed", "4294967295"]),
        (["optim.betas=null"], ["optim.betas"]),
        (["optim.betas=[a,b]"], ["optim.betas"]),
        (["data.seq_len='4096'"], ["data.seq_len", "'4096'"]),
        (["data.seq_len=4e3"], ["data.seq_len", "4000.0"]),
        (["data.seq_len=true"], ["data.seq_len", "True"]),
        (["run.dtype=bf16"], ["run.dtype", "bf16", "bfloat16"]),
        (["run.resume=yes"], ["run.resume", "force"]),
        (["parallel.head_chunks=99"], ["parallel.head_chunks=99", "4 key heads"]),
        (["parallel.head_chunks=3"], ["parallel.head_chunks=3", "4 key heads"]),
        (["model.config.num_attention_heads=7"], ["model.config", "(7)", "(256)"]),
        (["model.config.num_key_value_heads=3"], ["num_attention_heads=8", "num_key_value_heads=3"]),
        (["model.config.num_attention_heads=0"], ["model.config"]),
        (["model.config.num_hidden_layers=0"], ["model.config.num_hidden_layers", "0"]),
        (["model.config.num_hidden_layers=two"], ["num_hidden_layers", "two"]),
        (["model.config.hidden_size=null"], ["hidden_size", "None"]),
        (["+model.config.hidden_act=magic"], ["model.config", "magic"]),
        (["+model.config.pad_token_id=999"], ["model.config", "adding"]),
        (["+model.config.attention_dropout=0.1"], ["model.config.attention_dropout=0.1"]),
        (["+model.config.rope_parameters={rope_type: magic}"], ["model.config", "magic"]),
        (["+model.config.rope_parameters={rope_type: llama3}"], ["model.config", "factor"]),
        (["+model.config.use_cache=true"], ["model.config.use_cache"]),
        (["run.output=/proc/run"], ["run.output=/proc/run", "/proc"]),
        (["run.output=/dev/null/run"], ["run.output=/dev/null/run", "/dev/null"]),
    ],
    ids=lambda value: " ".join(value) if all("=" in one or "~" in one for one in value) else "",
)
def test_one_line_names_the_key(overrides, words):
    with pytest.raises(ValueError, match=r".") as error:
        prepared(*overrides)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_head_chunks_count_on_the_heads_of_a_rank():
    assert prepared("parallel.head_chunks=2", "parallel.ulysses=2", ranks=2).cfg.parallel.head_chunks == 2
    with pytest.raises(ValueError, match=r"head_chunks=4 must divide the 4 key heads .* 2 ulysses ranks, 2 each"):
        prepared("parallel.head_chunks=4", "parallel.ulysses=2", ranks=2)


@pytest.mark.parametrize("place", ["file", "file/below", "sealed/run"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_training(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "sealed").mkdir()
    denied = OSError(30, "Read-only file system")

    def probe(dir: Path):
        if dir.name == "sealed":
            raise denied
        raise NotADirectoryError(20, "Not a directory")

    monkeypatch.setattr("ringattn.training.start.output.tempfile.TemporaryFile", probe)
    monkeypatch.setattr(job_module, "load_corpus", lambda *_: pytest.fail("refused after the data was read"))
    with pytest.raises(ValueError, match=f"run.output={tmp_path / place}.*(is a file|Not a dir|Read-only)"):
        prepared(f"run.output={tmp_path / place}")


def test_a_disk_that_a_killed_save_filled_is_emptied_first(tmp_path, monkeypatch):
    partial = tmp_path / "checkpoints" / "step-00000008.partial"
    partial.mkdir(parents=True)

    def probe(dir: Path):
        if partial.exists():
            raise OSError(28, "No space left on device")
        return tempfile.SpooledTemporaryFile()

    monkeypatch.setattr("ringattn.training.start.output.tempfile.TemporaryFile", probe)
    prepared(f"run.output={tmp_path}")
    assert not partial.exists()


def test_a_finished_run_is_told_of_where_nothing_can_be_written(tmp_path, monkeypatch):
    with_checkpoint(tmp_path, "run.steps=5")
    monkeypatch.setattr("ringattn.training.start.output.tempfile.TemporaryFile", lambda dir: pytest.fail("written"))
    assert prepared("run.steps=5", f"run.output={tmp_path}").done


@pytest.mark.parametrize("content", ["", "{", '{"step": 5}', "[]"])
def test_a_marker_that_cannot_be_read_is_named(content, tmp_path):
    with_checkpoint(tmp_path)
    marker = tmp_path / "checkpoints" / "step-00000005" / "complete.json"
    marker.write_text(content)
    with pytest.raises(ValueError, match=rf"no checkpoint .*{marker.parent}.* to begin anew|written by a version"):
        prepared(f"run.output={tmp_path}")


@pytest.mark.parametrize("name", ["config.yaml", "model.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "a: [1"])
def test_a_kept_configuration_that_cannot_be_read_is_named(name, content, tmp_path):
    with_checkpoint(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / name} "):
        prepared(f"run.output={tmp_path}")


# --- going on with other data


def texts(folder: Path, *lengths: int) -> str:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for number, length in enumerate(lengths):
        words = "x" * (length // 2), "x" * (length - 1 - length // 2)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return f"data.files=[{folder}]"


def test_touched_or_moved_files_go_on_and_others_do_not(tmp_path):
    own = (f"run.output={tmp_path / 'out'}", f"data.cache={tmp_path / 'cache'}", "data=text", "data.seq_len=16")
    files = texts(tmp_path / "data", 30, 20, 10, 5)
    with_checkpoint(tmp_path / "out", *own, files)
    for path in (tmp_path / "data").iterdir():
        os.utime(path, (0, 0))
    assert prepared(*own, files).resume is not None
    (tmp_path / "data").rename(tmp_path / "moved")
    assert prepared(*own, f"data.files=[{tmp_path / 'moved'}]").resume is not None
    (tmp_path / "moved" / "0.txt").write_text("y" * 30)
    with pytest.raises(ValueError, match=r"the documents of data\.name=text, or their tokens, changed"):
        prepared(*own, f"data.files=[{tmp_path / 'moved'}]")


def test_a_tokenizer_replaced_in_its_folder_is_noticed(tmp_path):
    own = (f"run.output={tmp_path / 'out'}", f"data.cache={tmp_path / 'cache'}", "data=text", "data.seq_len=16")
    own += (texts(tmp_path / "data", 30, 20, 10, 5), f"data.tokenizer={save_words(tmp_path / 't', '?', 'x')}")
    with_checkpoint(tmp_path / "out", *own)
    assert prepared(*own).resume is not None
    save_words(tmp_path / "t", "x", "?")
    with pytest.raises(ValueError, match=r"or their tokens, changed"):
        prepared(*own)


@pytest.mark.parametrize("lengths", [(9,), (30, 20, 10, 5, 5)])
def test_forced_on_to_other_documents_the_stream_begins_an_epoch(lengths, tmp_path):
    """The place after 3 documents and 7 tokens of the next one is no place in these."""
    own = (f"run.output={tmp_path / 'out'}", f"data.cache={tmp_path / 'cache'}", "data=text", "data.seq_len=16")
    with_checkpoint(tmp_path / "out", *own, texts(tmp_path / "data", 30, 20, 10, 9))
    job = prepared(*own, texts(tmp_path / "data", *lengths), "run.resume=force")
    assert job.resume[1].position == {"epoch": 1, "index": 0, "offset": 0}
    assert job.resume[1].step == 5
    assert "other documents than in the checkpoint: the data goes on at the beginning of epoch 2" in job.notes


def test_forced_on_to_another_order_the_stream_begins_an_epoch(tmp_path):
    with_checkpoint(tmp_path)
    job = prepared(f"run.output={tmp_path}", "run.seed=1", "run.resume=force")
    assert job.resume[1].position == {"epoch": 1, "index": 0, "offset": 0}
    assert prepared(f"run.output={tmp_path}", "run.resume=force").resume[1].position["index"] == 3


def test_a_forced_start_that_saved_nothing_does_not_make_its_seed_the_checkpoints(tmp_path):
    """Its configuration stands in the folder, beside a checkpoint whose place is one in the order before."""
    with_checkpoint(tmp_path, seed=0)
    forced = (f"run.output={tmp_path}", "run.seed=1", "run.resume=force")
    job = prepared(*forced)
    write_config(job.cfg, tmp_path, job.model_config)
    assert prepared(*forced).resume[1].position == {"epoch": 1, "index": 0, "offset": 0}
    assert prepared(*forced[:2]).resume[1].position == {"epoch": 1, "index": 0, "offset": 0}


def test_forced_on_to_other_documents_a_curriculum_goes_on_at_its_step(tmp_path):
    own = (f"run.output={tmp_path / 'out'}", f"data.cache={tmp_path / 'cache'}", "data=text")
    own += ("data.curriculum=[[0, 8], [3, 16]]",)
    with_checkpoint(tmp_path / "out", *own, texts(tmp_path / "data", 30, 20, 10, 9), step=5)
    job = prepared(*own, texts(tmp_path / "data", 9), "run.resume=force")
    assert job.resume[1].position == {"epoch": 1, "index": 0, "offset": 0, "step": 5}


def test_forced_on_to_a_curriculum_its_lengths_are_those_of_the_step(tmp_path):
    """A run that had none is not at the curriculum's first step."""
    with_checkpoint(tmp_path, "data.seq_len=16")
    given = (f"run.output={tmp_path}", "data.seq_len=16", "data.curriculum=[[0, 8], [3, 16]]", "run.resume=force")
    job = prepared(*given)
    assert job.resume[1].position["step"] == 5
    assert make_packer(job.cfg.data, job.corpus, 0, job.resume[1].position, lambda: None).seq_len == 16
    assert prepared(*given, "run.seed=1").resume[1].position["step"] == 5


def test_another_optimiser_is_refused_before_training_whatever_is_forced(tmp_path):
    with_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r'optim\.name was "adamw" and is now "muon": .* ringattn export .*OUT'):
        prepared(f"run.output={tmp_path}", "optim=muon", "run.resume=force")


def test_another_stage_of_deepspeed_is_refused_before_training_whatever_is_forced(tmp_path):
    pytest.importorskip("deepspeed")
    given = (f"run.output={tmp_path}", "engine=deepspeed")
    with_checkpoint(tmp_path, *given)
    folder = tmp_path / "checkpoints" / "step-00000005"
    marker = read_marker(folder)
    write_marker(folder, replace(marker, state=replace(marker.state, engine="deepspeed")))
    assert prepared(*given, "engine.zero_stage=1", "run.resume=force").resume is not None
    with pytest.raises(ValueError, match=r"engine\.zero_stage was 2 and is now 3: .* ringattn export .*OUT"):
        prepared(*given, "engine.zero_stage=3", "run.resume=force")


def test_documents_that_wait_are_refused_before_training(tmp_path):
    with_checkpoint(tmp_path, step=5, rest=[], unusual=[[0, 0, 4, True, 3]])
    with pytest.raises(ValueError, match=r"1 documents that wait .*data\.delay"):
        prepared(f"run.output={tmp_path}", "run.resume=force")


# --- tokens


def test_the_tokenizer_is_the_models_own_unless_another_is_named(tmp_path):
    save_model(tmp_path / "model")
    own = ("data=text", texts(tmp_path / "data", 30), f"data.cache={tmp_path / 'cache'}", "data.seq_len=16")
    path = f"model.path={tmp_path / 'model'}"
    assert prepared(*own).cfg.data.tokenizer == "bytes"
    assert prepared(*own, path).cfg.data.tokenizer == "bytes"
    save_words(tmp_path / "model", "?", "x")
    job = prepared(*own, path)
    assert job.cfg.data.tokenizer == str(tmp_path / "model")
    assert job.corpus.total == 2
    job = prepared(*own, path, "data.tokenizer=bytes")
    assert job.corpus.total == 30
    assert any("warning" in note and "tokenizer of its own" in note for note in job.notes)
    assert any("data.name=stdlib is read as bytes" in note for note in prepared(path, "data.seq_len=64").notes)


def test_what_a_run_writes_is_not_its_data(tmp_path, monkeypatch):
    """As in a folder where one starts the recipe with data.files=[.]."""
    (tmp_path / "a.txt").write_text("x" * 30)
    output, cache = tmp_path / "outputs" / "run", tmp_path / "tokens"
    own = ("data=text", f"data.files=[{tmp_path}]", "data.seq_len=16", f"run.output={output}", f"data.cache={cache}")
    with_checkpoint(output, *own[:3], own[4])
    (output / "loss.png").write_bytes(b"\x89PNG")
    job = prepared(*own)
    assert len(job.corpus) == 1
    assert job.resume is not None


def test_too_many_tokens_are_refused_before_they_are_written(tmp_path):
    words = save_words(tmp_path / "t", *map(str, range(299)), "?", "x")
    own = ("data=text", texts(tmp_path / "data", 30), f"data.cache={tmp_path / 'cache'}", f"data.tokenizer={words}")
    with pytest.raises(ValueError, match=rf"vocab_size=256 is less than the 301 tokens of data\.tokenizer={words}"):
        prepared(*own)
    assert not (tmp_path / "cache").exists()


# --- the command line


def test_the_hint_to_add_a_key_is_given_where_it_is_right(tmp_path):
    code, out, err = started(tmp_path, "model.config.rms_norm_eps=1")
    assert (code, out) == (2, "")
    assert "To append to your config use +model.config.rms_norm_eps=1" in err
    code, out, err = started(tmp_path, "run.stepz=1")
    assert (code, out) == (2, "")
    assert "To append" not in err
    assert "configs/" in err


@pytest.mark.parametrize("content", ["a: [", "run: {steps: 1}\nrun: {steps: 2}\n", "\t- x"])
def test_a_configuration_file_that_is_no_yaml(content, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    code, out, err = started(tmp_path, "--config-dir", str(tmp_path), "--config-name", "mine")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "mine.yaml" in err
    assert len(err.splitlines()) < 8


def refused_on(rank: int, tmp_path: Path, **variables: str) -> str:
    """What a rank says where its machine lacks the data."""
    variables |= {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2)}
    code, _, err = started(tmp_path, "data=text", "data.files=[/no/such/*]", **variables)
    assert code == 2
    return err


def test_a_refusal_of_one_machine_alone_is_not_silent(tmp_path):
    assert refused_on(0, tmp_path).startswith("error: data.files: '/no/such/*'")
    assert refused_on(1, tmp_path) == ""
    assert refused_on(2, tmp_path).startswith("error on this machine: data.files: '/no/such/*'")
    report = tmp_path / "error.json"
    assert refused_on(3, tmp_path, TORCHELASTIC_ERROR_FILE=str(report)) == ""
    assert json.loads(report.read_text())["message"]["message"] == "data.files: '/no/such/*' matches no file"


def test_ranks_without_a_gpu_are_refused_on_all_ranks_of_their_machine(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for rank in range(3):
        with pytest.raises(ValueError, match="3 ranks were started on a machine with 2 GPUs"):
            pick_device(Launch("torchrun", rank, 3, rank, 3, "", 0))


# --- progress


def test_a_long_reading_tells_how_far_it_is(capsys, monkeypatch):
    times = iter((0.0, 1.0, 2.0, 10.0, 11.0, 90.0))
    monkeypatch.setattr("ringattn.training.data.meter.time.monotonic", lambda: next(times))
    with Meter("tokenizing", 400_000_000) as meter:
        for _ in range(5):
            meter.add(20_000_000)
    assert capsys.readouterr().out.splitlines() == [
        "tokenizing: 15% of 400.0 MB, 0:00:57 left",
        "tokenizing: 25% of 400.0 MB, 0:04:30 left",
    ]


def test_tokenizing_and_training_tell_about_themselves(tmp_path):
    own = ("data=text", texts(tmp_path / "data", 30, 20), f"data.cache={tmp_path / 'cache'}", "data.seq_len=40")
    code, out, err = started(tmp_path, *own, "run.steps=3", f"run.output={tmp_path / 'out'}", "model=tiny")
    assert (code, err) == (0, ""), err
    assert "tokenized 2 documents, 50 tokens in 0:00:0" in out
    lines = [line for line in out.splitlines() if line.startswith("step")]
    assert "epoch 0.80" in lines[0]
    assert "epoch 2.40" in lines[-1]
    assert "warm-up" in lines[0]
    assert all(line.endswith(" left") for line in lines[1:])
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [round(record["epoch"]) for record in records] == [1, 2, 2]
    assert [record["tokens_per_second"] is None for record in records] == [True, False, False]
    assert OmegaConf.load(tmp_path / "out" / "config.yaml").optim.lr == 3e-3


def test_hydra_says_where_the_kind_of_a_value_is_wrong():
    with pytest.raises(HydraException, match=r"data\.files"):
        prepared("data=text", "data.files={a: b}")
