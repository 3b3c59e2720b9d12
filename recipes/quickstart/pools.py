"""The values that the extraction task draws from, by pool, and its schemas: `words.yaml`, and the numbers made here."""

from collections.abc import Iterable
from importlib.resources import files
from itertools import product
from typing import NamedTuple

import yaml

Value = str | int


class Pool(NamedTuple):
    seen: tuple[Value, ...]
    held_out: tuple[Value, ...]
    """a fifth, which never occurs in training"""


class Schema(NamedTuple):
    fields: dict[str, str]
    """JSON key -> name of its pool, in the order of the JSON object"""
    templates: tuple[str, ...]


def _pool(values: Iterable[Value]) -> Pool:
    unique = tuple(dict.fromkeys(values))
    return Pool(tuple(value for i, value in enumerate(unique) if i % 5 != 4), unique[4::5])


def _pairs(first: Pool, second: Pool) -> Pool:
    return Pool(*(tuple(f"{a} {b}" for a, b in product(x, y)) for x, y in zip(first, second)))


def _joined(first: Iterable[str], second: Iterable[str]) -> Pool:
    return _pool(f"{a} {b}" for a, b in product(first, second))


def _pools(words: dict[str, list[str]]) -> dict[str, Pool]:
    first, last, city = (_pool(words[name]) for name in ("first", "last", "city"))
    dates = [f"{m} {d}" for d in range(1, 29) for m in words["month"]]
    dates += [f"{d} {m}" for d in range(1, 29) for m in words["month"]]
    date, weekday = _pool(dates), _pool(words["weekday"])
    hours = [(h, "am") for h in range(7, 12)] + [(h, "pm") for h in range(1, 10)]
    home_towns = Pool(*(tuple(c for c in cities if " " not in str(c))[:60] for cities in city))
    return {
        "first": first,
        "full": _pairs(first, last),
        "doctor": Pool(*(tuple(f"Dr. {name}" for name in names) for names in last)),
        "city": city,
        "thing": _pool(words["thing"]),
        "things": _pool(f"{thing}s" for thing in words["thing"]),
        "company": _pool(words["company"]),
        "role": _pool(words["role"]),
        "color": _pool(words["color"]),
        "sky": _pool(words["sky"]),
        "team": _pairs(home_towns, _pool(words["mascot"])),
        "band": _joined(words["band_adjective"], words["band_noun"]),
        "venue": _joined(words["venue_name"], words["venue_kind"]),
        "dish": _joined(words["dish_main"], words["dish_kind"]),
        "address": _pool(
            f"{n} {s} {kind}" for n in range(1, 99, 3) for s in words["street"] for kind in ("St", "Road")
        ),
        "date": date,
        # Sixty times: there are 672 dates and 7 weekdays, and both should be common.
        "day": Pool(date.seen + weekday.seen * 60, date.held_out + weekday.held_out * 60),
        "time": _pool(
            [f"{h}:{m:02d}" for h in range(7, 22) for m in range(0, 60, 5)]
            + [f"{h}{m} {half}" for h, half in hours for m in ("", ":15", ":30", ":45")]
        ),
        "price": _pool(
            [f"{sign}{n}" for n in range(3, 90) for sign in "$€£"]
            + [f"${n}.{cents}" for n in range(2, 40) for cents in ("50", "99", "25", "75")]
        ),
        "amount": _pool(f"{sign}{n}" for n in range(15, 990, 5) for sign in "$€£"),
        "rent": _pool(f"{sign}{n:,}" for n in range(450, 2900, 50) for sign in "$€£"),
        "score": _pool(
            [f"{a}-{b}" for a in range(1, 8) for b in range(a)]
            + [f"{a}-{b}" for a in range(61, 99, 2) for b in range(52, a, 7)]
        ),
        "flight": _pool(
            f"{c}{n}" for n in range(101, 990, 7) for c in ("BA", "LH", "AF", "UA", "DL", "TK", "KL", "AA")
        ),
        "gate": _pool(f"{letter}{n}" for n in range(1, 40) for letter in "ABCDE"),
        "room": _pool(f"{kind} {n}" for n in range(1, 41) for kind in ("Room", "Hall", "Lab", "Studio")),
        "count": _pool(range(12, 90)),
        "rooms": _pool(range(2, 9)),
        "degrees": _pool(range(2, 40)),
        "percent": _pool(f"{n}%" for n in range(5, 100, 5)),
        "minutes": _pool(range(10, 120, 5)),
    }


_DATA = yaml.safe_load((files(__package__) / "words.yaml").read_text(encoding="utf-8"))
POOLS: dict[str, Pool] = _pools({name: words.split(", ") for name, words in _DATA["words"].items()})
SCHEMAS: dict[str, Schema] = {name: Schema(s["fields"], tuple(s["templates"])) for name, s in _DATA["schemas"].items()}
