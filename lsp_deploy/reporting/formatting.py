"""Numbers in words: every one with its unit, no more digits than it deserves."""

from __future__ import annotations

import math
import re

from markupsafe import Markup

__all__ = [
    "breakable",
    "count",
    "date",
    "file_size",
    "flops",
    "interval",
    "joules",
    "milliseconds",
    "percent",
    "points",
    "seconds",
    "signed",
    "watts",
]


def breakable(name: str) -> Markup:
    """Return a name as HTML that may be broken after its slashes and dots."""
    return Markup("<wbr>").join(re.findall(r"[^/.]*[/.]?", name))


def date(created: str) -> str:
    """Return an ISO date in UTC as people write it: "2026-09-01 12:00 UTC"."""
    return f"{created[:10]} {created[11:16]} UTC"


def file_size(size_bytes: float) -> str:
    """Return bytes as kB, MB or GB, powers of ten: "5.68 MB"."""
    return _scaled(size_bytes, ("bytes", "kB", "MB", "GB", "TB"))


def flops(number: float) -> str:
    """Return floating-point operations: "2.51 GFLOP"."""
    return _scaled(number, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def percent(value: float, digits: int = 1) -> str:
    """Return a percentage that is 100 % or 0 % only where it is exactly so."""
    shown = f"{value:.{digits}f}"
    least = 10.0**-digits
    if float(shown) == 0 and value > 0:
        return f"< {least:g} %"
    if float(shown) == 100 and value < 100:
        return f"> {100 - least:g} %"
    is_round = value in (0, 100) or (value == int(value) and digits == 1)
    return f"{int(value)} %" if is_round else f"{shown} %"


def points(value: float) -> str:
    """Return percentage points: "0.42 points"."""
    return f"{signed(value)} point{'' if abs(value) == 1 else 's'}"


def signed(value: float) -> str:
    """Return a number with two digits and a proper minus sign; never a negative zero."""
    shown = f"{value:.2f}"
    return "0.00" if float(shown) == 0 else shown.replace("-", "\N{MINUS SIGN}")


def interval(low: float | None, high: float | None, unit: str = "") -> str:
    """Return an interval: "-0.10 to 0.52"; empty where an end is not known."""
    if low is None or high is None:
        return ""
    return f"{signed(low)} to {signed(high)}{unit}"


def milliseconds(value: float) -> str:
    """Return milliseconds with three significant digits."""
    return f"{_significant(value)} ms"


def watts(value: float) -> str:
    """Return watts with three significant digits: "12.3 W"; what is net of idle power may be below zero."""
    return f"{_sign(value)}{_significant(abs(value))} W"


def joules(value: float) -> str:
    """Return an energy as J or mJ: "0.41 J", "8.2 mJ"; what is net of idle power may be below zero."""
    size = abs(value)
    return f"{_sign(value)}{_significant(size)} J" if size >= 0.1 else f"{_sign(value)}{_significant(1000 * size)} mJ"


def seconds(value: float) -> str:
    """Return a duration: "3.4 s", "2 min 05 s"."""
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s"


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 layer", "48 layers"."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    return f"{value:.0f} {units[0]}" if power == 0 else f"{_significant(value)} {units[power]}"


def _sign(value: float) -> str:
    return "\N{MINUS SIGN}" if value < 0 else ""


def _significant(value: float) -> str:
    if value <= 0:
        return "0"
    value = float(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{min(digits, 4)}f}"
