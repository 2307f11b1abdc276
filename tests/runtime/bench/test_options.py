"""From options to loads."""

import pytest
from stageline.models.errors import RequestError
from stageline.runtime.bench.options import loads
from stageline.runtime.bench.records import Load

AT_RATES = Load("Rate", pattern="constant", ceiling=4)


def test_without_a_load_there_are_mlperfs_three_and_server_has_its_rate() -> None:
    found = loads((), 5.0, (), (), False, AT_RATES)
    assert found == (Load("SingleStream"), Load("Offline"), Load("Server", rate_per_s=5.0))


def test_rates_have_the_pattern_and_the_ceiling_and_a_trace_the_ceiling() -> None:
    found = loads((), None, (2,), (3.0, 3.0), True, AT_RATES)
    assert found == (
        Load("Concurrency", concurrency=2),
        Load("Rate", rate_per_s=3.0, pattern="constant", ceiling=4),
        Load("Recorded", ceiling=4),
    )


def test_a_rate_for_a_server_that_is_not_asked_for_is_refused() -> None:
    with pytest.raises(RequestError, match="server rate 5 changes nothing without the scenario Server"):
        loads(("Offline",), 5.0, (), (), False, AT_RATES)
    with pytest.raises(RequestError, match="server rate 5 changes nothing without the scenario Server"):
        loads((), 5.0, (1,), (), False, AT_RATES)
