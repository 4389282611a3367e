"""What leaves a device, and what a server can infer from it: membership, labels and tokens of the
rows behind an answer, by published attacks.

`python benchmarks/leakage.py --quick` takes minutes for each method on one core and writes
results/leakage.md. A device holds 1, 8 or 32 rows of trec6 and answers one order of one step over
all of them, or 640 and answers one of 20 steps over 32 each; the server
knows the base, the order, and other rows of the same kind. A *curious* server sends its method's
orders; a *hostile* one writes orders to learn from the answers. *Default terms* are those of a site
with these rows whose file does not limit what it allows. There a curious server's order has all
steps of its method, and a hostile one's goes as far as the terms permit.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import leakage_attacks as attacks
import leakage_ground as ground
import leakage_orders as orders
import leakage_report
import numpy as np
import torch
from leakage_ground import Wiretap
from leakage_scene import DEFAULT, SIZES, Found, Scene, Tally, scene_of

from fedspine.methods.fedavg import FedAvg
from fedspine.methods.fedlora import FedLora
from fedspine.methods.fedspine import FedSpine
from fedspine.methods.linear_probe import LinearProbe
from fedspine.methods.mergesfl import MergeSfl
from fedspine.methods.splitlora import SplitLora
from fedspine.pruning.head_start import ClassMeans

CURIOUS, HOSTILE = "curious, default terms", "hostile, default terms"
TIMES = 8  # that a hostile server asks, with other factors each time
AGAIN = f"{HOSTILE}, {TIMES} times"
# answers for each (steps, rows of a step), and shadow answers
QUICK = {(1, 1): 12, (1, 8): 8, (1, 32): 6, (20, 32): 4}, 6
WHOLE = {(1, 1): 96, (1, 8): 48, (1, 32): 32, (20, 32): 16}, 48

# with the defaults of each; FedSpine at the largest of its ranks, which tells most
METHODS: dict[str, Any] = {
    "fedlora": FedLora(),
    "fedlora, class means": FedLora(head_start="class-means"),
    "linear_probe": LinearProbe(),
    "fedspine": FedSpine(ranks=(32,)),
    "fedavg": FedAvg(),
    "splitlora": SplitLora(),
    "splitlora, cut 0": SplitLora(cut=0),
    "mergesfl": MergeSfl(),
}


# --- methods whose devices send weights ---


def attack_updates(
    scene: Scene,
    method: Any,
    terms: tuple[int, int],
    answers: int,
    shadows: int,
    times: int = TIMES,
) -> list[Found]:
    """All attacks on the weights that come back."""
    base, tally, (steps, batch) = scene.task.base, Tally(scene), terms
    state, small = scene.warmed(method), replace(method, steps=steps, batch=batch)
    before, flat, members, fallen = None, [], [], []
    of_signs = None
    for seed, used, unused in scene.draws(steps * batch, answers):
        tap = Wiretap(base, scene.pool.take(used), seed)
        small.round(state, tap)
        update = ground.updates(tap)[-1]
        if before is None:
            sent = update.model(update.sent)
            before = ground.row_losses(base, sent, scene.candidates)
            of_signs = scene.decoder(torch.sign(ground.readout(base, sent, scene.public)))
        counts = attacks.labels_by_sign(update.bias, scene.prior, len(used))
        tally.labels("curious", "signs of the bias", counts, used, unused)
        seen = attacks.signed_features(update.bias, update.head)
        tally.tokens("curious", "head", of_signs(seen, unit=False), used, unused)
        if len(update.first_factors):
            inside = attacks.tokens_in_span(update.first_factors, scene.vocabulary, signs=True)
            tally.tokens("curious", "span", inside, used, unused)
        if steps == 1:  # which a hostile server would choose
            _attack_hostile(scene, tally, tap, update, (used, unused))
        rows = used, unused
        _attack_within_terms(scene, tally, tap, update, method, of_signs, rows, times)
        after = ground.row_losses(base, update.model(update.back), scene.candidates)
        fallen.append(attacks.members_by_loss(before, after))
        flat.append(update.flat)
        members.append(np.isin(np.arange(len(scene.candidates)), used))
    for fall, member in zip(fallen, members, strict=True):
        tally.add("curious", "members", "loss", attacks.auc(fall, member))
    if steps == 1 and shadows:
        out = _shadow_falls(scene, small, state, before, batch, shadows)
        own = _cosines(scene, tap, update, flat)
        for fall, near, member in zip(fallen, own, members, strict=True):
            lira = attacks.members_by_lira(fall, out)
            tally.add("curious", "members", "LiRA", attacks.auc(lira, member))
            tally.add("curious", "members", "gradient", attacks.auc(near, member))
    return tally.found


def attack_default_terms(
    scene: Scene,
    method: Any,
    terms: tuple[int, int],
    answers: int,
    *,
    times: int = TIMES,
    noise: float = DEFAULT.noise,
) -> list[Found]:
    """The attacks on a site with the default terms, or with another `noise`, alone."""
    tally, (steps, batch) = Tally(scene), terms
    state, small = scene.warmed(method), replace(method, steps=1, batch=1)  # for its order alone
    of_signs = None
    for seed, used, unused in scene.draws(steps * batch, answers):
        tap = Wiretap(scene.task.base, scene.pool.take(used), seed)
        small.round(state, tap)
        update = ground.updates(tap)[-1]
        if of_signs is None:
            sent = update.model(update.sent)
            of_signs = scene.decoder(
                torch.sign(ground.readout(scene.task.base, sent, scene.public))
            )
        rows = used, unused
        _attack_within_terms(scene, tally, tap, update, method, of_signs, rows, times, noise)
    return tally.found


def _attack_hostile(
    scene: Scene,
    tally: Tally,
    tap: Wiretap,
    update: ground.Update,
    rows: tuple[np.ndarray, np.ndarray],
) -> None:
    """Labels, class features and tokens, from orders that are written for them."""
    base = scene.task.base
    answer = orders.asked_again(tap, update, orders.for_labels(base, update.order))
    counts = attacks.labels_by_counts(answer.bias, answer.result.loss, orders.DOUBT, len(rows[0]))
    tally.labels("hostile", "counts from the bias", counts, *rows)
    seen = attacks.class_features(answer.head, counts)
    tally.tokens("hostile", "head", scene.of_base(seen, unit=True), *rows)
    if len(update.first_factors):
        answer = orders.asked_again(tap, update, orders.for_tokens(base, update.order))
        inside = attacks.tokens_in_span(answer.first_factors, scene.vocabulary, signs=False)
        tally.tokens("hostile", "span", inside, *rows)
        # the same, where the rank is bound to the run's
        order = orders.for_tokens(base, update.order, rank=update.rank)
        answer = orders.asked_again(tap, update, order)
        inside = attacks.tokens_in_span(answer.first_factors, scene.vocabulary, signs=False)
        tally.tokens("hostile, rank bound", "span", inside, *rows)


def _attack_within_terms(
    scene: Scene,
    tally: Tally,
    tap: Wiretap,
    update: ground.Update,
    method: Any,
    of_signs: attacks.BagDecoder,
    rows: tuple[np.ndarray, np.ndarray],
    times: int = TIMES,
    noise: float = DEFAULT.noise,
) -> None:
    """What a site with the default terms refuses, and what its answers reveal: to the method's own
    order, and to orders that go as far as the terms permit.
    """
    base, order, few = scene.task.base, update.order, len(rows[0])
    beyond = {("hostile", "labels"): orders.for_labels(base, order)}
    if len(update.first_factors):
        beyond["hostile", "span"] = orders.for_tokens(base, order)
        beyond["hostile, rank bound", "span"] = orders.for_tokens(base, order, rank=update.rank)
    for (server, attack), each in beyond.items():
        tally.allowed(server, attack, each, method.name, few)

    steps, batch = DEFAULT.fewest_steps, min(method.batch, few)
    layouts = {(steps, max(1, few // steps))}  # each row once
    if few <= DEFAULT.largest_batch:
        layouts.add((steps, few))  # all rows in each step
    tries = {(CURIOUS, ""): orders.of_steps(order, method.steps, batch)}
    for layout in sorted(layouts):
        name = f"{layout[0]} x {layout[1]}"
        tries[HOSTILE, f"labels, {name}"] = orders.labels_within(base, order, DEFAULT, *layout)
        if len(update.first_factors):
            tries[HOSTILE, f"span, {name}"] = orders.tokens_within(base, order, DEFAULT, *layout)
    for (server, attack), each in tries.items():
        if tally.allowed(server, attack or "own order", each, method.name, few):
            answer = orders.asked_again(tap, update, each, noise=noise)
            _read_signs(scene, tally, server, attack, answer, of_signs, rows)
    if len(update.first_factors) and times and few <= DEFAULT.largest_batch:
        layout = steps, few
        drawn = [orders.tokens_within(base, order, DEFAULT, *layout, i) for i in range(times)]
        if tally.allowed(AGAIN, "span", drawn[0], method.name, few):
            came = orders.asked_often(tap, update, drawn, noise=noise)
            read_span(scene, tally, AGAIN, "", torch.cat([a.first_factors for a in came]), rows)


def _read_signs(
    scene: Scene,
    tally: Tally,
    server: str,
    attack: str,
    answer: ground.Update,
    of_signs: attacks.BagDecoder,
    rows: tuple[np.ndarray, np.ndarray],
) -> None:
    """Labels and tokens from an answer of several steps, each of which shows signs."""
    if not attack.startswith("span"):
        counts = attacks.labels_by_sign(answer.bias, scene.prior, len(rows[0]))
        tally.labels(server, attack or "signs of the bias", counts, *rows)
        seen = attacks.signed_features(answer.bias, answer.head)
        tally.tokens(server, attack or "head", of_signs(seen, unit=False), *rows)
    if not attack.startswith("labels") and len(answer.first_factors):
        read_span(scene, tally, server, attack, answer.first_factors, rows)


def read_span(
    scene: Scene,
    tally: Tally,
    server: str,
    attack: str,
    gradient: torch.Tensor,
    rows: tuple[np.ndarray, np.ndarray],
) -> None:
    """Tokens from signs under noise: in the span, and with the most power."""
    inside = attacks.tokens_in_span(gradient, scene.vocabulary, signs=True)
    tally.tokens(server, attack or "span", inside, *rows)
    most = attacks.tokens_by_power(gradient, scene.vocabulary, scene.public)
    tally.tokens(server, f"{attack}, power".removeprefix(", "), most, *rows)


def _shadow_falls(
    scene: Scene, small: Any, state: Any, before: np.ndarray, rows: int, shadows: int
) -> np.ndarray:
    """How the losses of all candidates fall by answers about public rows, [shadows, candidates]."""
    falls = []
    for shadow in range(shadows):
        rng = np.random.default_rng([scene.seed, rows, shadow, 1])
        chosen = rng.permutation(len(scene.public))[:rows]
        tap = Wiretap(scene.task.base, scene.public.take(chosen), int(rng.integers(2**31)))
        small.round(state, tap)
        update = ground.updates(tap)[-1]
        after = ground.row_losses(scene.task.base, update.model(update.back), scene.candidates)
        falls.append(attacks.members_by_loss(before, after))
    return np.stack(falls)


def _cosines(
    scene: Scene, tap: Wiretap, update: ground.Update, flat: Sequence[torch.Tensor]
) -> np.ndarray:
    """The likeness of each answer and each candidate's own, [answers, candidates]."""
    order, found = orders.for_one(update.order), np.zeros((len(flat), len(scene.candidates)))
    for candidate in range(len(scene.candidates)):
        own = orders.asked_again(
            tap, update, order, scene.candidates.take(np.array([candidate]))
        ).flat
        found[:, candidate] = [attacks.members_by_gradient(each, own) for each in flat]
    return found


# --- methods whose devices send class means or features ---


def attack_class_means(
    scene: Scene, method: Any, terms: tuple[int, int], answers: int
) -> list[Found]:
    """The exchange before the first round, in which counts and means of classes are asked."""
    tally, rows = Tally(scene), terms[0] * terms[1]
    small = replace(method, steps=terms[0], batch=terms[1])
    state = method.start(scene.task, np.random.default_rng(scene.seed))
    for seed, used, unused in scene.draws(rows, answers):
        tap = Wiretap(scene.task.base, scene.pool.take(used), seed)
        small.round(state, tap)
        means = next(got for _, _, got in tap.seen if isinstance(got, ClassMeans))
        counts = means.counts.numpy()
        counts = counts + (rows - counts.sum()) * scene.prior
        tally.labels("curious", "counts are sent", counts, used, unused)
        seen = list(means.means["means"].float()[means.counts > 0])
        tally.tokens("curious", "class means", scene.of_base(seen, unit=False), used, unused)
    return tally.found


def attack_features(scene: Scene, method: Any, rows: int, answers: int) -> list[Found]:
    """Features and labels of single rows, as split methods send them."""
    base, tally = scene.task.base, Tally(scene)
    state = scene.warmed(method)
    small, inverter, own = replace(method, steps=1, batch=rows), None, None
    for seed, used, unused in scene.draws(rows, answers):
        tap = Wiretap(base, scene.pool.take(used), seed)
        small.round(state, tap)
        order, seen, labels = ground.first_features(tap)
        if own is None:
            own = ground.client_features(base, order, scene.candidates)
            whole = replace(order, weights={}, cutting=replace(order.cutting, cut=0))
            if order.cutting.cut:
                inverter = attacks.Inverter.learnt(
                    ground.client_features(base, order, scene.public),
                    ground.client_features(base, whole, scene.public),
                )
        rows_seen = seen if inverter is None else [inverter(row) for row in seen]
        came = {
            token for row in attacks.tokens_nearest(rows_seen, scene.vocabulary) for token in row
        }
        tally.tokens("curious", "nearest embedding", came - set(scene.known), used, unused)
        counts = np.bincount(labels, minlength=len(scene.task.label_names))
        tally.labels("curious", "labels are sent", counts, used, unused)
        near = np.array([attacks.members_by_features(seen, each) for each in own])
        member = np.isin(np.arange(len(scene.candidates)), used)
        tally.add("curious", "members", "features", attacks.auc(near, member))
    return tally.found


def attacked(
    scene: Scene,
    name: str,
    terms: tuple[int, int],
    answers: int,
    shadows: int,
    *,
    within_terms: bool = False,
    times: int = TIMES,
) -> list[Found]:
    """All attacks on one method, or those on a site with the default terms."""
    method = METHODS[name]
    if within_terms:
        return attack_default_terms(scene, method, terms, answers, times=times)
    match method:
        case SplitLora() | MergeSfl():
            return attack_features(scene, method, terms[1], answers)
        case FedLora(head_start="class-means"):
            return attack_class_means(scene, method, terms, answers)
    return attack_updates(scene, method, terms, answers, shadows, times)


# --- the run ---


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer answers: minutes per method")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--data", choices=["trec6", "pydoc-topics"], default="trec6")
    parser.add_argument("--layers", type=int, default=3, help="blocks of MiniLM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--default-terms", action="store_true", help="only answers of a site of the default terms"
    )
    parser.add_argument("--no-write", dest="write", action="store_false", help="only print")
    options = parser.parse_args()
    torch.set_num_threads(1)
    answers, shadows = QUICK if options.quick else WHOLE
    scene = scene_of(options.data, options.layers, options.seed)
    print(f"{len(scene.public)} public rows, {len(scene.candidates)} candidates", flush=True)
    table: list[dict[str, Any]] = []
    for name in options.methods:
        for terms in answers:
            features = isinstance(METHODS[name], SplitLora | MergeSfl)
            few = terms[0] * terms[1] < DEFAULT.fewest_rows
            if (features and terms[0] > 1) or (options.default_terms and (features or few)):
                continue  # features leave in every step as in the first; of few rows nothing does
            began = time.monotonic()
            within = options.default_terms
            found = attacked(scene, name, terms, answers[terms], shadows, within_terms=within)
            # what a site refuses is no news of an order that was tried before
            table += [each.row(name, terms) for each in found if not (within and each.refused)]
            line = "; ".join(
                f"{e.server} {e.what} {e.attack} {e.refused or f'{np.mean(e.scores):.2f}'}"
                for e in found
            )
            print(f"{name}, {terms}, {time.monotonic() - began:.0f} s: {line}", flush=True)
            if options.write:
                how = {"quick": options.quick, "data": options.data, "layers": options.layers}
                how |= {"default_terms": True} if within else {}
                leakage_report.write(table, how | {"seed": options.seed, **SIZES}, list(METHODS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
