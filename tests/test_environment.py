"""Environment variables are known or warned of, and each does what it is listed for."""

import json
import logging
import os
import re
import warnings
from pathlib import Path

import pytest
import torch

from ringattn import Documents, Layout, MeshShape, attention, environment, preparation
from ringattn.cli import main
from ringattn.kernels import registry
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.tuning.tuner import Tuner
from tests.kernels.fake_backends import SPEC

PACKAGE = Path(environment.__file__).parent


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    """No variable is set, and nothing was warned of."""
    for name in [name for name in os.environ if name.startswith(environment.PREFIX)]:
        monkeypatch.delenv(name)


def test_an_unknown_variable_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGATTN_BACKEN", "cpu")
    with pytest.warns(UserWarning, match=r"RINGATTN_BACKEN; ringattn reads RINGATTN_BACKEND"):
        environment.warn_of_unknown()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment.warn_of_unknown()


def test_known_variables_do_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.VARIABLES:
        monkeypatch.setenv(name, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment.warn_of_unknown()


@pytest.mark.parametrize(("value", "policy"), [(None, "off"), ("", "off"), ("off", "off"), ("on", "on")])
def test_the_policy_is_read(monkeypatch: pytest.MonkeyPatch, value: str | None, policy: str) -> None:
    if value is not None:
        monkeypatch.setenv("RINGATTN_AUTOTUNE", value)
    assert Tuner(None).policy == policy
    assert Tuner(None, "on").policy == "on"


def test_a_wrong_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGATTN_AUTOTUNE", "maybe")
    with pytest.raises(ValueError, match="RINGATTN_AUTOTUNE must be one of off, on, got 'maybe'"):
        Tuner(None)
    with pytest.raises(ValueError, match="policy"):
        Tuner(None, "always")


def test_every_variable_of_the_sources_is_in_the_list() -> None:
    used = {name for file in PACKAGE.rglob("*.py") for name in re.findall(r"\bRINGATTN_[A-Z0-9_]+\b", file.read_text())}
    assert used <= set(environment.VARIABLES)


def test_the_environment_asks_for_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every call's own argument does; a wrong value is refused."""
    asked: list[bool] = []
    monkeypatch.setattr(preparation, "choose", lambda spec, name: asked.append(spec.deterministic) or Reference())
    layout = Layout(Documents([3]), MeshShape())
    x = [torch.randn(3, 2, 4) for _ in range(3)]
    for value, given in (("", False), ("off", True), ("on", False)):
        monkeypatch.setenv("RINGATTN_DETERMINISTIC", value)
        attention.parallel_attention(*x, layout, deterministic=given)
    assert asked == [False, True, True]
    monkeypatch.setenv("RINGATTN_DETERMINISTIC", "1")
    with pytest.raises(ValueError, match="RINGATTN_DETERMINISTIC must be one of off, on, got '1'"):
        attention.parallel_attention(*x, layout)


def test_the_page_lists_the_variables() -> None:
    lines = [f"- `{name}`: {variable.meaning}" for name, variable in environment.VARIABLES.items()]
    assert "\n".join(lines) in (PACKAGE.parent / "docs" / "environment.md").read_text(encoding="utf-8")


def test_the_doctor_tells_of_unknown_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGATTN_BACKENDS", "cpu")
    assert main(["doctor", "--heads", "4/2", "--head-dim", "16", "--device", "cpu", "--json"]) == 0
    assert any("RINGATTN_BACKENDS" in text for text in json.loads(capsys.readouterr().out)["warnings"])


def test_the_environment_makes_the_log_visible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGATTN_LOG", "info")
    logger, before = logging.getLogger("ringattn"), logging.getLogger("ringattn").level
    try:
        registry.choose(SPEC)
        assert "ringattn: backend cpu, asked for auto: CallSpec(" in capsys.readouterr().err
    finally:
        logger.handlers.clear()
        logger.setLevel(before)
