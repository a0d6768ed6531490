"""Builds of FlashAttention-3 that differ in their arguments."""

import pytest

from ringattn.kernels.backends import fa3
from tests.kernels.backends import fakes
from tests.kernels.backends.test_packages import LENGTHS, Operators, check, make_call

pytestmark = pytest.mark.usefixtures("fresh_caches")


@pytest.mark.parametrize("names", [("out", "is_causal"), ("out_", "causal")])
@pytest.mark.parametrize("softcap", [True, False])
def test_a_build_gets_the_arguments_that_it_has(names: tuple[str, str], softcap: bool) -> None:
    """Under its own names; a feature that it has no argument for is refused, and the argument is never passed."""
    record: fakes.Record = []
    call = make_call(LENGTHS["dense"], (-1, 0))
    with Operators(record, *names, softcap=softcap):
        check(fa3.FlashAttention3(), call)
        assert all(("softcap" in launch) == softcap for launch in record)
        assert names[0] in record[0]
        assert all(names[1] in launch for launch in record)
        if softcap:
            check(fa3.FlashAttention3(), call, softcap=1.5)
        else:
            with pytest.raises(NotImplementedError, match="no softcap"):
                check(fa3.FlashAttention3(), call, softcap=1.5)
