"""Critical steps and rewards of PARL."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.swarm.parl import (
    Parl,
    Stage,
    annealed,
    critical_steps,
    finish_reward,
    parallel_reward,
    parallelism,
    total_steps,
)

stage = st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=5).map(
    lambda subs: Stage(tuple(n for n, _ in subs), sum(done for _, done in subs))
)
stages = st.lists(stage, max_size=5)


def test_by_hand() -> None:
    # Three sub-agents at once, then an answer: 1 + max(2, 3, 1), and 1.
    episode = [Stage((2, 3, 1), finished=2), Stage()]
    assert critical_steps(episode) == 5
    assert total_steps(episode) == 8
    assert parallelism(episode) == 1.6
    assert parallel_reward(episode, wanted=4) == 0.75
    assert finish_reward(episode) == pytest.approx(2 / 3)
    parl = Parl(parallel_weight=0.4, finish_weight=0.3, anneal_until=0.5, wanted=4)
    assert parl.reward(0.5, episode, progress=0) == pytest.approx(0.5 + 0.4 * 0.75 + 0.3 * 2 / 3)
    assert parl.reward(0.5, episode, progress=0.25) == pytest.approx(0.5 + 0.2 * 0.75 + 0.1)
    assert parl.reward(0.5, episode, progress=0.5) == 0.5


@given(stages, st.randoms())
def test_critical_steps(episode: list[Stage], rng: object) -> None:
    critical, total = critical_steps(episode), total_steps(episode)
    assert len(episode) <= critical <= total
    assert parallelism(episode) >= 1
    # The same work one after another takes all steps.
    serial = [Stage((n,)) for s in episode for n in s.sub_steps] + [Stage(main_steps=0)]
    own = sum(s.main_steps for s in episode)
    assert critical_steps(serial) - sum(s.main_steps for s in serial) + own == total
    # Neither the order of stages nor of sub-agents matters.
    turned = [Stage(s.sub_steps[::-1], s.finished) for s in episode[::-1]]
    assert critical_steps(turned) == critical


@given(stages, stage, st.integers(1, 20))
def test_rewards_are_in_their_range_and_monotone(
    episode: list[Stage], more: Stage, wanted: int
) -> None:
    assert 0 <= parallel_reward(episode, wanted) <= parallel_reward([*episode, more], wanted) <= 1
    assert 0 <= finish_reward(episode) <= 1
    all_finished = [Stage(s.sub_steps, len(s.sub_steps)) for s in episode]
    assert finish_reward(all_finished) == any(s.sub_steps for s in episode)


@given(st.floats(0, 1), stages, st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 1))
def test_auxiliary_rewards_are_annealed(
    performance: float, episode: list[Stage], first: float, second: float, end: float
) -> None:
    parl = Parl(anneal_until=end)
    early, late = sorted((first, second))
    assert parl.reward(performance, episode, early) >= parl.reward(performance, episode, late)
    assert parl.reward(performance, episode, max(end, late)) == performance
    off = Parl(parallel_weight=0, finish_weight=0)
    assert off.reward(performance, episode, early) == performance
    constant = Parl(anneal_until=math.inf)
    assert constant.reward(0, episode, early) == constant.reward(0, episode, late)


def test_annealing_is_linear() -> None:
    assert [annealed(0.4, p, 0.5) for p in (0, 0.25, 0.5, 1)] == [0.4, 0.2, 0, 0]


@pytest.mark.parametrize(
    "setting",
    [
        *({"parallel_weight": -1.0}, {"finish_weight": math.nan}, {"anneal_until": 0.0}),
        *({"anneal_until": math.nan}, {"wanted": 0}),
    ],
)
def test_bad_settings(setting: dict[str, float]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        Parl(**setting)  # type: ignore[arg-type]
