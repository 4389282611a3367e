"""Schedules and exact counts: laws over arbitrary layers, and the shapes of models people use."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedspine.control.plan import cubic_floor
from fedspine.control.sparsity import (
    LayerShape,
    counts,
    final_counts,
    highest,
    layer_targets,
)
from fedspine.core.errors import BadInput

MINILM = LayerShape(heads=12, channels=1536, head_parameters=49_152, channel_parameters=768)
ROBERTA = LayerShape(heads=12, channels=3072, head_parameters=196_608, channel_parameters=1536)
STORIES = LayerShape(heads=4, channels=172, head_parameters=3072, channel_parameters=192)
LLAMA_7B = LayerShape(
    heads=32, channels=11_008, head_parameters=2_097_152, channel_parameters=12_288
)
# a key-value unit: 7 query heads in q and o, one key and one value head, each 64 x 896
QWEN2 = LayerShape(
    heads=2, channels=4864, head_parameters=(2 * 7 + 2) * 64 * 896, channel_parameters=3 * 896
)
MODELS = {
    "minilm": MINILM,
    "roberta": ROBERTA,
    "stories": STORIES,
    "llama-7b": LLAMA_7B,
    "qwen2": QWEN2,
}

shapes = st.builds(
    LayerShape,
    heads=st.integers(1, 40),
    channels=st.integers(1, 5000),
    head_parameters=st.integers(1, 10**6),
    channel_parameters=st.integers(1, 10**4),
) | st.sampled_from(sorted(MODELS.values(), key=lambda shape: shape.parameters))


def tolerance(shape: LayerShape) -> float:
    """A quarter of a percent, or half a channel if that is more; a billionth for rounding."""
    return max(0.0025, shape.channel_parameters / shape.parameters / 2) + 1e-8


def reachable(shape: LayerShape, target: float) -> tuple[int, int]:
    try:
        return final_counts(shape, target)
    except BadInput:
        assume(False)
        raise


@pytest.mark.parametrize("target", [0.05, 0.1, 0.2, 0.3, 0.3429, 0.5, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_end_within_a_quarter_percent(name, target):
    shape = MODELS[name]
    assert abs(shape.sparsity(*final_counts(shape, target)) - target) <= 0.0025


@given(shapes, st.floats(0, 1))
def test_any_layer_ends_within_its_tolerance_or_is_refused(shape, target):
    assert abs(shape.sparsity(*reachable(shape, target)) - target) <= tolerance(shape)


@given(shapes, st.floats(0, 1))
def test_a_layer_keeps_one_head_and_one_channel(shape, target):
    heads, channels = reachable(shape, target)
    assert 0 <= heads < shape.heads and 0 <= channels < shape.channels


@given(shapes, st.floats(0.01, 0.99), st.lists(st.floats(0, 1), max_size=12))
def test_any_path_rises_to_the_final_counts(shape, target, parts):
    final = reachable(shape, target)
    dropped = (0, 0)
    for sparsity in [*sorted(part * target for part in parts), target]:
        heads, channels = counts(shape, sparsity, target=target, dropped=dropped)
        assert dropped[0] <= heads <= final[0] and dropped[1] <= channels <= final[1]
        # heads are whole, so on the way a layer may be one head off
        slack = shape.head_parameters / shape.parameters + tolerance(shape)
        assert abs(shape.sparsity(heads, channels) - sparsity) <= slack
        dropped = heads, channels
    assert dropped == final


@given(shapes, st.floats(0, 1))
def test_floors_give_way_only_when_they_must(shape, target):
    heads, channels = reachable(shape, target)
    floor_heads, floor_channels = (
        max(shape.heads - 2, 0),
        shape.channels - max(-(-shape.channels // 4), 1),
    )
    if channels > floor_channels:
        with_floors = shape.sparsity(min(heads, floor_heads), floor_channels)
        assert target - with_floors > tolerance(shape) - 1e-7
    if heads > floor_heads:
        assert target - shape.sparsity(floor_heads, shape.channels - 1) > tolerance(shape) - 1e-7


@given(shapes, st.floats(0, 1))
def test_kept_channels_are_a_multiple_where_that_is_cheap(shape, target):
    _, channels = reachable(shape, target)
    cheap = 8 * shape.channel_parameters / shape.parameters <= 0.005
    untouched = channels in (0, shape.channels - -(-shape.channels // 4), shape.channels - 1)
    assert untouched or not cheap or (shape.channels - channels) % 8 == 0


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        (MINILM, 0.5, (6, 768)),
        # floor(3.6) heads; 0.3 * 1769472 - 3 * 49152 = 383386 = 499.2 channels; 1036.8 kept -> 1040
        # = 130 * 8
        (MINILM, 0.3, (3, 496)),
        # two heads are kept; 0.9 * 1769472 - 10 * 49152 = 1433.6 channels, so 102.4 -> 104 kept,
        # below the quarter
        (MINILM, 0.9, (10, 1432)),
        # 10 heads and 1535 channels are 0.944; one head more, then 0.96 * 1769472 - 11 * 49152 =
        # 1507.8; 28.2 -> 32 kept
        (MINILM, 0.96, (11, 1504)),
        # no head goes, as two are kept; 0.5 * 14909440 / 2688 = 2773.4; 2090.6 -> 2088 kept
        (QWEN2, 0.5, (0, 2776)),
        # all channels but one are 0.877: a head must go; (0.9 * 14909440 - 917504) / 2688 = 4650.7;
        # 213.3 -> 216 kept
        (QWEN2, 0.9, (1, 4648)),
        (MINILM, 0.0, (0, 0)),
    ],
)
def test_final_counts_by_hand(shape, target, expected):
    assert final_counts(shape, target) == expected


def test_what_is_dropped_stays_dropped():
    assert counts(MINILM, 0.1, target=0.5, dropped=(4, 400)) == (4, 400)
    assert counts(MINILM, 0.5, target=0.5, dropped=(7, 700)) == (7, 768)


@pytest.mark.parametrize("target", [0.975, 1.0, -0.1, float("nan")])
def test_targets_out_of_reach_say_the_highest(target):
    assert highest(MINILM) == pytest.approx(1 - (49152 + 768) / 1769472, abs=1e-15)
    with pytest.raises(BadInput, match=r"\[0, 0.971\]"):
        counts(MINILM, 0.5, target=target)


def test_targets_between_two_counts_of_heavy_heads_are_refused():
    heavy = LayerShape(heads=4, channels=100, head_parameters=225, channel_parameters=1)
    # two heads and 99 channels are 0.549, three heads 0.675
    with pytest.raises(BadInput, match=r"between 0.5490 and 0.6750"):
        final_counts(heavy, 0.6)


def test_cubic_floor_by_hand():
    # 100 rounds: starts at 5, ends at 70; at round 18, x = 0.2 and 0.8 * 0.5 * (1 - 0.8**3) =
    # 0.1952
    expected = {0: 0.0, 4: 0.0, 5: 0.0, 18: 0.1952, 69: 0.4 * (1 - (1 / 65) ** 3), 70: 0.5, 99: 0.5}
    assert {r: cubic_floor(r, 100, 0.5) for r in expected} == pytest.approx(expected)
    assert cubic_floor(0, 1, 0.5) == 0.0


@given(
    st.integers(2, 300), st.floats(0, 0.99), st.floats(0, 0.4), st.floats(0.5, 1), st.floats(0, 1)
)
def test_cubic_floor_rises_from_nothing_to_the_target(rounds, target, warmup, until, share):
    path = [
        cubic_floor(r, rounds, target, warmup=warmup, until=until, share=share)
        for r in range(rounds)
    ]
    assert path == sorted(path) and path[0] == 0.0 and path[-1] == target
    assert all(value == 0.0 for r, value in enumerate(path[:-1]) if r < warmup * rounds)
    assert all(value == target for r, value in enumerate(path) if r >= until * rounds)


@pytest.mark.parametrize(
    "wrong", [{"warmup": 0.7}, {"until": 1.1}, {"warmup": -0.1}, {"share": 1.1}, {"target": 1.0}]
)
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(BadInput):
        cubic_floor(3, 10, **{"target": 0.5, **wrong})


@given(st.integers(1, 60), st.integers(0, 5), st.integers(0, 5), st.floats(0, 1))
def test_layer_targets_keep_the_mean(layers, first, last, target):
    try:
        targets = layer_targets(layers, target, protect_first=first, protect_last=last)
    except BadInput:
        assert first + last > layers or target * layers > 0.999 * (layers - first - last) - 1e-9
        return
    assert len(targets) == layers and sum(targets) / layers == pytest.approx(target)
    assert not any(targets[:first]) and not any(targets[layers - last :])


def test_layer_targets_of_llama():
    targets = layer_targets(32, 0.30, protect_first=3, protect_last=1)
    assert targets == pytest.approx([0.0] * 3 + [0.30 * 32 / 28] * 28 + [0.0])
