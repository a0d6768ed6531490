"""What looks like a secret is not written, and what only sounds like one is."""

import pytest

pytest.importorskip("transformers")

from ringattn.training.checkpoint import TrainState
from ringattn.training.health.incidents import record_incident
from ringattn.training.model.models import empty_model
from ringattn.training.packs.ordering import Position
from ringattn.training.resuming.resume import check_resume
from ringattn.training.secrets import HIDDEN, is_secret, redacted
from ringattn.training.start.output import check_output, read_config, write_config
from tests.training.recipe import prepared

HF = "hf_" + "aB3" * 10
AWS = "AKIA" + "ABCDEFGHIJKLMNOP"


@pytest.mark.parametrize(
    "key", ["model.config.hf_token", "token", "API_KEY", "my-secret", "dbPassword", "aws_access_key_id", "apikey"]
)
def test_keys_of_secrets(key):
    assert is_secret(key)
    assert redacted({key: "anything"}) == {key: HIDDEN}
    assert redacted(f"unknown key: {key}=anything else") == f"unknown key: {key}={HIDDEN} else"


@pytest.mark.parametrize("key", ["data.tokenizer", "model.config.eos_token", "tokens", "keys", "pad_token_id", "lr"])
def test_keys_that_only_sound_so(key):
    assert not is_secret(key)
    assert redacted({key: "anything"}) == {key: "anything"}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"data at {HF}, it says", f"data at {HIDDEN}, it says"),
        (f"{AWS}", HIDDEN),
        ("Authorization: Bearer abcdef0123456789==", f"Authorization: Bearer {HIDDEN}"),
        ("https://me:geheim@host/x", f"https://{HIDDEN}@host/x"),
        ('{"api_key": "abcdefgh", "lr": "0.0001"}', f'{{"api_key": "{HIDDEN}", "lr": "0.0001"}}'),
        ("optim.lr=0.0001 is 12 tokens: more than 8", "optim.lr=0.0001 is 12 tokens: more than 8"),
        ("/data/hf_models/books", "/data/hf_models/books"),
    ],
)
def test_values(text, left):
    assert redacted(text) == left


def test_nested_values_keep_their_kinds():
    assert redacted({"a": [1, None, {"password": "x", "n": 3}], "b": (True, HF)}) == {
        "a": [1, None, {"password": HIDDEN, "n": 3}],
        "b": (True, HIDDEN),
    }


def test_no_file_of_a_run_holds_a_secret_and_it_goes_on_all_the_same(tmp_path):
    output = tmp_path / "run"
    keys = (f"run.output={output}", f"model.name=of-{HF}", f"+model.config.name_or_path='Bearer {HF}'")
    job = prepared(*keys)
    write_config(job.cfg, output, job.model_config)
    record_incident(output, "some-kind", f"a token {HF} was in it", facts={"password": "geheim"})
    texts = [path.read_text() for path in output.rglob("*") if path.is_file()]
    assert len(texts) == 3
    assert all("geheim" not in text and HF not in text for text in texts)
    saved, model = read_config(output)
    assert saved is not None
    assert model is not None
    assert saved["model"]["config"]["name_or_path"] == f"Bearer {HIDDEN}"
    state = TrainState(1, 10, Position().state_dict(), job.corpus.fingerprint, "fsdp2", 1)
    empty = empty_model(job.model_config, None)
    assert check_resume(job.cfg, output, state, job.launch, job.corpus, job.model_config, empty) == (state, [])


def test_a_run_writes_to_its_own_folder_alone(tmp_path):
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (output / "checkpoints").mkdir(parents=True)
    elsewhere.mkdir()
    (output / "inside").symlink_to(output / "checkpoints")
    check_output(output, "run", write=True)
    link = output / "checkpoints" / "step-00000001.partial"
    link.symlink_to(elsewhere)
    with pytest.raises(
        ValueError, match=r"run\.output=run: checkpoints/step-00000001\.partial is a link to .*elsewhere"
    ):
        check_output(output, "run", write=True)
    link.unlink()
    (output / "metrics.jsonl").symlink_to(elsewhere / "not-there.jsonl")
    with pytest.raises(ValueError, match="is a link to"):
        prepared(f"run.output={output}")


def test_a_models_name_leads_nowhere(tmp_path):
    with pytest.raises(ValueError, match=r"model\.name must not lead out of the folder of outputs, got '\.\./\.\./x'"):
        prepared("model.name=../../x", f"run.output={tmp_path}")
