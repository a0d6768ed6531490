"""FlashAttention's surface over kernels of this package, against one dense softmax in float64."""

import subprocess
import sys
from itertools import accumulate

import pytest
import torch

from ringattn import Documents, Mask
from ringattn.benchmarking.flash_attn_surface import INTERFACE, PACKAGE, PackedCall, Surface, offered
from ringattn.kernels.registry import backends
from ringattn.kernels.spec import Block
from tests.dense import Case, dense_attention, relative_error

SCALE = 8**-0.5


def functions(backend: str) -> dict:
    surface = Surface()
    surface.backend = backends()[backend]
    return vars(surface.modules[INTERFACE])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("window", [(-1, -1), (5, 0)])
def test_packed_documents_are_exact_forward_and_backward(backend: str, window: tuple[int, int]) -> None:
    case = Case(Documents([9, 30, 1, 17]), Mask(window=window), heads=(4, 2))
    x, expected, named = case.tensors(), dense_attention(case), functions(backend)
    cu = torch.tensor([0, *accumulate(case.docs.lengths)], dtype=torch.int32)
    q, k, v = x["q"], x["k"], x["v"]
    band = {"causal": True, "window_size_left": window[0], "window_size_right": window[1]}
    lengths = cu, cu, 30, 30
    out, lse, *rest = named["_flash_attn_varlen_forward"](q, k, v, *lengths, 0.0, SCALE, **band)
    assert rest == [None, None]
    grads = [torch.full_like(t, float("nan")) for t in (q, k, v)]
    named["_flash_attn_varlen_backward"](x["dout"], q, k, v, out, lse, *grads, *lengths, 0.0, SCALE, **band)
    for name, result in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True):
        assert result.shape == expected[name].shape
        assert relative_error(result, expected[name]) < 1e-12, name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_batch_of_equal_lengths_in_slices_of_larger_tensors(backend: str) -> None:
    case, named = Case(Documents([12, 12]), heads=(4, 2)), functions(backend)
    x, expected = case.tensors(), dense_attention(case)
    q, k, v, dout = (x[name].unflatten(0, (2, 12)) for name in ("q", "k", "v", "dout"))
    out, lse, *_ = named["_flash_attn_forward"](q, k, v, 0.0, SCALE, True, softcap=None)
    assert lse.shape == (2, 4, 12)
    wide = [torch.full((2, 20, *t.shape[2:]), float("nan"), dtype=t.dtype) for t in (q, k, v)]
    grads = [t[:, :12] for t in wide]
    named["_flash_attn_backward"](dout, q, k, v, out, lse.contiguous(), *grads, 0.0, SCALE, True)
    results = {"out": out, "dq": grads[0], "dk": grads[1], "dv": grads[2]}
    for name, result in results.items():
        assert relative_error(result.flatten(0, 1), expected[name]) < 1e-12, name
    assert relative_error(lse.transpose(0, 1).flatten(1), expected["lse"]) < 1e-12
    assert all(t[:, 12:].isnan().all() for t in wide)


def test_lengths_on_a_device_are_not_read() -> None:
    """What kernels of GPUs ask of a call: to read a tensor on the host would stop the stream."""
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    call = PackedCall(cu, cu, (4, 4), (5, 0))
    assert call.tensors(cu.device)[:2] == (cu, cu)
    assert (call.max_q, call.max_k, call.dense_keys, call.left, call.right) == (4, 4, True, 5, 0)
    assert "blocks" not in vars(call)
    assert call.blocks == (Block((0, 3), (0, 3), 5, 0), Block((3, 7), (3, 7), 5, 0))
    assert (call.q, call.k, call.q_lens) == ((0, 7), (0, 7), (3, 4))


def test_what_the_surface_cannot_do_is_refused() -> None:
    named, x = functions("reference"), torch.zeros(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match=r"dropout_p=0\.1"):
        named["_flash_attn_forward"](x, x, x, 0.1, SCALE, True)
    with pytest.raises(NotImplementedError, match="ALiBi"):
        named["_flash_attn_forward"](x, x, x, 0.0, SCALE, True, alibi_slopes=torch.zeros(2))


def test_it_is_offered_only_while_asked_for() -> None:
    before = sys.modules.get(PACKAGE)
    modules = Surface().modules
    with offered(modules):
        from flash_attn.flash_attn_interface import _flash_attn_forward

        assert _flash_attn_forward is vars(modules[INTERFACE])["_flash_attn_forward"]
    assert sys.modules.get(PACKAGE) is before
    assert INTERFACE not in sys.modules or sys.modules[INTERFACE] is not modules[INTERFACE]


def test_a_real_package_of_that_name_is_found_before_and_after(tmp_path) -> None:
    """As FlashAttention 4 lives in `flash_attn.cute`."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("")
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("real = True")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from ringattn.benchmarking.flash_attn_surface import offered, surface\n"
        "if sys.argv[2] == 'first': import flash_attn.cute\n"
        "with offered(surface().modules): from flash_attn.flash_attn_interface import _flash_attn_forward\n"
        "from flash_attn.cute import interface\n"
        "assert interface.real\n"
    )
    for when in ("first", "later"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path), when], check=True)
