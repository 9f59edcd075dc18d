"""Numbers as words: counts, durations, percentages, the same in every message and in the report."""


def counted(n: int, what: str) -> str:
    """A number and its noun, in the plural unless the number is 1: `1 cell`, `1,234 cells`."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}{'es' if what.endswith('tch') else 's'}"


def duration(seconds: float) -> str:
    """A time in the largest unit that leaves two digits or three: seconds below two minutes, then min, hours, days."""
    if seconds < 119.5:
        return f"{max(round(seconds), 1)} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} hours" if minutes < 100 * 60 else f"{minutes / 60 / 24:.0f} days"


def percent(share: float) -> str:
    """A share in whole per cent, with as many decimals as it takes not to say 0 or 100 where it is neither."""
    value = 100 * share
    for decimals in range(10):
        text = f"{value:.{decimals}f}"
        if float(text) not in (0, 100) or value in (0, 100):
            break
    return f"{text}\xa0%"


def percent_change(value: float, base: float, sign: bool = True) -> str:
    """A change as `percent` has it, with + or − before it, or without: 1,995 of 542,230 is −99.6 %."""
    text = percent(abs(value - base) / base)
    return text if not sign or value == base else f"{'+' if value > base else '−'}{text}"
