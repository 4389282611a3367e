"""The format of recipes, and what older ones call by other names: refused with a line that says
what to write now.
"""

from collections.abc import Mapping
from typing import Any

from fedspine.core.errors import BadInput

# what a run writes; 1, which was not written, had FedSpine's settings in one flat table, 2 the
# quorum among those of fedspine-plus, and 3 the settings of MergeSFL, AdaSFL and PyramidFL in flat
# tables
FORMAT = 4

# the oldest format of a run whose state is read, and the methods for which only the newest one is
OLDEST_READ = 3
NEWEST_ONLY = ("adasfl", "mergesfl", "mergesfl-plus", "pyramidfl")

# settings that are tables now, and what to write for a plain value
TABLES = {
    "selection": "selection = {{name = {value}}}",
    "logit_adjustment": 'logit_adjustment = {{name = "label-skew", share = {value}}}',
}

# by their keys then; what one method alone renamed is in its class's `renamed`
MOVED = {
    "choice": "controller.name",
    "caution": "controller.latency_margin",
    "patience": "controller.deadline_slack",
    "explore": "controller.exploration",
    "discount": "controller.discount",
    "split_at": "controller.split_at",
    "deepest": "controller.max_tree_depth",
    "fixed_ratio": "controller.ratio",
    "fixed_rank": "controller.rank",
    "score_every": "importance.every",
    "score_keep": "importance.keep",
    "score_square": "importance.square",
    "score_cross": "importance.cross",
    "score_normalise": "importance.normalise",
    "fleet_say": "global_importance_weight",
    "head_speed": "head_lr_multiplier",
}

# settings that are gone, since no experiment showed one to matter
GONE = (
    "budget_bytes",
    "decoder_width",
    "lipschitz",
    "lipschitz_decay",
    "pooled",
    "reward",
    "weights",
)

# settings that were a method's and hold for every method now, by their keys then
OF_THE_FLEET = {"enough": "quorum", "quorum": "quorum"}


def format_of(tables: Mapping[str, Any]) -> int:
    """The format that a recipe says it has; raises BadInput for one that is not known."""
    number = tables.get("format", 1)
    if type(number) is not int or not 1 <= number <= FORMAT:
        raise BadInput(
            f"format is {number!r}, but this fedspine reads recipes of format {FORMAT}; "
            "use the version of fedspine that wrote it"
        )
    return number


def state_is_read(tables: Mapping[str, Any]) -> bool:
    """Whether the state of a run with such a recipe is read; raises BadInput as `format_of`."""
    method = tables.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    return format_of(tables) >= (FORMAT if name in NEWEST_ONLY else OLDEST_READ)
