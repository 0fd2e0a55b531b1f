import math
import pickle

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from meshformer.config.errors import ConfigError
from meshformer.optim import constant, cosine, linear, wsd


def test_cosine_against_the_formula():
    schedule = cosine(max_steps=110, warmup_steps=10, min_ratio=0.1)
    assert [schedule(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    for step in (10, 35, 60, 109):
        assert schedule(step) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2)
    assert schedule(110) == schedule(10_000) == pytest.approx(0.1)


def test_linear_against_the_formula():
    schedule = linear(max_steps=50, warmup_steps=0, min_ratio=0.0)
    assert [schedule(s) for s in (0, 25, 49, 50, 99)] == pytest.approx([1, 0.5, 0.02, 0, 0])


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)])
def test_wsd_is_stable_then_decays(shape, half):
    schedule = wsd(max_steps=100, warmup_steps=10, decay_fraction=0.2, shape=shape)
    assert schedule(4) == 0.5 and all(schedule(s) == 1 for s in range(10, 81))
    assert schedule(90) == pytest.approx(half) and schedule(100) == pytest.approx(0, abs=1e-12)
    tail = [schedule(s) for s in range(80, 101)]
    assert tail == sorted(tail, reverse=True)


def test_constant_only_warms_up():
    schedule = constant(warmup_steps=4)
    assert [schedule(s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_the_last_update_is_not_lost_to_a_rate_of_zero():
    assert all(make(20, 2)(19) > 0 for make in (cosine, linear, wsd))


def test_a_run_shorter_than_its_warm_up_warms_up():
    assert [cosine(2, 100)(s) for s in range(2)] == pytest.approx([0.01, 0.02])
    assert [wsd(2, 100)(s) for s in range(2)] == pytest.approx([0.01, 0.02])


@pytest.mark.parametrize("schedule", [cosine(10, 2), linear(10, 2), wsd(10, 2), constant(10, 2)])
def test_schedules_can_be_pickled(schedule):
    again = pickle.loads(pickle.dumps(schedule))
    assert [again(s) for s in range(12)] == [schedule(s) for s in range(12)]


def rates(schedule, updates, state=None):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = LambdaLR(optimizer, schedule)
    if state is not None:
        scheduler.load_state_dict(state)
    seen = []
    for _ in range(updates):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen, scheduler


def test_lambdalr_uses_step_k_minus_1_for_update_k():
    assert rates(linear(4, 2), 4)[0] == pytest.approx([1.0, 2.0, 2.0, 1.0])


def test_a_resumed_run_follows_its_new_length():
    state = rates(linear(10), 5)[1].state_dict()
    seen, scheduler = rates(linear(20), 2, state)
    assert scheduler.last_epoch == 7
    assert seen[1] == pytest.approx(2.0 * (1 - 6 / 20)), "the checkpoint's max_steps must not come back with the state"


@pytest.mark.parametrize(
    ("make", "settings", "key"),
    [
        (cosine, {"max_steps": 0}, "trainer.max_steps=0"),
        (linear, {"max_steps": 10, "warmup_steps": -1}, "schedule.warmup_steps=-1"),
        (cosine, {"max_steps": 10, "min_ratio": 2}, "schedule.min_ratio=2"),
        (wsd, {"max_steps": 10, "decay_fraction": 1.5}, "schedule.decay_fraction=1.5"),
        (wsd, {"max_steps": 10, "shape": "square"}, "schedule.shape=square"),
    ],
)
def test_impossible_schedules_name_key_and_value(make, settings, key):
    with pytest.raises(ConfigError, match=key):
        make(**settings)
