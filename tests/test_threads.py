"The choice between one thread and two, by clocks that the test winds."
import warnings

import pytest
import torch

from bdam_repro.config import make_config
from bdam_repro.model import build_model, dual
from bdam_repro.threads import LoadWatch, SecondThread


class Clocks:
    "Time by the clock and of the processor, in seconds, as a step of each kind takes them."
    def __init__(self): self.seconds = self.cost = 0.

    def watch(self, window=4):
        return LoadWatch(window, clock=lambda: self.seconds, processor=lambda: self.cost)

    def run(self, watch, steps, two, one):
        "What was used in each of the steps."
        used = []
        for _ in range(steps):
            used.append(watch.step())
            seconds, cost = two if used[-1] else one
            self.seconds, self.cost = self.seconds + seconds, self.cost + cost
        return used


def test_a_quiet_machine_keeps_two_threads():
    clocks = Clocks()
    assert all(clocks.run(clocks.watch(), 200, two=(1, 2), one=(2, 2)))


def test_a_fair_share_is_no_loss():
    "Others take half of the cores: twice as long by the clock, the same processor time."
    clocks = Clocks()
    watch = clocks.watch()
    assert all(clocks.run(watch, 50, two=(1, 2), one=(2, 2)))
    assert all(clocks.run(watch, 50, two=(2, 2.3), one=(3, 2)))


def test_under_load_the_quicker_way_stays():
    clocks = Clocks()
    watch = clocks.watch()
    clocks.run(watch, 20, two=(1, 2), one=(2, 2))
    with pytest.warns(UserWarning, match='quicker with one thread') as said:
        used = clocks.run(watch, 100, two=(6, 3), one=(4, 2))
    assert not any(used[20:]) and len(said) == 1


def test_a_trial_that_fails_is_not_repeated_at_the_same_load():
    clocks = Clocks()
    watch = clocks.watch()
    clocks.run(watch, 20, two=(1, 2), one=(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        used = clocks.run(watch, 100, two=(3, 3), one=(4, 2))
    assert used.count(False) <= 6 and all(used[20:])


def test_one_slow_step_is_no_reason():
    "A validation or a checkpoint between two steps: the median does not see it."
    clocks = Clocks()
    watch = clocks.watch(5)
    for _ in range(20):
        assert all(clocks.run(watch, 5, two=(1, 2), one=(2, 2)))
        assert all(clocks.run(watch, 1, two=(90, 180), one=(2, 2)))


def test_the_gradients_are_the_same_whichever_way_it_changes():
    "Two threads, then one, then two: features and gradients to the bit."
    torch.manual_seed(0)
    c = make_config('synth', 'smoke')
    model = build_model(c, 100).train()
    images = torch.randint(0, 256, (4, 3, c.image_height, c.image_width), dtype=torch.uint8)
    ids, mask = torch.randint(5, 100, (4, 7)), torch.ones(4, 7, dtype=torch.bool)
    second, found = SecondThread(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for two in (True, False, True):
        second.watch.two, model.second = two, second
        model.zero_grad()
        out = model(images, torch.arange(4)//2, (ids, mask), identity=(ids, mask), clothing=(ids, mask))
        dual(out.caption, out.image).diagonal().sum().backward()
        second.join()
        done = second.start(lambda: 7)
        assert done.result() == 7
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.set_num_threads(threads)
    assert len(found[0]) > 5
    for other in found[1:]: assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
