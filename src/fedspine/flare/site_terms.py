"""The terms of a site, `[allow]` of its file, and the checks of runs and orders against them.

Runs and orders are checked before any row is read. The number of distinct rows behind an answer and
the presence of noise are checked again before the answer leaves.
"""

from collections.abc import Collection
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
import pydantic

from fedspine.core.noise import PLAIN_ANSWERS
from fedspine.core.reads import Reads, reads_of
from fedspine.core.strict import Section
from fedspine.core.task import Data, TaskKind
from fedspine.flare.run_terms import RefusalReason, Refused, RunTerms, refusing

SITE_FILE = "fedspine-site.toml"
Bounds: TypeAlias = tuple[float, float]  # the least and the most


class AllowSection(Section):
    """What a run may ask; a list that is None stands for everything that comes with fedspine."""

    kinds: tuple[TaskKind, ...] | None = None
    # split methods and methods of other packages must be named
    methods: tuple[str, ...] | None = None
    # distinct rows behind each answer; an answer about fewer could reveal a single row
    fewest_rows: int = pydantic.Field(32, ge=1)
    fewest_of_class: int = pydantic.Field(8, ge=1)  # rows of a class behind its mean and its count
    # blocks that features have passed before they leave; at 0 they are embeddings of the tokens
    lowest_cut: int = pydantic.Field(1, ge=0)
    most_steps: int = pydantic.Field(1000, ge=1)  # of an order
    largest_batch: int = pydantic.Field(256, ge=1)  # rows of a step
    # of adapters; one as wide as its layer could undo the blocks under a cut
    largest_rank: int = pydantic.Field(32, ge=1)
    # of changes of the frozen weights, which no device trains, but with which a server could write
    # a model of its own in place of the site's
    largest_merged_rank: int = pydantic.Field(0, ge=0)
    # This and the next five bound training whose weights leave. One step reveals more than several.
    # AdamW reveals the size of a gradient only if it is far below 1e-8, SGD always.
    fewest_steps: int = pydantic.Field(8, ge=1)
    optimisers: tuple[Literal["adamw", "adamw-kept", "sgd"], ...] = ("adamw",)
    lowest_clip: float = pydantic.Field(0.5, ge=0)  # of the gradient's norm
    rates: Bounds = (1e-7, 0.1)
    largest_decay: float = pydantic.Field(1.0, ge=0)
    largest_penalty: float = pydantic.Field(1.0, ge=0)  # beside the loss
    scales: Bounds = (0.25, 16.0)  # of the adapter's product
    # of the weights of the head, and of each direction of A and of B, where B is not zero
    norms: Bounds = (1e-3, 1000.0)
    # nats by which the head's bias may prefer a class beyond what features can outweigh
    largest_bias: float = pydantic.Field(4.0, ge=0)
    # noise on weights that leave, relative to what training changed, in a first answer about 32
    # rows; on other numbers, a multiple of what one row changes: `core.noise`
    noise: float = pydantic.Field(8.0, ge=0)
    # answers about the same 32 rows, over all runs, that have this noise; more rows get
    # proportionally more. The noise of later answers grows with their number, so that all together
    # reveal at most as much as twice `answers` plain ones. 0: it does not grow
    answers: float = pydantic.Field(PLAIN_ANSWERS, ge=0)
    most_tokens: int = pydantic.Field(2048, ge=4)  # of a row
    orders_per_minute: int = pydantic.Field(6000, ge=1)  # openings included


def check_run(site: str, allow: AllowSection, models: Collection[str], terms: RunTerms) -> None:
    """Raise Refused if `site` does not allow a run of these terms, or the reads that it predicts.

    A method of another package must be named in `allow.methods`; its package is not imported before
    that is checked.
    """
    from fedspine.methods import comes_with_fedspine, find, sends_features  # imports torch

    with refusing("terms"):
        terms.check()
    if terms.model not in models:
        _refuse(site, _unlisted("model", terms.model, models, "[models]"), "model")
    known, named = allow.methods, terms.method in (allow.methods or ())
    if allow.kinds is not None and terms.kind not in allow.kinds:
        _refuse(site, _unlisted("kind of task", terms.kind, allow.kinds, "allow.kinds"), "task")
    if known is not None and not named:
        _refuse(site, _unlisted("method", terms.method, known, "allow.methods"), "method")
    if not named and not comes_with_fedspine(terms.method):
        line = (
            f"the method {terms.method!r} does not come with fedspine; install the package that "
            f"brings it here, and list it in allow.methods of {SITE_FILE}"
        )
        _refuse(site, line, "method")
    if not named and sends_features(find(terms.method)):
        line = (
            f"the method {terms.method!r} sends features of single rows; list it in allow.methods "
            f"of {SITE_FILE} to allow that"
        )
        _refuse(site, line, "split")
    require(site, "most_tokens", terms.row_tokens, "tokens of a row", most=allow.most_tokens)
    if terms.privacy is not None and terms.privacy.level == "rows":
        clip, what = terms.privacy.clip, "for the clip of a row's gradient"
        require(site, "lowest_clip", clip, what, least=allow.lowest_clip)
    if terms.foretold is not None:
        _check_part(site, allow, terms, terms.foretold)
        _check_training(site, allow, terms.foretold)


def check_order(site: str, allow: AllowSection, terms: RunTerms, order: Any) -> None:
    """Raise Refused if `site` does not allow what this order reads, or the answer to it."""
    declared = list(reads_of(order))
    if not declared and terms.method not in (allow.methods or ()):
        _refuse(site, "the order does not declare what it reads", "order")
    for reads in declared:
        _check_part(site, allow, terms, reads)


def check_training(site: str, allow: AllowSection, order: Any, *, learnt: bool = True) -> None:
    """Raise Refused if `site` does not allow how this order trains. If no `learnt` weights leave,
    but only a loss, there may be fewer steps than `fewest_steps`.
    """
    for reads in reads_of(order):
        _check_training(site, allow, reads, learnt)


def check_sampled(site: str, allow: AllowSection, order: Any, data: Data) -> None:
    """Raise Refused if an order of a run with row-level privacy draws fewer distinct rows, on
    average, than `allow.fewest_rows`. How many it draws is private, so `check_used` cannot count.
    """
    rows_of_texts = np.bincount(data.texts_of(np.arange(len(data))))
    for reads in reads_of(order):
        if reads.batch is None:
            continue
        missed = max(0.0, 1 - reads.batch / len(data)) ** (_shown(reads) * rows_of_texts)
        drawn, what = round(float((1 - missed).sum())), "distinct rows behind an answer on average"
        require(site, "fewest_rows", drawn, what, least=allow.fewest_rows)


def check_used(site: str, allow: AllowSection, rows: int) -> None:
    """Raise Refused if an answer depends on fewer distinct `rows` than `allow.fewest_rows`.

    An answer without noted rows passes, since only methods that the site names may note none.
    """
    if rows:
        require(
            site, "fewest_rows", rows, "distinct rows behind the answer", least=allow.fewest_rows
        )


def check_noise(site: str, allow: AllowSection, order: Any, share: float | None) -> None:
    """Raise Refused if an order declares training and its answer has no noise (`share` is None),
    although `site` demands noise: its work does not train with `lm.tune` or `split.whole_model`.
    """
    if not allow.noise or share is not None:
        return
    if any(reads.descent is not None for reads in reads_of(order)):
        line = f"the work adds no noise, which allow.noise of its {SITE_FILE} demands"
        _refuse(site, line, "limits", line)


def _check_part(site: str, allow: AllowSection, terms: RunTerms, reads: Reads) -> None:
    require(site, "most_steps", reads.steps, "steps", least=1, most=allow.most_steps)
    if reads.batch is not None:
        most, rows = allow.largest_batch, _shown(reads) * reads.batch
        require(site, "largest_batch", reads.batch, "rows of a step", least=1, most=most)
        require(site, "fewest_rows", rows, "rows behind an answer", least=allow.fewest_rows)
    if reads.scale is not None:
        least, most = allow.scales
        require(site, "scales", reads.scale, "for the adapter's scale", least=least, most=most)
    if reads.rank is not None:
        require(site, "largest_rank", reads.rank, "for a rank", least=1, most=allow.largest_rank)
    if reads.merged is not None:
        what, most = "for the rank that is merged into the base", allow.largest_merged_rank
        require(site, "largest_merged_rank", reads.merged, what, most=most)
    if reads.classes is not None and reads.classes != len(terms.label_names):
        line = f"shares of {reads.classes} classes are asked, the task has {len(terms.label_names)}"
        _refuse(site, line, "order")
    if reads.cut is not None:
        _check_features(site, allow, terms, reads)


def _shown(reads: Reads) -> int:
    """The number of steps that show in an answer."""
    return reads.steps if reads.lasting is None else min(reads.lasting, reads.steps)


def _check_training(site: str, allow: AllowSection, reads: Reads, learnt: bool = True) -> None:
    """Refuse training whose answer reveals the gradient itself or is about too few steps."""
    if (how := reads.descent) is None:
        return
    what = "steps behind an answer"
    require(site, "fewest_steps", _shown(reads), what, least=allow.fewest_steps if learnt else 1)
    if how.kind not in allow.optimisers:
        line = (
            f"the optimiser {how.kind[:20]!r} is not among allow.optimisers of its {SITE_FILE} "
            f"({', '.join(allow.optimisers)})"
        )
        _refuse(site, line, "limits", line)
    if how.clip is not None:
        require(site, "lowest_clip", how.clip, "for the gradient's clip", least=allow.lowest_clip)
    least, fastest = allow.rates
    for rate in how.learning_rates:
        require(site, "rates", rate, "for a learning rate", least=least, most=fastest)
    most = allow.largest_decay
    require(site, "largest_decay", how.weight_decay, "for weight decay", most=most)
    require(site, "largest_penalty", how.penalty, "for a penalty", most=allow.largest_penalty)


def _check_features(site: str, allow: AllowSection, terms: RunTerms, reads: Reads) -> None:
    from fedspine.methods import find, sends_features

    with refusing("method"):
        split = terms.method in (allow.methods or ()) and sends_features(find(terms.method))
    if not split:
        _refuse(site, "features of rows leave only in a split method that it names", "split")
    if reads.labels and terms.kind == "causal-lm":
        line = (
            "the labels of a language model are its texts, and this run sends them; "
            "set method.labels_stay = true of mergesfl-plus, or take an adapter method"
        )
        _refuse(site, line, "labels")
    what = "blocks under the features that leave"
    require(site, "lowest_cut", reads.cut or 0, what, least=allow.lowest_cut)


def require(
    site: str, key: str, got: float, what: str, *, least: float = 0, most: float | None = None
) -> None:
    """Raise Refused for a number outside `least` to `most`. The server learns the term, which is no
    secret.
    """
    if least <= got and (most is None or got <= most):
        return
    above = most is not None and got > most
    bound = f"at most {_short(most)}" if above else f"at least {_short(least)}"
    line = f"expected {bound} {what}, got {_short(got)} (allow.{key} of its {SITE_FILE})"
    _refuse(site, line, "limits", line)


def _short(number: float) -> str:
    if abs(number) >= 10**12:
        return "far more" if number > 0 else "far less"
    return str(number) if isinstance(number, int) else f"{number:.4g}"


def _unlisted(what: str, name: str, known: Collection[str], where: str) -> str:
    listed = ", ".join(known) or "nothing"
    return (
        f"the {what} {name!r} is not among what {where} of its {SITE_FILE} lists ({listed}); "
        "add it there to allow it"
    )


def _refuse(site: str, line: str, reason: RefusalReason, detail: str | None = None) -> NoReturn:
    raise Refused(f"site {site} refuses: {line}", reason, detail)
