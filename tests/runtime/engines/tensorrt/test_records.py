"""Engine records on disk keep the names they had, so that no engine is built again for a name."""

import pytest
from pydantic import ValidationError
from stageline.runtime.engines.tensorrt.records import OptimizationProfile, SizeRange

OLD = {"name": "rows", "sizes": {"batch": {"least": 1, "best": 4, "most": 8}}}
PROFILE = OptimizationProfile(name="rows", sizes={"batch": SizeRange(min=1, opt=4, max=8)})


def test_ranges_are_read_by_either_name() -> None:
    assert OptimizationProfile.model_validate(OLD) == PROFILE
    assert OptimizationProfile.model_validate_json(PROFILE.model_dump_json()) == PROFILE


def test_records_and_digests_hold_the_names_on_disk() -> None:
    assert PROFILE.model_dump(by_alias=True) == OLD


def test_sizes_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="sizes 2, 1, 3 are not in order"):
        SizeRange(min=2, opt=1, max=3)
