"""Targets in the units people write, and the errors they get for those they should not."""

from typing import Any

import pytest

from packlight.errors import TargetError
from packlight.target import (
    DEVICES,
    Target,
    find_device,
    format_bytes,
    format_seconds,
    parse_bytes,
    parse_drop,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12MB", 12_000_000), ("12MiB", 12 * 2**20), ("1.5 GB", 1_500_000_000), ("1GiB", 2**30), ("900kB", 900_000),
        ("900KB", 900_000), ("2KiB", 2048), ("7B", 7), (" .5MB ", 500_000),
    ],
)  # fmt: skip
def test_parse_bytes_tells_powers_of_ten_from_powers_of_two(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("300ms", 0.3), ("1.5s", 1.5), ("250us", 250e-6), ("250µs", 250e-6), ("2 min", 120.0)]
)
def test_parse_seconds_reads_every_unit(text: str, value: float) -> None:
    assert parse_seconds(text) == pytest.approx(value, rel=1e-12)


def test_parse_drop_tells_points_from_percent() -> None:
    assert parse_drop("0.5pp") == (pytest.approx(0.005), None)
    assert parse_drop("2%") == (None, pytest.approx(0.02))


@pytest.mark.parametrize("parse", [parse_bytes, parse_seconds, parse_drop])
@pytest.mark.parametrize("text", ["", "x", "-3MB", "1,5s", "1e3ms", "3 4 s", "nan%", "infs"])
def test_parse_refuses_what_is_no_number_with_a_unit(parse: Any, text: str) -> None:
    with pytest.raises(TargetError):
        parse(text)


@pytest.mark.parametrize("parse", [parse_bytes, parse_seconds, parse_drop])
def test_parse_refuses_a_number_without_unit_or_with_a_foreign_one(parse: Any) -> None:
    with pytest.raises(TargetError, match="no unit"):
        parse("12")
    with pytest.raises(TargetError, match="unknown unit 'mb'.*Known"):
        parse("12mb")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"size": 0}, "size"), ({"latency": -1.0}, "latency"), ({"memory": 0}, "memory"), ({"drop": 1.0}, "drop"),
        ({"drop_relative": -0.1}, "drop relative"), ({"latency": float("nan")}, "latency"),
        ({"drop": float("nan")}, "drop"), ({"drop": 0.1, "drop_relative": 0.1}, "Keep one"),
        ({"runtime": "tflite"}, "tflite"), ({"device": "toaster"}, "toaster.*local"),
        ({"device": "pi4", "memory": 4 * 10**9}, "above what the device pi4 has"),
    ],
)  # fmt: skip
def test_a_target_that_makes_no_sense_is_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(TargetError, match=named):
        Target(**values)


def test_allowed_drop_is_absolute_whatever_was_asked() -> None:
    assert Target(drop=0.005).allowed_drop(0.1) == 0.005
    assert Target(drop_relative=0.02).allowed_drop(0.1) == pytest.approx(0.002)
    assert Target(drop=0.0).allowed_drop(0.1) == 0.0
    assert Target().allowed_drop(0.1) is None


def test_memory_limit_comes_from_the_user_before_the_device() -> None:
    assert Target(memory=5, device="pi4").memory_limit == 5
    assert Target(device="pi4").memory_limit == find_device("pi4").memory > 0
    assert Target().memory_limit is None


def test_a_target_is_empty_only_when_nothing_is_asked() -> None:
    assert Target(device="pi4", strict=True).empty
    assert not any(Target(**{n: 1}).empty for n in ("size", "latency", "memory"))
    assert not Target(drop=0.0).empty and not Target(drop_relative=0.0).empty


def test_a_target_survives_its_dict_and_refuses_unknown_keys() -> None:
    target = Target(size=3, latency=0.5, drop=0.01, device="pi5", strict=True)
    assert Target.from_dict(target.to_dict()) == target
    with pytest.raises(TargetError, match="sise"):
        Target.from_dict({"sise": 3})


def test_devices_have_distinct_names_and_are_found_by_them() -> None:
    assert len({d.name for d in DEVICES}) == len(DEVICES)
    assert all(find_device(d.name) is d for d in DEVICES)


def test_format_gives_numbers_as_people_read_them() -> None:
    assert [format_bytes(v) for v in (999, 1500, 151_100_000, 2.5e9)] == [
        "999 B",
        "1.5 kB",
        "151.1 MB",
        "2.5 GB",
    ]
    assert [format_seconds(v) for v in (0.24, 1.934, 720)] == ["240 ms", "1.93 s", "12 min"]
