"""How the report writes numbers, and how it makes untrusted text harmless. Pure functions of their arguments."""

import html
import math
from typing import TypeGuard

# Bidirectional overrides can make code read differently from what it is; controls are invisible. Both are shown as
# visible characters, and lone surrogates (which no file can hold) as the replacement character.
_VISIBLE: dict[int, str | None] = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: "\u2421", ord("\r"): None} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
_VISIBLE |= dict.fromkeys([0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")

THIN = "\N{NARROW NO-BREAK SPACE}"
TIMES = "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def visible(text: str) -> str:
    """The text with nothing in it that is invisible, reorders its neighbours or cannot be encoded."""
    return text.translate(_VISIBLE)


def escape(text: str) -> str:
    """For element content and quoted attributes of HTML and SVG."""
    return html.escape(visible(text))


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def magnitude(value: float) -> tuple[float, str]:
    """The divisor and suffix that bring a count to 1 … 999: 1,638,400 -> (1e6, "M")."""
    for divisor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= divisor:
            return divisor, suffix
    return 1.0, ""


def short(value: float, digits: int = 3) -> str:
    """Three significant digits and a suffix: 17104512 -> "17.1 M"."""
    divisor, suffix = magnitude(value)
    scaled = value / divisor
    if scaled and abs(float(f"{scaled:.{digits}g}")) >= 1000 and suffix != "T":  # 999,999 is 1.00 M, not 1000 k
        divisor, suffix = magnitude(divisor * 1000)
        scaled = value / divisor
    whole = len(str(int(abs(scaled))))
    decimals = max(0, digits - whole) if suffix or scaled != int(scaled) else 0
    return f"{scaled:,.{decimals}f}" + (THIN + suffix if suffix else "")


def count(value: float) -> str:
    return f"{value:,.0f}"


def bits(value: float) -> str:
    return f"{value:.3f}"


def percent(share: float, decimals: int = 0) -> str:
    return f"{100 * share:.{decimals}f}{THIN}%"


def size(num_bytes: float) -> str:
    """Decimal units, as disks and networks have them."""
    for divisor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= divisor:
            return f"{num_bytes / divisor:.{1 if num_bytes < 100 * divisor else 0}f}{THIN}{unit}"
    return f"{num_bytes:.0f}{THIN}B"


def duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f}{THIN}s"
    total = round(seconds)
    if total < 60:
        return f"{total}{THIN}s"
    if total < 3600:
        return f"{total // 60}{THIN}min {total % 60:02d}{THIN}s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}{THIN}h {minutes % 60:02d}{THIN}min"
    return f"{round(minutes / 60) // 24}{THIN}d {round(minutes / 60) % 24}{THIN}h"


def scientific(value: float) -> str:
    """For tiny figures: 3.1e-06 -> 3.1 times ten to the power of -6, with a superscript."""
    if not value:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}{THIN}{TIMES}{THIN}10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def listed(words: list[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
