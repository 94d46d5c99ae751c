from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import crisp_attention as crisp
from crisp_attention.schedule import KINDS

shares = st.floats(0, 1)
sparsities = st.floats(0, 0.99)


@pytest.mark.parametrize(
    ("settings", "progress", "expected"),
    [
        ({"kind": "constant"}, 0.0, 0.8),
        ({"kind": "constant"}, 1.0, 0.8),
        ({"kind": "linear"}, 0.0, 0.0),
        ({"kind": "linear"}, 0.25, 0.2),
        ({"kind": "linear"}, 1.0, 0.8),
        ({"kind": "linear", "begin": 0.2, "end": 0.6, "initial": 0.4}, 0.1, 0.4),
        ({"kind": "linear", "begin": 0.2, "end": 0.6, "initial": 0.4}, 0.3, 0.5),
        ({"kind": "linear", "begin": 0.2, "end": 0.6, "initial": 0.4}, 0.9, 0.8),
        # Zhu & Gupta: s_f + (s_i - s_f) (1 - t)^3
        ({"kind": "cubic", "end": 0.5}, 0.25, 0.8 - 0.8 * 0.5**3),
        ({"kind": "cubic", "end": 0.5}, 0.5, 0.8),
        ({"kind": "cubic", "initial": 0.2}, 0.9, 0.8 - 0.6 * 0.1**3),
        ({"kind": "anneal"}, 0.0, 0.8),
        ({"kind": "anneal"}, 0.75, 0.2),
        ({"kind": "anneal"}, 1.0, 0.0),
        ({"kind": "anneal", "begin": 0.5, "final": 0.4}, 0.75, 0.6),
        ({"kind": "stochastic", "begin": 0.2, "low": 0.3}, 0.1, 0.3),
        ({"kind": "stochastic", "end": 0.9}, 0.9, 0.8),
    ],
)
def test_values_by_hand(settings, progress, expected):
    assert crisp.Schedule(**settings).sparsity(0.8, progress) == pytest.approx(expected, abs=1e-15)


@given(kind=st.sampled_from(["linear", "cubic"]), target=sparsities, other=sparsities, ends=st.tuples(shares, shares))
def test_ramps_have_exact_ends_and_never_turn(kind, target, other, ends):
    begin, end = sorted(ends)
    ramp = crisp.Schedule(kind, begin=begin, end=end, initial=other)
    if begin < end:
        assert ramp.sparsity(target, 0.0) == ramp.sparsity(target, begin) == other
    assert ramp.sparsity(target, end) == ramp.sparsity(target, 1.0) == target
    values = [ramp.sparsity(target, progress) for progress in np.linspace(0, 1, 41)]
    assert min(other, target) - 1e-12 <= min(values) <= max(values) <= max(other, target) + 1e-12
    assert (np.diff(values) * np.sign(target - other) >= -1e-12).all()


@given(target=sparsities, final=sparsities, ends=st.tuples(shares, shares))
def test_anneal_is_a_line_from_the_target_to_its_final_sparsity(target, final, ends):
    begin, end = sorted(ends)
    ramp = crisp.Schedule("anneal", begin=begin, end=end, final=final)
    mirrored = crisp.Schedule("linear", begin=begin, end=end, initial=target)
    for progress in np.linspace(0, 1, 21):
        assert ramp.sparsity(target, progress) == pytest.approx(mirrored.sparsity(final, progress), abs=1e-12)


def test_cubic_is_fast_at_first():
    cubic, linear = crisp.Schedule("cubic"), crisp.Schedule("linear")
    assert all(cubic.sparsity(0.8, share) > linear.sparsity(0.8, share) for share in (0.1, 0.5, 0.9))


def test_begin_equal_to_end_is_a_step():
    step = crisp.Schedule("linear", begin=0.5, end=0.5)
    assert [step.sparsity(0.8, share) for share in (0.0, 0.499, 0.5, 1.0)] == [0.0, 0.0, 0.8, 0.8]


def test_stochastic_is_uniform_between_low_and_the_target():
    schedule = crisp.Schedule("stochastic", low=0.2)
    draws = np.array([schedule.sparsity(0.8, step / 4000) for step in range(4000)])
    assert draws.min() >= 0.2
    assert draws.max() <= 0.8
    # Kolmogorov-Smirnov distance to the uniform distribution; 1.63 / sqrt(n) is its 1% quantile.
    ranks = np.arange(1, 4001) / 4000
    distance = np.abs(np.sort((draws - 0.2) / 0.6) - ranks).max()
    assert distance < 1.63 / 4000**0.5
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.05  # a step tells nothing of the next


def test_stochastic_is_a_pure_function_of_progress():
    import random

    schedule = crisp.Schedule("stochastic", low=0.2, seed=3)
    order = [0.7, 0.1, 0.4, 0.1]
    random.seed(0)
    before = random.getstate()
    values = {share: schedule.sparsity(0.8, share) for share in order}
    assert values == {share: crisp.Schedule("stochastic", low=0.2, seed=3).sparsity(0.8, share) for share in set(order)}
    assert len(set(values.values())) == 3
    assert crisp.Schedule("stochastic", low=0.2, seed=4).sparsity(0.8, 0.7) != values[0.7]
    assert random.getstate() == before  # nobody else's stream is touched
    code = "import crisp_attention as c; print(repr(c.Schedule('stochastic', low=0.2, seed=3).sparsity(0.8, 0.7)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == values[0.7]  # in another process too, whatever its hash seed


def test_draws_of_old_records_stay_what_they_were():
    """Frozen: a change would make a resumed run differ from the one that it resumes."""
    schedule = crisp.Schedule("stochastic", low=0.2)
    assert [round(schedule.sparsity(0.8, share), 6) for share in (0.0, 0.25, 1 / 3)] == [0.773419, 0.6799, 0.522543]


def test_stagger_delays_the_later_layers():
    schedule = crisp.Schedule("linear", end=0.5, stagger=0.5)
    first, middle, last = (
        [schedule.sparsity(0.8, share, depth) for share in (0.25, 0.5, 1.0)] for depth in (0, 0.5, 1)
    )
    assert first == pytest.approx([0.4, 0.8, 0.8])
    assert middle == pytest.approx([0.0, 0.4, 0.8])
    assert last == pytest.approx([0.0, 0.0, 0.8])


def test_a_negative_stagger_lets_the_last_layer_begin():
    forward, backward = (crisp.Schedule("cubic", begin=0.1, end=0.6, stagger=sign * 0.3) for sign in (1, -1))
    for depth in (0.0, 0.3, 1.0):
        for progress in (0.1, 0.3, 0.6, 0.9):
            mirrored = forward.sparsity(0.8, progress, 1.0 - depth)
            assert backward.sparsity(0.8, progress, depth) == pytest.approx(mirrored, abs=1e-12)
    assert backward.sparsity(0.8, 0.3, 1.0) > backward.sparsity(0.8, 0.3, 0.0) == 0.0


def test_end_and_stagger_may_fill_training_to_the_last_step():
    for part in range(101):
        schedule = crisp.Schedule("linear", end=part / 100, stagger=(100 - part) / 100)
        assert schedule.sparsity(0.8, 1.0, depth=1.0) == 0.8


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_round_trips_through_json(kind):
    given = {name: 0.25 for name in KINDS[kind] if name != "seed"}
    for schedule in (crisp.Schedule(kind), crisp.Schedule(kind, **given)):
        assert crisp.Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
        config = crisp.SparsityConfig(sparsity=0.8, schedule=schedule)
        assert crisp.SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config == crisp.SparsityConfig(sparsity=0.8, schedule=schedule.to_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cosine"}, "Unknown schedule kind 'cosine'. .*Valid: anneal, constant, cubic, linear, stochastic"),
        ({"kind": "cubical"}, "Did you mean 'cubic'"),
        ({"kind": "cubic", "ends": 0.5}, "Unknown schedule setting 'ends'. Did you mean 'end'"),
        ({"kind": "cubic", "begin": 0.6, "end": 0.5}, "begin=0.6 lies after end=0.5.*Choose begin <= 0.5"),
        ({"kind": "cubic", "end": 1.5}, "schedule end is a share of training.*got 1.5. Divide a step by the number"),
        ({"kind": "cubic", "begin": 100}, "schedule begin is a share of training.*got 100"),
        (
            {"kind": "cubic", "end": 0.8, "stagger": 0.3},
            "latest ramp would end at 1.1, past the end of training.*most 1",
        ),
        ({"kind": "cubic", "end": 0.8, "stagger": -0.3}, "latest ramp would end at 1.1, past the end of training"),
        ({"kind": "cubic", "stagger": 0.1}, "end=1 and stagger=0.1"),
        ({"kind": "constant", "end": 0.5}, "Schedule 'constant' would ignore end=0.5; it is read by: anneal, cubic"),
        ({"kind": "cubic", "final": 0.5}, "Schedule 'cubic' would ignore final=0.5; it is read by: anneal"),
        ({"kind": "anneal", "initial": 0.5}, "would ignore initial=0.5; it is read by: cubic, linear"),
        ({"kind": "cubic", "seed": 1}, "would ignore seed=1; it is read by: stochastic"),
        ({"kind": "stochastic", "stagger": 0.1}, "would ignore stagger=0.1"),
        ({"kind": "stochastic", "low": 1.0}, r"schedule low must be in \[0, 1\)"),
        ({"kind": "stochastic", "seed": -1}, "schedule seed must be an integer >= 0"),
        ({"kind": "linear", "initial": "0.5"}, "schedule initial must be a finite number, got '0.5'"),
        ("cubic", "Expected a mapping of schedule settings, got str"),
    ],
)
def test_bad_schedules_are_refused_by_name(settings, message):
    with pytest.raises(crisp.ConfigurationError, match=message):
        crisp.SparsityConfig(sparsity=0.8, schedule=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "top_p", "p": 0.5}, "A schedule moves the sparsity, which rule 'top_p' is not set by"),
        ({"rule": "entmax15"}, "A schedule moves the sparsity, which rule 'entmax15'"),
        ({"rule": "window", "window": 4}, "A schedule moves the sparsity, which rule 'window' is not set by here"),
        ({"sparsity": 0.0}, "the sparsity, which is 0 here.*kind='anneal' to end dense"),
        ({"layer_sparsity": [0.0, 0.0]}, "the sparsity, which is 0 here"),
    ],
)
def test_a_schedule_needs_a_sparsity_to_move(settings, message):
    with pytest.raises(crisp.ConfigurationError, match=message):
        crisp.SparsityConfig(schedule={"kind": "linear", "initial": 0.5}, **settings)


def test_the_range_of_a_stochastic_schedule_ends_at_the_sparsity():
    low = {"kind": "stochastic", "low": 0.5}
    with pytest.raises(crisp.ConfigurationError, match=r"from the sparsity 0.4 down to final=0.5, which is higher"):
        crisp.SparsityConfig(sparsity=0.4, schedule={"kind": "anneal", "final": 0.5})
    with pytest.raises(crisp.ConfigurationError, match=r"between low=0.5 and the sparsity 0.4, which is smaller"):
        crisp.SparsityConfig(sparsity=0.4, schedule=low)
    with pytest.raises(crisp.ConfigurationError, match=r"the sparsity 0\.3"):
        crisp.SparsityConfig(layer_sparsity=[0.8, 0.3], schedule=low)
    crisp.SparsityConfig(layer_sparsity=[0.8, 0.0], schedule=low)  # the dense layer draws nothing


@pytest.mark.parametrize("progress", [-0.1, 1.0001, 37, "0.5", float("nan"), True, None])
def test_progress_is_a_share(progress):
    with pytest.raises(crisp.ConfigurationError, match="progress"):
        crisp.Schedule("linear").sparsity(0.8, progress)


def test_a_step_in_place_of_a_share_is_told_what_to_do():
    with pytest.raises(
        crisp.ConfigurationError, match=r"got 37. Give step / total_steps, and 1.0 from the last step on"
    ):
        crisp.Schedule("linear").sparsity(0.8, 37)
