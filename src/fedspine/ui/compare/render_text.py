"""A comparison as text and table cells, shared by the page, the Markdown file and the terminal."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedspine.report.tables import (
    MISSING,
    bytes_text,
    counted,
    decimal,
    percent,
    points,
    seconds_text,
)
from fedspine.ui.compare.intervals import Interval
from fedspine.ui.compare.latency import Latency
from fedspine.ui.compare.numbers import ACCURACY, Comparison, MethodResult, OverSeeds, Pair, Quality

BEYOND, WITHIN, ONE_SEED = "beyond noise", "within noise", "one seed"
MANY_PAIRS = 6
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@dataclass(frozen=True)
class TableCell:
    """A cell of a table: what it reads, what it is sorted by (None last), and what a difference is
    worth.
    """

    text: str
    value: float | str | None
    badge: str | None = None
    note: str | None = None  # the test behind the badge


@dataclass(frozen=True)
class Sheet:
    """A table: the columns' heads with a hint on each, and the rows."""

    head: tuple[tuple[str, str], ...]
    rows: tuple[tuple[TableCell, ...], ...]


@dataclass(frozen=True)
class Verdict:
    """What one pair comes to: whether the final difference is more than noise, and the whole in a
    sentence or three.
    """

    badge: str
    text: str


def target_line(comparison: Comparison) -> str:
    """What the target is and what it is measured on."""
    quality, target = comparison.quality, comparison.target
    if target.value is None:
        return (
            f"No {quality.name} was checked on the way in "
            "every run, so there is no time to a target."
        )
    checks = f"Checks on the way: {comparison.checks}."
    margin = (
        "0.5 points below the best accuracy"
        if quality is ACCURACY
        else "0.005 nats above the lowest loss"
    )
    why = f"{margin} that every run reaches" if target.how == "auto" else "as asked for"
    return (
        f"Target: {quality.name} {value_text(quality, target.value)} "
        f"in a check on the way, {why}. {checks}"
    )


def value_text(quality: Quality, value: float | None) -> str:
    return percent(value) if quality is ACCURACY else decimal(value)


def verdict(comparison: Comparison, pair: Pair) -> Verdict:
    """The pair's final difference and its speed-up, each with its interval and what it is worth."""
    texts = [_quality_words(comparison.quality, pair), _speed_words(comparison, pair)]
    return Verdict(badge(pair.final), " ".join(text for text in texts if text))


def shown_first(comparison: Comparison) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """The pairs that are shown first, and the rest: of many pairs, those of the best
    method come first.
    """
    pairs = comparison.pairs
    count = len(pairs) if len(pairs) <= MANY_PAIRS else len(comparison.results) - 1
    return pairs[:count], pairs[count:]


def badge(interval: Interval | None) -> str:
    if interval is None:
        return "not comparable"
    return {True: BEYOND, False: WITHIN, None: ONE_SEED}[interval.beyond_noise]


def _quality_words(quality: Quality, pair: Pair) -> str:
    first, second = pair.first, pair.second
    if not pair.seeds:
        return f"{first} and {second} share no seed, so their difference has no pairs."
    if pair.final is None:
        return (
            f"{first} against {second}: a seed ended without a "
            f"finite {quality.name}, so there is no difference."
        )
    up, size = pair.final.mean >= 0, abs(pair.final.mean)
    if quality is ACCURACY:
        same = round(100 * size, 1) == 0
        than = (
            f"as accurate as {second}"
            if same
            else f"{100 * size:.1f} points {'more' if up else 'less'} accurate than {second}"
        )
        says = f"{first} is {than}"
    else:
        says = f"{first} has a loss {size:.3f} nats {'higher' if up else 'lower'} than {second}"
    return f"{says} {_worth(pair.final, _hundredths if quality is ACCURACY else _signed)}"


def _worth(interval: Interval, form: Callable[[float], str]) -> str:
    """The interval and what it says, for the end of a sentence."""
    if interval.low is None or interval.high is None:
        return "in the one common seed: no interval, so this may be noise."
    says = "beyond" if interval.beyond_noise else "within"
    bounds = f"95 % interval {form(interval.low)} to {form(interval.high)}"
    seeds = counted(interval.n, "seed")
    return f"({bounds}, {seeds}; {test_text(interval)}): {says} the seeds' noise."


def _speed_words(comparison: Comparison, pair: Pair) -> str:
    speed, target = pair.speed_up, comparison.target.value
    if target is None or not pair.seeds:
        return ""
    if speed is None:
        short = [
            s
            for s in comparison.results
            if s.method.name in (pair.first, pair.second) and s.reached < s.final.n
        ]
        who = " and ".join(
            f"{s.method.name} reaches the target in {reached_text(s)}" for s in short
        )
        return f"No speed-up is given: {who}." if short else ""
    faster = speed.mean >= 1
    says = (
        f"It reaches the target {max(speed.mean, 1 / speed.mean):.2f} times "
        f"{'faster' if faster else 'slower'}"
    )
    if speed.low is None or speed.high is None:
        return f"{says} in that seed."
    low, high = sorted(bound if faster else 1 / bound for bound in (speed.low, speed.high))
    worth = "beyond" if speed.beyond_noise else "within"
    return f"{says} ({low:.2f} to {high:.2f}; {test_text(speed)}): {worth} the noise."


def test_text(interval: Interval) -> str:
    """The p-value of an interval that has one, and what is left of it after the correction.

    >>> test_text(Interval(4.0, 1.6, 6.4, 3, p=0.0189, p_corrected=0.189, tests=10))
    'p = 0.019, corrected for 10 pairs 0.19'
    >>> test_text(Interval(4.0, 3.9, 4.1, 3, p=2e-5, p_corrected=2e-5))
    'p < 0.001'
    """
    raw = p_text(interval.p)
    if interval.tests == 1:
        return f"p {raw}"
    after = p_text(interval.p_corrected).removeprefix("= ")
    return f"p {raw}, corrected for {interval.tests} pairs {after}"


def p_text(p: float | None) -> str:
    """A p-value to two digits, with its sign.

    >>> p_text(0.04689), p_text(0.0004), p_text(1.0), p_text(None)
    ('= 0.047', '< 0.001', '= 1', '-')
    """
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def reached_text(result: MethodResult) -> str:
    """How many seeds reach the target.

    A method of three seeds reads "2 of 3 seeds", or "none of 3 seeds".
    """
    reached = str(result.reached) if result.reached else "none"
    return f"{reached} of {counted(result.final.n, 'seed')}"


def methods_sheet(comparison: Comparison, latencies: Mapping[str, Latency]) -> Sheet:
    """One row for each method, the best first."""
    name = comparison.quality.name
    head = [
        ("Method", ""),
        (f"Final {name}", "mean ± standard deviation"),
        ("Seeds", ""),
        ("Sparsity", "prunable parameters removed"),
        ("Time to target", "simulated seconds"),
        ("Bytes to target", "down and up, all devices"),
        ("Whole run", "simulated seconds"),
        ("Waiting", "share of the simulated time, mean over asked devices"),
        ("Peak memory", "simulated, fullest device"),
    ]
    head += [("Latency", "measured, batch 1, 1 thread")] if latencies else []
    rows = [
        (*_cells(comparison, each), *_latency_cell(each, latencies)) for each in comparison.results
    ]
    return Sheet(tuple(head), tuple(rows))


def _cells(comparison: Comparison, result: MethodResult) -> tuple[TableCell, ...]:
    final = (
        shares_text if comparison.quality is ACCURACY else (lambda numbers: spread_text(numbers, 3))
    )
    missed = (
        None
        if result.reached == result.final.n or comparison.target.value is None
        else reached_text(result)
    )
    return (
        TableCell(result.method.name, result.method.name),
        TableCell(final(result.final), result.final.mean),
        TableCell(_seeds_text(comparison, result), result.final.n),
        TableCell(percent(result.sparsity.mean), result.sparsity.mean),
        TableCell(
            missed or seconds_spread(result.seconds_to_target), result.seconds_to_target.mean
        ),
        TableCell(missed or bytes_spread(result.bytes_to_target), result.bytes_to_target.mean),
        TableCell(seconds_spread(result.simulated_seconds), result.simulated_seconds.mean),
        TableCell(shares_text(result.waiting_share), result.waiting_share.mean),
        TableCell(bytes_spread(result.peak_memory_bytes), result.peak_memory_bytes.mean),
    )


def _latency_cell(result: MethodResult, latencies: Mapping[str, Latency]) -> tuple[TableCell, ...]:
    if not latencies:
        return ()
    found = latencies.get(result.method.name)
    if found is None:
        return (TableCell(MISSING, None),)
    return (TableCell(f"{1e3 * found.seconds_by_batch[1]:.1f} ms", found.seconds_by_batch[1]),)


def pairs_sheet(comparison: Comparison) -> Sheet:
    """One row for each pair: the differences with their intervals, and what they are worth."""
    name, accuracy = comparison.quality.name, comparison.quality is ACCURACY
    head = (
        ("Pair", "first against second, 95 % intervals, p before and after Holm's correction"),
        ("Seeds", "in common"),
        (name.capitalize(), f"first minus second, {'points' if accuracy else 'nats'}"),
        ("Speed-up", "of the first, simulated time to target"),
        ("Fewer bytes", "of the first, to target"),
        ("Shorter run", "of the first, second's whole run over its own"),
        ("Waiting", "first minus second, points"),
        ("Memory", "first over second"),
    )
    rows = [
        (
            TableCell(f"{pair.first} against {pair.second}", f"{pair.first} against {pair.second}"),
            TableCell(str(len(pair.seeds)), len(pair.seeds)),
            _interval_cell(pair.final, _hundredths if accuracy else _signed),
            _interval_cell(pair.speed_up, _times),
            _interval_cell(pair.bytes_saving, _times),
            _interval_cell(pair.shorter_run, _times),
            _interval_cell(pair.waiting_share, _hundredths),
            _interval_cell(pair.memory_ratio, _times),
        )
        for pair in comparison.pairs
    ]
    return Sheet(head, tuple(rows))


def _interval_cell(interval: Interval | None, form: Callable[[float], str]) -> TableCell:
    if interval is None:
        return TableCell(MISSING, None)
    text = form(interval.mean) + _bounds(interval, form)
    note = None if interval.p is None else test_text(interval)
    return TableCell(text, interval.mean, badge(interval), note)


def _bounds(interval: Interval, form: Callable[[float], str]) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return f" ({form(interval.low)} to {form(interval.high)})"


def spread_text(numbers: OverSeeds, digits: int, scale: float = 1.0) -> str:
    """A mean with its spread over seeds."""
    if numbers.mean is None:
        return f"{len(numbers.known)} of {counted(numbers.n, 'seed')}" if numbers.known else MISSING
    spread = "" if numbers.spread is None else f" ± {scale * numbers.spread:,.{digits}f}"
    return f"{scale * numbers.mean:,.{digits}f}{spread}"


def shares_text(numbers: OverSeeds) -> str:
    """Shares of one in percent.

    >>> shares_text(OverSeeds({0: 0.70, 1: 0.72})), shares_text(OverSeeds({0: None}))
    ('71.0 ± 1.4 %', '-')
    """
    return spread_text(numbers, 1, 100) + " %" * (numbers.mean is not None)


def seconds_spread(numbers: OverSeeds) -> str:
    """Seconds; those of one seed in the units a person would say."""
    if numbers.mean is None or numbers.spread is None:
        return seconds_text(numbers.mean)
    return f"{spread_text(numbers, 0 if numbers.mean >= 100 else 1)} s"


def bytes_spread(numbers: OverSeeds) -> str:
    """Bytes, the spread in the mean's unit.

    >>> bytes_spread(OverSeeds({0: 2.0e6, 1: 2.2e6}))
    '2.1 ± 0.1 MB'
    """
    if numbers.mean is None or numbers.spread is None:
        return bytes_text(numbers.mean)
    value, unit = bytes_text(numbers.mean).split()
    return f"{value} ± {numbers.spread / UNITS[unit]:.1f} {unit}"


def _seeds_text(comparison: Comparison, result: MethodResult) -> str:
    """How many, and which where not all methods have the same."""
    alike = all(set(each.method.runs) == set(result.method.runs) for each in comparison.results)
    return f"{result.final.n}" + ("" if alike else f" ({', '.join(map(str, result.method.runs))})")


def _hundredths(share: float) -> str:
    """A difference of shares in points, without the word."""
    return points(share).removesuffix(" points")


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _times(value: float) -> str:
    return f"{value:.2f}"
