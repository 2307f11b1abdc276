"""Which addresses a page may make the server fetch."""

import pytest
from stageline.dashboard.addresses import service_address
from stageline.models.errors import StagelineError


@pytest.mark.parametrize(
    ("typed", "address"),
    [
        ("127.0.0.1:8123", "http://127.0.0.1:8123"),
        (" http://localhost:8000/ ", "http://localhost:8000"),
        ("https://[::1]:9", "https://[::1]:9"),
        ("localhost", "http://localhost"),
    ],
)
def test_this_machines_addresses_are_taken_as_typed(typed: str, address: str) -> None:
    assert service_address(typed) == address


@pytest.mark.parametrize(
    "typed", ["", "file:///etc/passwd", "http://", "http://127.0.0.1:8000/secret?x=", "http://u:p@localhost:1", "a b",
              "http://127.0.0.1:port", "http://[::1"]
)  # fmt: skip
def test_what_is_no_address_is_refused(typed: str) -> None:
    with pytest.raises(StagelineError, match="is no address of a service"):
        service_address(typed)


@pytest.mark.parametrize(
    "typed",
    ["http://169.254.169.254", "http://10.0.0.7:8000", "http://example.com", "http://localhost.example.com:8000",
     "http://0.0.0.0:8000", "http://2130706433:8000"],
)  # fmt: skip
def test_other_machines_are_refused_unless_allowed(typed: str) -> None:
    with pytest.raises(StagelineError, match=r"is not on this machine.*--service"):
        service_address(typed)
    assert service_address(typed, {typed}) == typed
