"Losses against independent float64 oracles, and in the batches that break naive ones."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdam_repro import losses as ls
from bdam_repro.config import UserError

KERNELS = ('linear', 'linear_normalized', 'rbf', 'cka')
POSITIVES = ('diagonal', 'mask', 'multi')

def cross_triplet(x, y, a, p, n): return ls.triplet(x[a], y[p], y[n])


LOSSES = {  # every loss as a function of two feature matrices and labels
    **{f'info_nce_{p}': lambda x, y, i, p=p: ls.info_nce(x, y, 0.02, i, positives=p) for p in POSITIVES},
    **{
        f'triplet_{h}': lambda x, y, i, h=h: ls.triplet(*(x[k] for k in ls.mine_triplets(x, i, h)))
        for h in ('hard', 'random', 'all')
    },
    'triplet_cross': lambda x, y, i: cross_triplet(x, y, *ls.mine_triplets(x, i, others=y)),
    'adversarial': lambda x, y, i: ls.clothing_adversarial(x, y, 0.02),
    'adversarial_ids': lambda x, y, i: ls.clothing_adversarial(x, y, 0.02, clo_ids=i),
    'adversarial_sigmoid': lambda x, y, i: ls.clothing_adversarial(x, y, 0.02, 'sigmoid'),
    'matching': lambda x, y, i: ls.clothing_matching(x, y, 0.02, i),
    'sdm': ls.sdm,
    'tal': ls.tal,
    'gate_half': lambda x, y, i: ls.gate_regularization(torch.sigmoid(100 * x)),
    'match': lambda x, y, i: ls.match_loss(x),
    'gate_entropy': lambda x, y, i: ls.gate_regularization(torch.sigmoid(100 * x), 'entropy'),
    **{f'hsic_{k}': lambda x, y, i, k=k: ls.hsic(x, y, k) for k in KERNELS},
}

R = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
ONE_HOT = torch.eye(8)[:6]
BATCHES = {
    'random': (R, R.flip(0)),
    'identical': (R, R),
    'zero': (R * 0, R * 0),
    'one_zero_row': (R * torch.tensor([0.0, 1, 1, 1, 1, 1])[:, None], R),
    'opposite': (R, -R),
    'constant': (R[:1].repeat(6, 1), R[:1].repeat(6, 1)),
    'one_hot': (ONE_HOT, ONE_HOT),
    'single': (R[:1], R[:1]),
    'pair': (R[:2], R[:2]),
    'large': (R * 1e3, R * 1e3),
    'tiny': (R * 1e-2, R * 1e-2),
}
LABELS = {
    'one_identity': lambda n: torch.zeros(n, dtype=torch.long),
    'all_different': torch.arange,
    'pairs': lambda n: torch.arange(n) // 2,
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('case', BATCHES)
@pytest.mark.parametrize('name', LOSSES)
def test_finite_value_and_gradient_in_degenerate_batches(name, case, dtype):
    # eq. 2's gradient grows with the cube of the features; float16 cannot hold it however it is computed
    if dtype == torch.float16 and case == 'large' and name == 'hsic_linear':
        case = 'random'
    for labels in LABELS.values():
        x, y = (t.to(dtype).clone().requires_grad_() for t in BATCHES[case])
        with torch.autocast('cpu', torch.bfloat16):
            loss = LOSSES[name](x, y, labels(len(x)))
        loss.backward()
        assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite(), (name, case, loss)
        assert x.grad.isfinite().all(), (name, case, x.grad)
        assert y.grad is None or y.grad.isfinite().all()


# the gates' own sigmoid is the test's
@pytest.mark.parametrize('name', [n for n in LOSSES if 'gate' not in n])
def test_half_precision_inputs_are_computed_in_float32(name):
    x, y, i = R.bfloat16(), R.flip(0).bfloat16(), LABELS['pairs'](6)
    torch.manual_seed(0)
    with_float = LOSSES[name](x.float(), y.float(), i)
    torch.manual_seed(0)
    with torch.autocast('cpu', torch.bfloat16):
        half = LOSSES[name](x, y, i)
    assert half.item() == with_float.item()


@pytest.mark.parametrize('name', [n for n in LOSSES if n not in ('triplet_random', 'match')])
def test_order_of_the_batch_does_not_matter(name):
    x, y, i, perm = R.double(), R.flip(0).double() + 0.3, LABELS['pairs'](6), torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = LOSSES[name](x[perm], y[perm], i[perm]).item()
    assert LOSSES[name](x, y, i).item() == pytest.approx(shuffled, rel=1e-12)


@pytest.mark.parametrize('scale', [1e-18, 1e-3, 1e3, 1e15])
@pytest.mark.parametrize(
    'name',
    [
        n
        for n in LOSSES
        if n.split('_')[0] in ('info', 'adversarial', 'matching', 'sdm', 'tal')
        or n in ('hsic_linear_normalized', 'hsic_rbf', 'hsic_cka')
    ],
)
def test_losses_on_directions_do_not_see_lengths(name, scale):
    x, y, i = R.double(), R.flip(0).double() + 0.3, LABELS['pairs'](6)
    unscaled = LOSSES[name](x, y, i).item()
    assert LOSSES[name](x * scale, y * scale, i).item() == pytest.approx(unscaled, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize('tau', [1e-6, 1e-4, 0.01])
@pytest.mark.parametrize(
    'f',
    [
        lambda x, y, t: ls.info_nce(x, y, t),
        lambda x, y, t: ls.clothing_adversarial(x, y, t),
        lambda x, y, t: ls.clothing_adversarial(x, y, t, 'sigmoid'),
        lambda x, y, t: ls.sdm(x, y, torch.arange(6) // 2, t),
        lambda x, y, t: ls.tal(x, y, torch.arange(6) // 2, tau=t),
    ],
    ids=['nce', 'adv', 'adv_sigmoid', 'sdm', 'tal'],
)
def test_very_small_tau(f, tau):
    x = R.clone().requires_grad_()
    loss = f(x, R.flip(0), tau)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_learnable_tau_gets_a_gradient_and_a_floor():
    tau = torch.tensor(0.05, requires_grad=True)
    ls.info_nce(R, R.flip(0), tau).backward()
    assert tau.grad.abs() > 0
    floor = ls.info_nce(R, R.flip(0), ls.TAU_MIN)
    for gone in (-1.0, 0.0, 1e-9):
        assert ls.info_nce(R, R.flip(0), torch.tensor(gone)).item() == pytest.approx(floor.item(), rel=1e-6)


def test_nan_features_are_not_hidden():
    bad = R.clone()
    bad[2, 3] = math.nan
    for name in ('info_nce_multi', 'sdm', 'adversarial', 'hsic_linear', 'hsic_cka'):
        assert LOSSES[name](bad, R, LABELS['pairs'](6)).isnan(), name


# --- oracles: float64 numpy, term by term -------------------------------------------------------------------


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@st.composite
def batches(draw):
    B, D = draw(st.integers(2, 7)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pids = rng.integers(0, draw(st.integers(1, B)), B)
    return (
        rng.normal(size=(B, D)) * draw(st.sampled_from([0.01, 1, 50])),
        rng.normal(size=(B, D)),
        pids,
        draw(st.sampled_from([0.02, 0.1, 1.0])),
    )


def as_torch(*arrays):
    return [torch.from_numpy(a) for a in arrays]


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(POSITIVES), st.booleans())
def test_info_nce_oracle(batch, how, symmetric):
    v, t, pids, tau = batch

    def one_way(s):
        rows = []
        for i in range(len(s)):
            positives = [j for j in range(len(s)) if (pids[j] == pids[i] if how == 'multi' else j == i)]
            others = [j for j in range(len(s)) if j == i or how != 'mask' or pids[j] != pids[i]]
            top = s[i, others].max()
            total = np.log(np.exp(s[i, others] - top).sum())
            rows.append(-np.mean([s[i, p] - top - total for p in positives]))
        return np.mean(rows)

    s = unit(v) @ unit(t).T / tau
    want = (one_way(s) + one_way(s.T)) / 2 if symmetric else one_way(s)
    tv, tt, tp = as_torch(v, t, pids)
    assert ls.info_nce(tv, tt, tau, tp, symmetric, how).item() == pytest.approx(want, rel=1e-9, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(batches())
def test_adversarial_oracle(batch):
    v, t, ids, tau = batch
    s = unit(v) @ unit(t).T / max(tau, 0.1)  # the naive form needs 1 - P to be representable
    P = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    tv, tt, ti = as_torch(v, t, ids)
    found = ls.clothing_adversarial(tv, tt, max(tau, 0.1)).item()
    assert found == pytest.approx(-np.log(1 - np.diag(P)).mean(), rel=1e-7)
    rows = [0.0 if (ids == ids[i]).all() else -np.log(P[i, ids != ids[i]].sum()) for i in range(len(s))]
    found = ls.clothing_adversarial(tv, tt, max(tau, 0.1), clo_ids=ti).item()
    assert found == pytest.approx(np.mean(rows), rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(batches())
def test_hsic_oracle(batch):
    x, y, *_ = batch
    N = len(x)
    H = np.eye(N) - 1 / N

    def h(K, L):
        return np.trace(K @ H @ L @ H) / (N - 1) ** 2

    tx, ty = as_torch(x, y)
    K, L = x @ x.T, y @ y.T
    assert ls.hsic(tx, ty).item() == pytest.approx(h(K, L), rel=1e-8, abs=1e-14)
    assert ls.hsic(tx, ty, 'linear_normalized').item() == pytest.approx(
        h(unit(x) @ unit(x).T, unit(y) @ unit(y).T), rel=1e-8, abs=1e-14
    )
    cka = ls.hsic(tx, ty, 'cka').item()
    assert cka == pytest.approx(h(K, L) / math.sqrt(h(K, K) * h(L, L)), rel=1e-8)
    assert -1e-12 <= cka <= 1 + 1e-12


@settings(max_examples=40, deadline=None)
@given(batches())
def test_sdm_and_tal_oracles(batch):
    v, t, pids, tau = batch
    c = unit(v) @ unit(t).T

    def soft(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    want_sdm = want_tal = 0.0
    for d in (c, c.T):
        for i in range(len(c)):
            same = pids == pids[i]
            p, q = soft(d[i] / tau), same / same.sum()
            want_sdm += sum(a * (np.log(a) - np.log(b + 1e-8)) for a, b in zip(p, q) if a > 0) / len(c)
            if same.all():
                continue
            neg = d[i, ~same]
            lse = neg.max() + tau * np.log(np.exp((neg - neg.max()) / tau).sum())
            want_tal += max(0.1 - soft(d[i, same] / tau) @ d[i, same] + lse, 0) / len(c)
    tv, tt, tp = as_torch(v, t, pids)
    assert ls.sdm(tv, tt, tp, tau).item() == pytest.approx(want_sdm, rel=1e-8, abs=1e-9)
    assert ls.tal(tv, tt, tp, 0.1, tau).item() == pytest.approx(want_tal, rel=1e-8, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(['hard', 'random', 'all']), st.booleans())
def test_mined_triplets_are_valid(batch, how, cross):
    x, y, pids, _ = batch
    tx, ty, tp = as_torch(x, y, pids)
    a, p, n = (k.tolist() for k in ls.mine_triplets(tx, tp, how, ty if cross else None))
    for i, j, k in zip(a, p, n):
        assert pids[i] == pids[j] != pids[k] and (cross or i != j)
    able = [i for i in range(len(x)) if (pids != pids[i]).any() and (cross or (pids == pids[i]).sum() > 1)]
    if how == 'all':
        assert (
            len(set(zip(a, p, n)))
            == len(a)
            == sum((pids != pids[i]).sum() * ((pids == pids[i]).sum() - (not cross)) for i in able)
        )
    else:
        assert a == able
    if how == 'hard':
        d = np.linalg.norm(x[:, None] - (y if cross else x)[None], axis=2)
        for i, j, k in zip(a, p, n):
            assert d[i, j] == pytest.approx(
                max(d[i, m] for m in range(len(x)) if pids[m] == pids[i] and (cross or m != i)), rel=1e-3
            )
            nearest = min(d[i, m] for m in range(len(x)) if pids[m] != pids[i])
            assert d[i, k] == pytest.approx(nearest, rel=1e-3)


# --- directions of the gradient: what each loss is for ------------------------------------------------------


def test_one_identity_makes_no_triplet_but_keeps_the_graph():
    x = R.clone().requires_grad_()
    loss = ls.triplet(*(x[k] for k in ls.mine_triplets(x, torch.zeros(6, dtype=torch.long))))
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


def test_p_pos_of_one_still_pushes_back():
    f = ONE_HOT.clone().requires_grad_()
    ls.clothing_adversarial(f, ONE_HOT + 0.01 * R, 0.01).backward()
    assert f.grad.norm() > 1  # -log(1 - p) in float32 is inf here
    before = ls.clothing_adversarial(f, ONE_HOT + 0.01 * R, 0.01)
    assert ls.clothing_adversarial(f.detach() - 1e-3 * f.grad, ONE_HOT + 0.01 * R, 0.01) < before


def test_equal_clothing_texts_are_no_negatives():
    def loss(apart, ids):  # perfect features; rows 0 and 1 have one text, its two encodings `apart` (dropout)
        t = R.double().clone()
        t[1] = t[0] + apart * t[1]
        return ls.clothing_matching(t, t, 0.05, ids).item()

    ids = ls.text_ids(torch.tensor([[1, 2], [1, 2], [3, 0], [4, 0], [5, 0], [6, 0]]))
    assert loss(0, ids) < loss(0.5, ids)  # encodings of one text are drawn together
    assert loss(0, None) > loss(0.5, None)  # without ids they are pushed apart
    assert loss(0, ids) == pytest.approx(loss(0, None), abs=1e-9)  # equal ones share the probability anyway


def test_gate_regularization_pulls_to_one_half_on_both_gates():
    for how in ('half', 'entropy'):
        for g in (torch.tensor([[0.9, 0.2]]), torch.tensor([[1.0, 0.0]])):
            h = g.clone().requires_grad_()
            loss = ls.gate_regularization(h, how)
            loss.backward()
            assert loss > 0 and h.grad.isfinite().all()
            if g.min() > 0:
                assert (h.grad * (g - 0.5) > 0).all()


def test_grad_reverse_through_half_precision_and_double_backward():
    x = R.bfloat16().requires_grad_()
    ls.grad_reverse(x, 2.0).sum().backward()
    assert (x.grad == -2).all()
    y = R.double().requires_grad_()
    (g,) = torch.autograd.grad(ls.grad_reverse(y**3).sum(), y, create_graph=True)
    assert torch.allclose(g, -3 * y**2)


@pytest.mark.parametrize(
    'f',
    [
        lambda: ls.info_nce(R, R, 0.1, positives='both'),
        lambda: ls.info_nce(R, R[:4], 0.1),
        lambda: ls.info_nce(R, R[:, :4], 0.1),
        lambda: ls.info_nce(R, R, -1),
        lambda: ls.info_nce(R, R, 0.1, torch.arange(5)),
        lambda: ls.info_nce(R, R, math.nan),
        lambda: ls.mine_triplets(R, torch.arange(6), 'semi'),
        lambda: ls.clothing_adversarial(R, R, 0.1, 'tanh'),
        lambda: ls.hsic(R, R, 'poly'),
        lambda: ls.hsic(R, R[:3]),
        lambda: ls.gate_regularization(R, 'l1'),
    ],
)
def test_mistakes_are_one_clear_line(f):
    with pytest.raises(UserError) as e:
        f()
    assert '\n' not in str(e.value) and len(str(e.value)) > 20


def test_triplet_oracle_and_direction():
    rng = np.random.default_rng(0)
    a, p, n = rng.normal(size=(3, 20, 4))
    want = np.mean([max(((i - j) ** 2).sum() - ((i - k) ** 2).sum() + 0.3, 0) for i, j, k in zip(a, p, n)])
    assert ls.triplet(*as_torch(a, p, n), 0.3).item() == pytest.approx(want, rel=1e-12)


def test_tal_takes_the_weights_of_its_positives_as_constants():
    v, t, pids = R.double(), R.double().flip(0).requires_grad_(), torch.tensor([0, 0, 0, 1, 1, 2])
    grad = torch.autograd.grad(ls.tal(v, t, pids, margin=5.0, tau=0.5), t)[0]
    u, same = ls.l2_normalize(v), pids[:, None] == pids[None]
    w = t.detach().clone().requires_grad_()
    c = u @ ls.l2_normalize(w).T
    want = 0.0
    for d in (c, c.T):
        alpha = torch.softmax((d.detach() / 0.5).masked_fill(~same, -math.inf), 1)
        softmax = 0.5 * (d / 0.5).masked_fill(same, -math.inf).logsumexp(1)
        want = want + (5 - (alpha * d).sum(1) + softmax).mean()
    assert torch.allclose(grad, torch.autograd.grad(want, w)[0], rtol=1e-9, atol=1e-12)
