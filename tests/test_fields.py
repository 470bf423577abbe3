from dataclasses import dataclass, field

import pytest

from hf_rb.utils.fields import described, validate, value_problem


@dataclass
class Config:
    rate: float | None = field(default=None, metadata=described("A rate.", range="(0, 1]"))
    mode: str = field(default="fast", metadata=described("A mode.", choices=("fast", "slow")))

    def __post_init__(self):
        validate(
            self,
            lambda config: ["`rate` acts with `mode: slow` only."] if config.rate and config.mode == "fast" else [],
        )


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1]", [0, 0.5, 1, True], [-1e-9, 1.1, float("nan"), "0.5"]),
        ("(0, 1)", [1e-9], [0, 1]),
        ("[1, inf)", [1, 1e30], [0, float("inf"), -1]),
    ],
)
def test_ranges(interval, inside, outside):
    assert [value_problem("rate", value, range=interval) for value in inside] == [None] * len(inside)
    for value in outside:
        assert value_problem("rate", value, range=interval) == f"`rate` must be in {interval}; got {value!r}."


def test_none_is_never_out_of_range():
    assert value_problem("rate", None, range="[0, 1]", choices=["a"]) is None


def test_choices_suggest_the_nearest():
    assert value_problem("mode", "slwo", choices=["fast", "slow"]) == "`mode` cannot be 'slwo'; did you mean 'slow'?"
    assert (
        value_problem("mode", 7, choices=["fast", "slow"]) == "`mode` cannot be 7; it must be one of 'fast', 'slow'."
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0, "mode": "slow"}, r"`rate` must be in \(0, 1\]; got 0.0"),
        ({"mode": "medium"}, "`mode` cannot be 'medium'"),
        ({"rate": 0.5}, "`rate` acts with"),
    ],
)
def test_a_config_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)


@dataclass
class Typed:
    count: int = field(default=1, metadata=described("How many.", range="[1, inf)"))
    limit: int | None = field(default=None, metadata=described("A limit."))
    fast: bool = field(default=False, metadata=described("Whether."))
    foreign: int = 1

    def __post_init__(self):
        validate(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 2.0}, "`count` must be an integer; got 2.0"),
        ({"count": True}, "`count` must be an integer; got True"),
        ({"count": None}, "`count` must be an integer; got None"),
        ({"limit": "3"}, "`limit` must be an integer; got '3'"),
        ({"fast": "no"}, "`fast` must be True or False; got 'no'"),
        ({"fast": 1}, "`fast` must be True or False; got 1"),
    ],
)
def test_types(values, message):
    with pytest.raises(ValueError, match=message):
        Typed(**values)


def test_types_of_other_libraries_are_theirs():
    Typed(limit=3, fast=True, foreign="1")


def test_a_good_config_passes():
    Config(rate=1.0, mode="slow")


def test_the_range_is_kept_from_argparse():
    metadata = Config.__dataclass_fields__["rate"].metadata
    assert metadata["range"] == "(0, 1]" and metadata.copy() == {"help": "A rate."}
