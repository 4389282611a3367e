"""The cost of scoring units on a device, by importance source; a device that does not score pays
nothing.

Counted as the code computes it, for a site's weight of R kept rows and C kept columns, an adapter
of rank r and T padded tokens in an update: products with 2 operations for each multiplication and
addition, and whole passes over a matrix with 1 for each entry. Work on single rows, columns or
units is left out: it is a thousandth of that. Bytes are of whole matrices, fp32 unless said
otherwise.

- "gradient" (`importance._entry_scores`), at all sites, after the backward pass: [gB, B] [A; gA]
  takes 4 r R C, B A 2 r R C; to scale it, add W, multiply both, take the absolute value or square
  and sum 5 R C. With `cross`, gB gA, its scaling and its subtraction take 2 r R C + 2 R C more. It
  holds two R x C matrices at once, three with `cross`.
- "activation" (`TrainableStack.importance_by_output`), at the sites that read units (attention
  output, feed-forward down): their inputs are squared and averaged over tokens in the forward pass,
  3 T C; after the backward pass B A takes 2 r R C, to scale it, add W, square and sum 4 R C. It
  holds the fp32 input and its square, 8 T C bytes, beside the activations, and one R x C matrix
  after them.
- "gate" (`ImportanceTracker._record_input`), at the same sites, in the backward pass: input times
  gradient, summed over tokens, 2 T C. It holds the product in 16 bits and in fp32, 6 T C bytes,
  beside the activations.
- "blend" is "activation" and "gate": their operations add up, and one follows the other, so the
  larger memory counts.
- magnitude (`importance.magnitude_scores`), at all sites, once after training: as after
  "activation". It holds the fp32 weight and the sum of weight and product, two R x C matrices.
  Chance costs nothing.
"""

from collections.abc import Iterable

from fedspine.lm.cost import NO_SCORING, SINGLE, ScoringCost
from fedspine.lm.importance_tracker import Scoring
from fedspine.lm.prunable_layout import PrunableLayout, PrunableSite
from fedspine.lm.structure import Structure, kept_columns, kept_rows

RECORDED, GATED = 8, 6  # bytes per input value of a site whose inputs are recorded, or gated


def updates(scoring: Scoring, steps: int) -> int:
    """How often a training of so many steps updates the importance: in its first and then every so
    many steps.
    """
    return -(-steps // scoring.every)


def tracking_cost(
    layout: PrunableLayout,
    structure: Structure,
    scoring: Scoring | None,
    *,
    rank: int,
    tokens: int | float,
    largest: int,
    updates: int,
) -> ScoringCost:
    """The cost of tracking importance through so many `updates` over `tokens` padded tokens in all.

    `largest` is the padded tokens of the largest batch. Without a `scoring` nothing is tracked.
    """
    if scoring is None:
        return NO_SCORING
    sizes = [(site, *_kept_shape(site, structure)) for site in layout.sites]
    entries = sum(rows * columns for _, rows, columns in sizes)
    matrix = SINGLE * max(rows * columns for _, rows, columns in sizes)
    if scoring.of == "gradient":
        each = 6 * rank + 5 + (2 * rank + 2 if scoring.cross else 0)
        matrices = 3 if scoring.cross else 2
        return ScoringCost(flops=float(updates * each * entries), bytes_after=matrices * matrix)
    readers = [(rows, columns) for site, rows, columns in sizes if site.column_units]
    columns_read = sum(columns for _, columns in readers)
    widest = max(columns for _, columns in readers)
    read = sum(rows * columns for rows, columns in readers)
    by_output = tokens * 3 * columns_read + updates * (2 * rank + 4) * read
    by_gate = tokens * 2 * columns_read
    after = SINGLE * max(rows * columns for rows, columns in readers)
    match scoring.of:
        case "activation":
            return ScoringCost(float(by_output), RECORDED * largest * widest, after)
        case "gate":
            return ScoringCost(float(by_gate), GATED * largest * widest)
    return ScoringCost(float(by_output + by_gate), RECORDED * largest * widest, after)


def magnitude_cost(layout: PrunableLayout, structure: Structure, rank: int) -> ScoringCost:
    """The cost of reading importance off the weights once."""
    sizes = list(_kept_entries(layout.sites, structure))
    return ScoringCost(
        flops=float((2 * rank + 4) * sum(sizes)), bytes_after=2 * SINGLE * max(sizes)
    )


def _kept_entries(sites: Iterable[PrunableSite], structure: Structure) -> Iterable[int]:
    """Kept entries of each site's weight."""
    for site in sites:
        rows, columns = _kept_shape(site, structure)
        yield rows * columns


def _kept_shape(site: PrunableSite, structure: Structure) -> tuple[int, int]:
    """Kept rows and columns of a site's weight."""
    rows, columns = kept_rows(site, structure), kept_columns(site, structure)
    return (
        site.rows if rows is None else len(rows),
        site.columns if columns is None else len(columns),
    )
