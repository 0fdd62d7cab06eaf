import pytest

import fastprice
from fastprice import errors


def test_every_public_error_is_a_fastprice_error() -> None:
    for name in errors.__all__:
        member = getattr(errors, name)
        if isinstance(member, type):
            assert issubclass(member, errors.FastpriceError)


def test_the_nearest_name_is_offered_only_when_it_is_near() -> None:
    assert errors.nearest_name("modle", ["model", "train"]) == " (did you mean 'model'?)"
    assert errors.nearest_name("xyz", ["model", "train"]) == ""


def test_every_public_name_loads_and_unknown_ones_say_so() -> None:
    for name in fastprice.__all__:
        assert getattr(fastprice, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastprice.nothing
