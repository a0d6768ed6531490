"""The backend of docs/adding-a-backend.md, taken from the page and installed as a package of its own."""

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ringattn import Documents, Mask
from ringattn.kernels import registry, selftest
from ringattn.kernels.spec import Block, Call, CallSpec
from tests.dense import Case, dense_attention
from tests.kernels.backends.test_packages import check
from tests.parallel.ranks import attend
from tests.pool import Pools

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-backend.md"
DOCS = Documents([37, 1, 0, 90, 12])


def block_of(language: str) -> str:
    """The page's one code block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return found


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A site-packages folder with the page's backend as a distribution with the page's entry point."""
    (tmp_path / "toy_backend.py").write_text(block_of("python"))
    metadata = tmp_path / "toy_backend-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backend\nVersion: 1.0\n")
    header, entry = block_of("toml").splitlines()
    assert header == '[project.entry-points."ringattn.kernels"]'
    (metadata / "entry_points.txt").write_text(f"[ringattn.kernels]\n{entry.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield
    sys.modules.pop("toy_backend", None)
    forget()


def forget() -> None:
    importlib.invalidate_caches()
    registry.backends.cache_clear()
    registry._chosen.cache_clear()
    selftest.forget()


def attend_with_the_toy(case: Case, ring: int, ulysses: int, scheme: str) -> dict[str, torch.Tensor]:
    """What a rank runs: it finds the package for itself, and leaves nothing of it to the tests after."""
    forget()
    try:
        return attend(case, ring, ulysses, "balanced", scheme)
    finally:
        sys.path[:] = [folder for folder in sys.path if not (Path(folder) / "toy_backend.py").exists()]
        sys.modules.pop("toy_backend", None)
        forget()


def test_the_page_shows_a_short_one() -> None:
    assert len(block_of("python").splitlines()) < 60


def test_it_is_found_and_passes_its_self_test(installed: None) -> None:
    assert list(registry.backends())[-2:] == ["toy", "reference"]
    asked = CallSpec("cpu", torch.float32, 16, 16, 4, 2)
    for spec in (asked, replace(asked, window=True), replace(asked, value_dim=32), replace(asked, dtype=torch.float64)):
        assert registry.choose(spec, "toy").name == "toy"
    with pytest.raises(NotImplementedError, match="'toy' cannot do this call: it has no softcap"):
        registry.choose(replace(asked, softcap=1.0), "toy")


@pytest.mark.parametrize("band", [(-1, 0), (-1, -1), (4, 0), (4, 2)])
def test_it_obeys_the_contract_where_the_self_test_does_not_look(installed: None, band: tuple[int, int]) -> None:
    """Rows without keys, keys that no block reads, views, and a softmax of which the call is a part."""
    check(registry.backends()["toy"], Call((Block((3, 8), (2, 7)), Block((8, 17), (9, 13))), *band))


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=(9, 0))], ids=str)
@pytest.mark.parametrize(("ring", "ulysses", "scheme"), [(2, 1, "gather"), (2, 1, "ring"), (1, 2, "ulysses")])
def test_it_trains_on_two_ranks(installed: None, pool: Pools, ring: int, ulysses: int, scheme: str, mask: Mask) -> None:
    """Out, lse and gradients are those of one dense softmax in float64."""
    case = Case(DOCS, mask, heads=(4, 2), options={"backend": "toy"})
    expected = dense_attention(case)
    for got in pool(2).run(attend_with_the_toy, case, ring, ulysses, scheme):
        for name, wanted in expected.items():
            torch.testing.assert_close(got[name], wanted, rtol=1e-12, atol=1e-12)
