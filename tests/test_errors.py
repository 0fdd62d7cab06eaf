import fastprice
from fastprice import errors

CLASSES = [member for name in errors.__all__ if isinstance(member := getattr(errors, name), type)]


def test_every_error_is_a_fastprice_error_public_and_drawn_in_the_tree() -> None:
    assert len(CLASSES) >= 8
    for error in CLASSES:
        assert issubclass(error, errors.FastpriceError)
        assert getattr(fastprice, error.__name__) is error
        assert error.__name__ in (errors.__doc__ or "")


def test_the_nearest_name_is_offered_only_when_it_is_near() -> None:
    assert errors.nearest_name("modle", ["model", "train"]) == " (did you mean 'model'?)"
    assert errors.nearest_name("xyz", ["model", "train"]) == ""
