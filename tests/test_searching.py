"""The order in which plans are tried, on planted outcomes: what was missed decides what comes next."""

from dataclasses import replace

import pytest

from packlight.plan import Plan, Step
from packlight.searching import TRIES, search
from packlight.target import Target


def plan(name: str, size: float, kl: float = 0.0) -> Plan:
    return Plan((Step("float16"),), name=name, expected={"bytes": size, "kl": kl})


FRONT = [plan("p01", 10.0), plan("p02", 20.0), plan("p03", 30.0), plan("f01", 30.0), plan("f02", 60.0)]
SHORT = [plan("c01", 10.0), plan("c02", 20.0), plan("c03", 30.0)]
BESIDE = 5


def tried(
    plans: list[Plan],
    misses: dict[str, list[str]],
    size: int | None = None,
    derived: tuple[str, ...] = (),
    guess: int = 0,
    larger: int = 0,
) -> list[str]:
    """Names of the plans that a search tries when these miss something; others meet the target.

    Plans named e03 take `larger` bytes more than expected.
    """

    def derive(kind: str, base: Plan, outcome: dict[str, object]) -> list[Plan]:
        return [replace(base, name=f"{kind}{base.name[1:]}")] if kind in derived else []

    def attempt(one: Plan) -> dict[str, object]:
        return {
            "plan": one.name,
            "size": int(one.expected["bytes"]) + BESIDE + larger * (one.name == "e03"),
            "missed": misses.get(one.name, []),
        }

    found, beside = search(list(plans), attempt, derive, Target(size=size, drop=0.01), guess)
    assert beside == BESIDE
    return [str(o["plan"]) for o in found]


def test_the_largest_that_fits_comes_first() -> None:
    assert tried(FRONT, {}) == ["p03"]
    assert tried(FRONT, {}, size=26) == ["p02"]


def test_one_that_turns_out_too_large_gives_way_to_the_next_smaller() -> None:
    assert tried(FRONT, {"p02": ["size"]}, size=20) == ["p02", "p01"]


def test_room_that_the_first_plan_left_is_used_before_lessons() -> None:
    """What lies beside the weights was thought to be larger than it is."""
    missed = {"p01": ["drop"]}
    assert tried(FRONT, missed, size=26, derived=("t",), guess=12) == ["p01", "p02"]
    assert tried(FRONT, {**missed, "p02": ["drop"]}, size=26, derived=("t",), guess=12) == ["p01", "p02", "t02"]
    assert tried(FRONT, {}, size=26, guess=12) == ["p01"]  # it meets the target: nothing more is asked


def test_a_missed_latency_asks_for_a_shorter_context_then_for_fewer_operations() -> None:
    slow = {"p03": ["latency"], "c03": ["latency"]}
    assert tried(FRONT + SHORT, slow, derived=("s",)) == ["p03", "c03", "s03"]
    assert tried(FRONT, {"p03": ["latency"]}, derived=("s",)) == ["p03", "s03"]


def test_a_missed_drop_asks_for_lessons_not_for_a_shorter_context() -> None:
    assert tried(FRONT + SHORT, {"p03": ["drop"]}, derived=("s", "t")) == ["p03", "t03"]
    assert tried(FRONT + SHORT, {"p03": ["latency"], "c03": ["drop"]}, derived=("s", "t")) == ["p03", "c03", "t03"]


def test_without_lessons_slower_plans_that_lose_less_come_next() -> None:
    assert tried(FRONT, {"p03": ["drop"], "f02": ["drop"]}) == ["p03", "f02", "f01"]


def test_float_activations_come_after_lessons_in_the_same_bytes() -> None:
    missed = {"p02": ["drop"], "t02": ["drop"]}
    assert tried(FRONT, missed, size=26, derived=("t", "e")) == ["p02", "t02", "e02"]
    assert tried(FRONT, missed, size=26, derived=("e",)) == ["p02", "e02"]
    assert tried(FRONT, {"p03": ["latency"]}, derived=("e",)) == ["p03"]  # they are slower
    missed = {"p03": ["drop"], "e03": ["latency"]}
    assert tried(FRONT, missed, derived=("e",)) == ["p03", "e03"]  # and so is what is left


def test_exact_activations_that_take_more_bytes_give_way_to_those_of_a_smaller_plan() -> None:
    missed = {"p03": ["drop"], "t03": ["drop"], "e03": ["size"]}
    assert tried(FRONT, missed, size=35, derived=("t", "e"), larger=3) == ["p03", "t03", "e03", "e02"]
    assert tried(FRONT, missed, size=35, derived=("t", "e"), larger=12) == ["p03", "t03", "e03", "e01"]


def test_a_smaller_plan_is_no_remedy_for_a_missed_drop() -> None:
    """What is tried then is larger: the user learns which size would keep the drop."""
    missed = {name: ["drop"] for name in ("p01", "p02", "t02")} | {"p03": ["size"]}
    assert tried(FRONT, missed, size=26, derived=("t",)) == ["p02", "t02", "p03"]


def test_nothing_more_is_tried_where_all_that_is_left_is_slower() -> None:
    assert tried(FRONT, {"p03": ["latency"]}) == ["p03"]
    assert tried(FRONT, {"p03": ["memory"]}) == ["p03"]


def test_where_none_does_the_smallest_that_keeps_the_drop_is_looked_for() -> None:
    every = {p.name: ["drop"] for p in FRONT if p.name != "p03"} | {"p03": ["size"]}
    assert tried(FRONT, every, size=16) == ["p01", "p02", "p03"]


@pytest.mark.parametrize("kinds", [("s",), ("s", "t")])
def test_there_is_an_end_to_it(kinds: tuple[str, ...]) -> None:
    many = [plan(f"p{i:02d}", float(i)) for i in range(40)] + [plan(f"c{i:02d}", float(i)) for i in range(40)]
    names = tried(many, {f"{k}{i:02d}": ["drop", "latency"] for k in "pcst" for i in range(40)}, derived=kinds)
    assert len(names) <= TRIES == 6
    assert len(set(names)) == len(names)
