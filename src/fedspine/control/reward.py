"""What came of a round's plans, and what the server learns from it: rewards, bandits, and how fast devices are.

FedSpine (reconstructed), section 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedspine.control.bandit import Bandit, credit, ratio_reward, reward, update_scale
from fedspine.control.controllers import ChoiceFields
from fedspine.control.device_model import Learnt, Pupil, pupil
from fedspine.control.latency_model import observe
from fedspine.control.plan import Plan


@dataclass(frozen=True)
class Outcome:
    """What a plan took and brought: seconds, the drop in loss (None while unknown), the adapter's change.

    `importance` is the size of that change against the weights, `effective_rank` over how many directions it spreads;
    `load` the operations over those of batches of full-length texts.
    """

    plan: Plan
    seconds: float
    gain: float | None
    importance: float
    effective_rank: float
    load: float = 1.0


def rewards(
    how: ChoiceFields, outcomes: Mapping[str, Outcome], gain_scale: float | None
) -> tuple[dict[str, float], float | None]:
    """The reward of every device that had a choice and whose gain is known, and the new scale of gains."""
    mean_seconds = float(np.mean([outcome.seconds for outcome in outcomes.values()]))
    largest = max(outcome.importance for outcome in outcomes.values()) or 1.0
    gains = {id: outcome.gain for id, outcome in outcomes.items() if outcome.gain is not None}
    gain_scale = update_scale(gain_scale, gains.values())
    earned = {}
    for id, gain in gains.items():
        outcome = outcomes[id]
        if outcome.plan.action is None or gain_scale is None:
            continue
        if how.reward == "ratio":
            earned[id] = ratio_reward(gain=gain, seconds=outcome.seconds, mean_seconds=mean_seconds)
        else:
            earned[id] = reward(
                gain=gain,
                scale=gain_scale,
                progress=outcome.plan.progress,
                importance=outcome.importance / largest,
                lateness=abs(outcome.seconds - mean_seconds) / mean_seconds,
                weights=how.weights,
            )
    return earned, gain_scale


def learn(
    how: ChoiceFields, learnt: Learnt, outcomes: Mapping[str, Outcome], earned: Mapping[str, float]
) -> dict[str, Bandit | Pupil]:
    """What is known of the devices of this round after it, as far as the settings ask for it."""
    known: dict[str, Bandit | Pupil] = {}
    for id, outcome in outcomes.items():
        before = pupil(learnt, id)
        bandit, action = before.bandit, outcome.plan.action
        if how.choice == "bandit" and id in earned and action is not None:
            u, v = action
            bandit = credit(
                bandit,
                u,
                v,
                earned[id],
                discount=how.discount,
                split_at=how.split_at,
                deepest=how.deepest,
            )
        if follows_times(how):
            known[id] = Pupil(
                bandit=bandit, evidence=_timed(how, before, outcome), load=outcome.load
            )
        elif bandit is not before.bandit:
            known[id] = bandit
    return known


def follows_times(how: ChoiceFields) -> bool:
    """Whether the settings ask for how fast devices are."""
    return how.choice in ("deadline", "oracle") or (how.choice == "bandit" and how.pooled > 0)


def _timed(how: ChoiceFields, before: Pupil, outcome: Outcome) -> np.ndarray:
    return observe(
        before.evidence,
        sparsity=outcome.plan.reached,
        rank=outcome.plan.rank / how.ranks[-1],
        seconds=outcome.seconds,
        discount=how.discount,
    )
