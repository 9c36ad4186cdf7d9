"GradNorm: the closed form, the sum and the clip, resuming, several processes, losses that take no part."

import copy
import io
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bdam_repro import gradnorm as gnm
from bdam_repro.config import UserError
from bdam_repro.gradnorm import GradNorm, TaskWeights

NAMES = ['a', 'b', 'c']


def setup(seed=0, scales=(1.0, 50.0, 0.02), dtype=torch.float64):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    x, y = torch.randn(9, 6, dtype=dtype), torch.randn(3, 9, 4, dtype=dtype)
    return net, lambda: {k: c * (net(x) - t).square().mean() for k, c, t in zip(NAMES, scales, y)}


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.floats(1e-3, 5), min_size=3, max_size=3),
    st.lists(st.floats(0.05, 3), min_size=3, max_size=3),
    st.sampled_from([0.0, 0.12, 1.5]),
    st.sampled_from(['mean', 'first']),
)
def test_closed_form_is_the_double_backward(seed, w, ratio, alpha, ref):
    net, losses = setup(seed)
    params, L = list(net[-1].parameters()), list(losses().values())
    w = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor(ratio, dtype=torch.float64)
    G = []
    for k in range(3):
        grads = torch.autograd.grad(w[k] * L[k], params, create_graph=True)
        G.append(sum(g.square().sum() for g in grads).sqrt())
    G = torch.stack(G)
    target = (ratio / ratio.mean()) ** alpha * (G.mean() if ref == 'mean' else G[0]).detach()
    if ((G - target).abs() < 1e-9 * G).any(): return  # on the kink any sign will do
    double = torch.autograd.grad((G - target).abs().sum(), w)[0]
    g = torch.stack([gnm.grad_vector(loss, params).norm() for loss in L])
    closed = gnm.gradnorm_gradient(w.detach(), g, ratio, alpha, ref)
    assert torch.allclose(closed, double, rtol=1e-12, atol=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-12, 1e6), min_size=1, max_size=8))
def test_to_sum_keeps_sum_clip_and_order(w):
    w = torch.tensor(w, dtype=torch.float64)
    out = gnm.to_sum(w, len(w))
    assert out.sum().item() == pytest.approx(len(w), rel=1e-9)
    assert (out >= 1e-4 * (1 - 1e-9)).all() and (out <= 10).all()
    assert (out[w.argsort()].diff() >= -1e-12).all()


@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
@pytest.mark.parametrize('scales', [(1, 1, 1), (1, 1e4, 1e-4), (1e-20, 1, 1e6)])
def test_sum_and_clip_hold_all_along(scales, optimizer):
    net, losses = setup(scales=scales)
    gn = GradNorm(NAMES, every=1, lr=0.3, optimizer=optimizer)
    for _ in range(60):
        assert gn.step(losses(), list(net[-1].parameters()))
        w = list(gn.weights.values())
        assert sum(w) == pytest.approx(3, rel=1e-9) and min(w) >= 1e-4 * (1 - 1e-9) and max(w) <= 10


def test_without_renormalization_only_the_clip_holds():
    net, losses = setup(scales=(1, 1e4, 1e4))
    gn = GradNorm(NAMES, every=1, lr=1.0, renormalize=False, clip=(0.5, 1.25))
    for _ in range(30): gn.step(losses(), list(net[-1].parameters()))
    w = list(gn.weights.values())
    assert min(w) == pytest.approx(0.5) and max(w) <= 1.25 + 1e-12 and abs(sum(w) - 3) > 0.1


def test_weights_move_towards_equal_gradient_norms():
    net, losses = setup()
    gn = GradNorm(NAMES, every=1, lr=0.05, log_reg=0)
    params = list(net[-1].parameters())
    for _ in range(400): gn.step(losses(), params)  # the network stands still: every ratio is 1
    G = [gn.weights[k] * gn.norms[k] for k in NAMES]
    assert max(G) / min(G) < 1.5 < max(gn.norms.values()) / min(gn.norms.values())


def test_a_task_that_lags_behind_gets_more():
    W = torch.ones(4, dtype=torch.float64, requires_grad=True)
    equal = [('a', 1.0), ('b', 1.0)]
    gn = GradNorm(['a', 'b'], every=1, ema=0, eps=0)
    for fall in (1.0, 0.7, 0.4):  # equal gradients throughout; the loss of b falls
        gn.step({k: c * W.sum() + (0 if k == 'a' else 4 * (fall - 1)) for k, c in equal}, [W])
    assert gn.weights['a'] > 1 > gn.weights['b']


def test_acts_on_every_kth_call_beginning_with_the_first():
    net, losses = setup()
    gn = GradNorm(NAMES, every=4)
    params = list(net[-1].parameters())
    acted = [gn.step(losses(), params) for _ in range(9)]
    assert acted == [True, False, False, False, True, False, False, False, True]


def test_step_leaves_network_gradients_and_graph_alone():
    net, losses = setup()
    now = losses()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    gn = GradNorm(NAMES)
    gn.step(now, list(net[-1].parameters()))
    assert (net[0].weight.grad == 1).all() and net[-1].weight.grad is None
    gn.total(now).backward()  # the graph is still there
    assert net[-1].weight.grad.abs().sum() > 0


def test_total_is_the_weighted_sum_and_its_gradient():
    net, losses = setup()
    tw = TaskWeights(NAMES, {'a': 2.0, 'c': 0.25})
    now = losses()
    got = torch.autograd.grad(tw.total(now), net[-1].weight, retain_graph=True)[0]
    alone = {k: torch.autograd.grad(v, net[-1].weight, retain_graph=True)[0] for k, v in now.items()}
    want = 2 * alone['a'] + alone['b'] + 0.25 * alone['c']
    assert torch.allclose(got, want, rtol=1e-12)
    assert tw.step(now, [net[-1].weight]) is False
    assert tw.weights == pytest.approx({'a': 2, 'b': 1, 'c': 0.25})


@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
def test_resume_is_bit_identical(optimizer):
    def train(n, state=None):
        net, losses = setup(dtype=torch.float32)
        gn, opt = GradNorm(NAMES, every=3, optimizer=optimizer), torch.optim.Adam(net.parameters(), 1e-2)
        if state:
            gn.load_state_dict(state['gn'])
            net.load_state_dict(state['net'])
            opt.load_state_dict(state['opt'])
        log = []
        for _ in range(n):
            now = losses()
            gn.step(now, list(net[-1].parameters()))
            opt.zero_grad()
            gn.total(now).backward()
            opt.step()
            log.append(gn.weights)
        return log, {'gn': gn.state_dict(), 'net': copy.deepcopy(net.state_dict()), 'opt': opt.state_dict()}

    whole, _ = train(25)
    first, state = train(11)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    rest, _ = train(14, torch.load(file, weights_only=True))
    assert first + rest == whole


def test_a_saved_state_does_not_move_with_the_run():
    net, losses = setup()
    gn = GradNorm(NAMES, every=1)
    gn.step(losses(), list(net[-1].parameters()))
    state = gn.state_dict()
    before = copy.deepcopy(state)
    gn.step(losses(), list(net[-1].parameters()))
    assert str(state) == str(before)
    other = GradNorm(NAMES, every=1)
    other.load_state_dict(state)
    other.step(losses(), list(net[-1].parameters()))
    assert str(state) == str(before) and other.weights == gn.weights


# --- several processes --------------------------------------------------------------------------------------


def test_reduce_averages_gradients_before_the_norm():
    net, losses = setup()
    params, now = list(net[-1].parameters()), losses()
    whole = []
    no_gradients = torch.tensor([0.0] * 24 + [1.0, 1.0])
    g, L, here = gnm.measure_tasks(NAMES, now, params, reduce=lambda M: whole.append(M) or M * no_gradients)
    assert (g == 0).all() and here.all()  # opposite gradients on two processes: the mean has no length
    assert L.tolist() == pytest.approx([v.item() for v in now.values()])
    assert whole[0].shape == (3, 5 * 4 + 4 + 2)  # one matrix, one collective


def test_two_processes_agree_with_one_on_the_whole_batch():
    torch.manual_seed(0)
    net = nn.Linear(4, 2).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    params = list(net.parameters())

    def losses(rows):
        d = net(x[rows]) - y[rows]
        return {'a': d.square().mean(), 'b': 7 * d.abs().mean()}

    matrices = []
    for rows in (slice(0, 4), slice(4, 8)):
        gnm.measure_tasks('ab', losses(rows), params, lambda M: matrices.append(M) or M)
    one = GradNorm('ab', every=1)
    two = GradNorm('ab', every=1)
    one.step(losses(slice(0, 8)), params)
    two.step(losses(slice(0, 4)), params, reduce=lambda M: (matrices[0] + matrices[1]) / 2)
    assert one.norms == pytest.approx(two.norms, rel=1e-12)
    assert one.weights == pytest.approx(two.weights, rel=1e-12)


def test_a_task_missing_on_one_process_keeps_the_collective_in_step():
    net, losses = setup()
    params, now = list(net[-1].parameters()), losses()
    shapes, full = [], gnm.measure_tasks(NAMES, now, params)
    part = {k: v for k, v in now.items() if k != 'b'}
    present = []
    gnm.measure_tasks(NAMES, now, params, lambda M: present.append(M) or M)
    mean_of_two = lambda M: shapes.append(M.shape) or (M + present[0]) / 2
    g, L, here = gnm.measure_tasks(NAMES, part, params, mean_of_two)
    assert shapes == [present[0].shape] and here.all()
    assert L.tolist() == pytest.approx(full[1].tolist())  # a loss is averaged over where it was
    assert g[1].item() == pytest.approx(full[0][1].item() / 2)  # over all, as in data-parallel training


# --- losses that do not take part ---------------------------------------------------------------------------


def test_a_loss_that_never_reaches_the_layer_keeps_weight_one_and_is_named():
    net, losses = setup()
    gn = GradNorm([*NAMES, 'gate', 'constant'], every=1)
    elsewhere = torch.ones(3, requires_grad=True)
    params = list(net[-1].parameters())
    with pytest.warns(UserWarning, match='gate, constant'):
        gn.step({**losses(), 'gate': elsewhere.sum(), 'constant': torch.tensor(2.0)}, params)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # said once
        for _ in range(20):
            gn.step({**losses(), 'gate': elsewhere.sum(), 'constant': torch.tensor(2.0)}, params)
    assert gn.weights['gate'] == gn.weights['constant'] == 1
    assert sum(gn.weights.values()) == pytest.approx(5) and gn.weights['b'] < 0.9


def test_a_loss_missing_for_one_step_keeps_its_weight():
    net, losses = setup()
    gn = GradNorm(NAMES, every=1)
    params = list(net[-1].parameters())
    for _ in range(10): gn.step(losses(), params)
    was = gn.weights
    now = losses()
    del now['b']
    assert gn.step(now, params)
    assert gn.weights['b'] == was['b'] != 1 and gn.weights['a'] != was['a']
    assert sum(gn.weights.values()) == pytest.approx(3)
    gn.total(now).backward()


def test_losses_at_zero_do_not_break_the_ratio():
    W = torch.ones(3, dtype=torch.float64, requires_grad=True)
    gn = GradNorm(['hsic', 'nce', 'triplet'], every=1)
    for hsic in (0.0, 1e-4, 1e-9, 0.0):  # starts at zero; a satisfied triplet loss has a zero gradient
        terms = {'hsic': hsic * W.sum(), 'nce': W.square().sum(), 'triplet': torch.relu(W - 2).sum()}
        assert gn.step(terms, [W])
        assert all(0 < w < 3 for w in gn.weights.values())
    assert gn.skipped == 0


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_loss_that_is_not_finite_is_skipped_and_counted(bad):
    net, losses = setup()
    gn = GradNorm(NAMES, every=1)
    params = list(net[-1].parameters())
    gn.step(losses(), params)
    was, state = gn.weights, str(gn.opt.state_dict())
    now = losses()
    now['a'] = now['a'] * bad
    assert not gn.step(now, params)
    assert gn.weights == was and gn.skipped == 1 and str(gn.opt.state_dict()) == state


def test_no_loss_reaches_the_layer():
    gn = GradNorm(['a'], every=1)
    assert not gn.step({'a': torch.tensor(1.0)}, [torch.ones(2, requires_grad=True)])
    assert gn.weights == {'a': 1.0}


def test_half_precision_gradients_survive_with_a_scale():
    W = torch.full((4,), 1.0, requires_grad=True)
    loss = (W.half() * 1e-4).sum().float() * 1e-5  # a gradient of 1e-9 underflows in float16
    assert gnm.grad_vector(loss, [W]).norm() == 0
    assert gnm.grad_vector(loss, [W], scale=2.0**16).norm().item() == pytest.approx(2e-9, rel=0.1)


# --- the literal reading, and mistakes ----------------------------------------------------------------------


def test_literal_total_is_eq_6_and_trains_network_and_weights():
    net, losses = setup()
    params = list(net[-1].parameters())
    s = torch.tensor([0.1, -0.3, 0.2], dtype=torch.float64, requires_grad=True)
    L, first = list(losses().values()), torch.tensor([1.0, 40.0, 0.05], dtype=torch.float64)
    total = gnm.literal_total(L, s, params, first, alpha=1.5, log_reg=1e-3)
    w = s.detach().exp()
    G = w * torch.stack([gnm.grad_vector(v, params).norm() for v in L])
    v = torch.stack(L).detach()
    r = v / first / (v / first).mean()
    want = (w * v).sum() + 1.5 * (G - r * G[0]).abs().sum() + 1e-3 * w.log().square().sum()
    assert total.item() == pytest.approx(want.item(), rel=1e-12)
    total.backward()
    assert s.grad.isfinite().all()
    assert net[0].weight.grad.isfinite().all()
    assert net[0].weight.grad.abs().sum() > 0


def test_literal_gradient_of_s_agrees_with_finite_differences():
    net, losses = setup()
    params, first = list(net[-1].parameters()), torch.tensor([1.0, 40.0, 0.05], dtype=torch.float64)
    s = torch.tensor([0.1, -0.3, 0.2], dtype=torch.float64, requires_grad=True)
    total = lambda s: gnm.literal_total(list(losses().values()), s, params, first)
    assert torch.autograd.gradcheck(total, (s,))


@pytest.mark.parametrize(
    'f',
    [
        lambda: GradNorm([]),
        lambda: GradNorm(['a', 'a']),
        lambda: GradNorm(['a'], ref='median'),
        lambda: GradNorm(['a'], optimizer='lion'),
        lambda: GradNorm(['a'], clip=(2, 10)),
        lambda: GradNorm(['a'], clip=(0, 10)),
        lambda: GradNorm(['a'], every=0),
        lambda: GradNorm(['a'], ema=1.0),
        lambda: TaskWeights(['a'], {'b': 1.0}),
        lambda: TaskWeights(['a'], {'a': -1.0}),
        lambda: TaskWeights(['a']).total({'b': torch.tensor(1.0)}),
        lambda: TaskWeights(['a']).total({}),
        lambda: GradNorm(['a'], every=1).step({'b': torch.ones((), requires_grad=True)}, [torch.ones(1)]),
        lambda: GradNorm(['a', 'b']).load_state_dict(GradNorm(['a']).state_dict()),
    ],
)
def test_mistakes_are_one_clear_line(f):
    with pytest.raises(UserError) as e: f()
    assert '\n' not in str(e.value) and len(str(e.value)) > 20


def test_signs_near_the_target():
    g = torch.tensor([1.0, 1.004, 0.998, 0.998], dtype=torch.float64)
    w = ratio = torch.ones(4, dtype=torch.float64)
    assert gnm.gradnorm_gradient(w, g, ratio).sign().tolist() == [0, 1, -1, -1]  # their mean is 1


def test_the_regularizer_holds_a_task_with_a_tiny_gradient():
    W = torch.ones(2, dtype=torch.float64, requires_grad=True)
    weight = {}
    for log_reg in (0.0, 1e-3):
        gn = GradNorm(['tiny', 'usual'], every=1, log_reg=log_reg, optimizer='adam')
        for _ in range(100): gn.step({'tiny': 1e-5 * W.sum(), 'usual': W.sum()}, [W])
        weight[log_reg] = gn.weights['tiny'] / gn.weights['usual']
    assert weight[0.0] > 1.2 * weight[1e-3]


def test_losses_are_averaged_over_updates():
    W = torch.ones(1, dtype=torch.float64, requires_grad=True)
    gn = GradNorm(['a'], every=1, ema=0.9)
    for value in (2.0, 4.0, 4.0): gn.step({'a': value * W.sum()}, [W])
    assert gn.state_dict()['first'].item() == 2 and gn.state_dict()['mean'].item() == pytest.approx(2.38)


def test_parameters_as_a_generator():
    "`module.parameters()` can be read once; it is taken as a list would be."
    net, losses = setup()
    last = net[-1]
    by_list, by_generator = GradNorm(NAMES), GradNorm(NAMES)
    assert by_list.step(losses(), list(last.parameters())) == by_generator.step(losses(), last.parameters())
    assert torch.equal(by_list.s, by_generator.s)
    kept, by_kept = last.parameters(), GradNorm(NAMES, every=1)
    by_kept.step(losses(), kept)
    with pytest.raises(UserError, match=r'give list\(module.parameters\(\)\)'): by_kept.step(losses(), kept)
    L, w = torch.stack(list(losses().values())), torch.ones(3, dtype=torch.float64, requires_grad=True)
    ways = list(last.parameters()), last.parameters()
    a, b = (gnm.literal_gradnorm(L, w, params, L.detach()) for params in ways)
    assert torch.equal(a, b)
