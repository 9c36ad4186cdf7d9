"The metrics against brute force, other libraries, permutations, ties, bad input and memory."
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from bdam_repro.config import UserError
from bdam_repro.metrics import (
    bootstrap_ci,
    chance,
    metrics_from_scores,
    paired_bootstrap,
    rank_metrics,
    rerank_metrics,
    retrieval_metrics,
    topk,
    unit,
)

FIELDS = ('R1', 'R5', 'R10', 'AP', 'INP', 'rank')
KEYS = ['R1', 'R5', 'R10', 'mAP', 'mINP']


def same(a, b, order=slice(None)):
    return all(np.array_equal(getattr(a, f), getattr(b, f)[order]) for f in FIELDS)


def problem(seed=0, Q=60, G=150, D=16, ids=25, noise=1., dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    g_pids = torch.cat([torch.arange(ids), torch.randint(0, ids, (G - ids,), generator=rng)])
    q_pids = torch.randint(0, ids, (Q,), generator=rng)
    center = torch.randn(ids, D, generator=rng)
    q = center[q_pids] + noise*torch.randn(Q, D, generator=rng)
    g = center[g_pids] + noise*torch.randn(G, D, generator=rng)
    return q.to(dtype), g.to(dtype), q_pids, g_pids


def plain(scores, hits):
    "One query by the definition: R1, R5, R10, AP, INP, rank; ties are in the order of the columns."
    r = np.flatnonzero(hits[np.argsort(-scores, kind='stable')]) + 1
    return [r[0] <= 1, r[0] <= 5, r[0] <= 10, np.mean(np.arange(1, len(r) + 1)/r), len(r)/r[-1], r[0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=6), st.data())
def test_ties_are_the_mean_over_every_ordering(scores, data):
    n = len(scores)
    hits = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)))
    scores = np.array(scores, float)
    orders = [list(p) for p in itertools.permutations(range(len(scores)))]
    expected = np.mean([plain(scores[p], hits[p]) for p in orders], 0)
    r = metrics_from_scores(scores[None], [1], hits.astype(int))
    assert np.allclose([getattr(r, f)[0] for f in FIELDS], expected, atol=1e-12, rtol=0)


def test_without_ties_it_is_the_definition_and_scikit_learn():
    q, g, q_pids, g_pids = problem()
    s = (unit(q) @ unit(g).T).numpy()
    hits = q_pids[:, None].numpy() == g_pids.numpy()
    r = rank_metrics(q, g, q_pids, g_pids)
    found = np.array([getattr(r, f) for f in FIELDS]).T
    assert np.allclose(found, [plain(*x) for x in zip(s, hits)], atol=1e-12)
    assert np.allclose(r.AP, [average_precision_score(h, x) for h, x in zip(hits, s)])
    summary = retrieval_metrics(q, g, q_pids, g_pids)
    assert list(summary) == KEYS and all(type(v) is float for v in summary.values())
    assert summary['mAP'] == pytest.approx(100*r.AP.mean()) and 5 < summary['mAP'] < 95


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('levels', [None, 1])         # real features, and few values with many exact ties
def test_no_permutation_and_no_tile_changes_a_bit(dtype, levels):
    for seed in range(4):
        q, g, q_pids, g_pids = problem(seed, D=33, dtype=dtype)
        if levels: q, g = q.clamp(-levels, levels).round(), g.clamp(-levels, levels).round()
        r, rng = rank_metrics(q, g, q_pids, g_pids), torch.Generator().manual_seed(seed)
        i, j, d = (torch.randperm(n, generator=rng) for n in (len(q), len(g), q.shape[1]))
        assert same(rank_metrics(q, g[j], q_pids, g_pids[j]), r)
        assert same(rank_metrics(q[i], g, q_pids[i], g_pids), r, i)
        assert same(rank_metrics(q[:, d], g[:, d], q_pids, g_pids), r)
        assert rank_metrics(q[i], g[j], q_pids[i], g_pids[j], chunk=7).summary() == r.summary()
        for chunk in (1, 3, 64): assert same(rank_metrics(q, g, q_pids, g_pids, chunk=chunk), r)


def test_dot_products_are_exact_whatever_the_order():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1024, generator=rng)
    x[:8], x[8:16] = 1, x[8:16]*1e-30           # all of one sign: the largest partial sums; and tiny features
    u = unit(x)
    as_integers = (u*2**26).to(torch.int64)
    assert torch.equal(as_integers.double()*2**-26, u)
    exact = as_integers.numpy().astype(object) @ as_integers.numpy().astype(object).T     # Python integers
    assert (exact == (u @ u.T * 2.**52).numpy().astype(object)).all()
    assert torch.allclose(u.norm(dim=1), torch.ones(64, dtype=torch.float64), atol=1e-6)


def test_scale_of_a_feature_does_not_matter_and_input_is_left_alone():
    q, g, q_pids, g_pids = problem(dtype=torch.float64)
    before = q.clone(), g.clone()
    r = rank_metrics(q, g, q_pids, g_pids)
    assert torch.equal(q, before[0]) and torch.equal(g, before[1])
    assert same(rank_metrics(q*2.**-300, g*2.**40, q_pids, g_pids), r)


def test_identical_images_tie():
    g = torch.randn(40, 64).repeat(2, 1)              # every image twice: right person, wrong person
    pids = np.arange(80)
    r = rank_metrics(g[:40], g, pids[:40], pids)
    assert (r.R1 == .5).all() and (r.R5 == 1).all() and (r.rank == 1.5).all() and (r.AP == .75).all()


@pytest.mark.parametrize('value', [0., 1., -3.7])
def test_a_constant_embedding_is_chance(value):
    _, _, q_pids, g_pids = problem(Q=90, G=130)
    r = retrieval_metrics(torch.full((90, 48), value), torch.full((130, 48), value), q_pids, g_pids)
    assert r == chance(q_pids, g_pids)
    M = np.bincount(g_pids)[q_pids]
    for k in (1, 5, 10):
        hit = [1 - math.comb(130 - m, k)/math.comb(130, k) for m in M]
        assert r[f'R{k}'] == pytest.approx(100*np.mean(hit))


def test_chance_is_the_mean_of_random_rankings():
    _, _, q_pids, g_pids = problem(Q=400)
    rng = np.random.default_rng(0)
    runs = [metrics_from_scores(rng.random((400, 150)), q_pids, g_pids).summary() for _ in range(40)]
    for k, v in chance(q_pids, g_pids).items():
        x = np.array([r[k] for r in runs])
        assert abs(x.mean() - v) < 4*x.std()/np.sqrt(len(x)), k


def test_many_matches_are_sorted_few_are_compared():
    for G, ids in ((400, 2), (400, 80)):
        q, g, q_pids, g_pids = problem(G=G, ids=ids, noise=2.)
        s = unit(q) @ unit(g).T
        s = (s*20).round()                            # ties
        r = metrics_from_scores(s, q_pids, g_pids, chunk=11)
        rng = np.random.default_rng(0)
        hits = q_pids[:, None].numpy() == g_pids.numpy()
        orders = [rng.permutation(G) for _ in range(60)]
        mean = np.mean([[plain(x[o], h[o]) for x, h in zip(s.numpy(), hits)] for o in orders], 0)
        assert np.abs(np.array([r.AP, r.INP]).T - mean[:, 3:5]).mean() < .01


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.booleans())
def test_reranking_is_the_full_matrix_with_the_candidates_in_front(seed, k, ties):
    q, g, q_pids, g_pids = problem(seed, Q=12, G=30, D=4, ids=6)
    if ties: q, g = q.sign(), g.sign()
    dual = rank_metrics(q, g, q_pids, g_pids)
    candidates, cosine = topk(q, g, k)
    new = torch.randn(candidates.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    new = 100 + (new.round() if ties else new)
    full = unit(q) @ unit(g).T
    assert torch.equal(cosine, full.gather(1, candidates))
    expected = metrics_from_scores(full.scatter(1, candidates, new), q_pids, g_pids)
    assert same(rerank_metrics(dual, candidates, new), expected)
    assert retrieval_metrics(q, g, q_pids, g_pids, rerank=(candidates, new)) == expected.summary()


def test_topk_is_the_head_of_the_sorted_row():
    q, g, _, _ = problem(G=3000)
    s, i = (unit(q) @ unit(g).T).sort(1, descending=True)
    for chunk in (5, 512):
        idx, score = topk(q, g, 20, chunk=chunk)
        assert torch.equal(idx, i[:, :20]) and torch.equal(score, s[:, :20])
    assert topk(q, g, 10**6)[0].shape == (60, 3000)


Q4, G6 = torch.randn(4, 8), torch.randn(6, 8)
QP, GP = [0, 1, 2, 0], [0, 1, 2, 3, 1, 0]


def rerank4(candidates, scores): return rerank_metrics(rank_metrics(Q4, G6, QP, GP), candidates, scores)


def bad(x, value):
    x = x.clone(); x[2, 3] = value
    return x


@pytest.mark.parametrize('call, message', [
    (lambda: retrieval_metrics(bad(Q4, math.nan), G6, QP, GP), 'query features row 2'),
    (lambda: retrieval_metrics(Q4, bad(G6, math.inf), QP, GP), 'gallery features row 2'),
    (lambda: retrieval_metrics(Q4, G6, [0, 1, 9, 0], GP), r'query 2 \(identity 9\)'),
    (lambda: retrieval_metrics(Q4, G6, QP[:3], GP), 'q_pids has shape'),
    (lambda: retrieval_metrics(Q4, G6, QP, GP + [1]), 'g_pids has shape'),
    (lambda: retrieval_metrics(Q4, G6[:, :5], QP, GP), 'dimensions'),
    (lambda: retrieval_metrics(Q4, G6[:0], QP, []), 'g_pids is empty'),
    (lambda: retrieval_metrics(Q4[:0], G6, [], GP), 'q_pids is empty'),
    (lambda: retrieval_metrics(Q4[0], G6, QP, GP), '2-D'),
    (lambda: retrieval_metrics(Q4, G6, ['a']*4, GP), 'integers'),
    (lambda: retrieval_metrics(Q4, G6, QP, GP, chunk=0), 'chunk'),
    (lambda: metrics_from_scores(torch.full((4, 6), math.nan), QP, GP), 'scores row 0'),
    (lambda: topk(Q4, G6, 0), 'k must be at least 1'),
    (lambda: chance([5], GP), r'identity 5'),
    (lambda: rerank4(torch.zeros(4, 2, dtype=int), torch.zeros(4, 2)), 'same candidate twice'),
    (lambda: rerank4(torch.full((4, 1), 6), torch.zeros(4, 1)), 'gallery numbers'),
    (lambda: rerank4(torch.zeros(3, 1, dtype=int), torch.zeros(3, 1)), '4 queries'),
    (lambda: rerank4(topk(Q4, G6, 2)[0], torch.full((4, 2), math.nan)), 'candidate scores row 0'),
    (lambda: bootstrap_ci([]), 'finite'),
    (lambda: bootstrap_ci([1., math.nan]), 'finite'),
    (lambda: bootstrap_ci([1., 0.], level=95), 'level'),
    (lambda: bootstrap_ci([1., 0.], groups=[1]), 'groups'),
    (lambda: paired_bootstrap([1., 0.], [1.]), 'same queries'),
])
def test_a_mistake_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message) as e: call()
    assert '\n' not in str(e.value)


def test_candidates_that_are_not_the_best_are_refused():
    q, g, q_pids, g_pids = problem(noise=.5)
    dual, worst = rank_metrics(q, g, q_pids, g_pids), topk(q, g, 150)[0][:, -10:]
    with pytest.raises(UserError, match='not the best K'): rerank_metrics(dual, worst, torch.zeros(60, 10))


def test_memory_is_a_tile_and_not_queries_times_gallery():
    code = '''if 1:
        import json, resource, torch
        from bdam_repro.metrics import rank_metrics, topk
        torch.set_num_threads(1)
        pids = torch.arange(16000) % 8000
        q, g = torch.randn(4000, 4), torch.randn(16000, 4)
        rank_metrics(q[:64], g, pids[:64], pids); topk(q[:64], g, 5)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rank_metrics(q, g, pids[:4000], pids, chunk=128); topk(q, g, 20, chunk=128)
        print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    before, after = json.loads(out)
    assert (after - before)/1024 < 150            # MB; 4,000 × 16,000 scores alone are 488 in float64


def test_bootstrap_agrees_with_the_standard_error():
    v = np.random.default_rng(0).normal(3., 2., 4000)
    mean, lo, hi = bootstrap_ci(v, n=1000)
    assert mean == v.mean() and lo < mean < hi
    assert (hi - lo)/2/1.96 == pytest.approx(v.std()/np.sqrt(4000), rel=.1)
    assert bootstrap_ci(v, n=50, seed=3) == bootstrap_ci(v, n=50, seed=3) != bootstrap_ci(v, n=50, seed=4)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_ci(rng.random(200) < .3, n=300, level=.8) for _ in range(300)]
    inside = [lo <= .3 <= hi for _, lo, hi in intervals]
    assert .73 < np.mean(inside) < .87


def test_drawing_identities_together_widens_the_interval():
    of = np.repeat(np.arange(200), 6)                # six captions of one person are found or missed together
    v = (np.random.default_rng(0).random(200) < .7)[of].astype(float)
    width = lambda c: c[2] - c[1]
    assert width(bootstrap_ci(v, groups=of)) > 2*width(bootstrap_ci(v))
    assert width(bootstrap_ci(v, groups=np.arange(1200))) == width(bootstrap_ci(v))


def test_pairing_sharpens_and_seeds_widen_a_difference():
    rng = np.random.default_rng(0)
    a = rng.random((3, 800)); b = a - .02 + .01*rng.normal(size=(3, 800))
    d, lo, hi = paired_bootstrap(a[0], b[0])
    assert d == pytest.approx((a[0] - b[0]).mean()) and 0 < lo < d < hi
    one = bootstrap_ci(a[0])
    assert hi - lo < (one[2] - one[1])/5
    shift = np.array([[-.1], [0.], [.1]])             # seeds that differ
    _, lo3, hi3 = paired_bootstrap(a + shift, b + shift)
    assert lo3 < 0 < hi3
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_gives_the_same_bits():
    q, g, q_pids, g_pids = problem(Q=500, G=2000, D=256, ids=100)
    assert same(rank_metrics(q, g, q_pids, g_pids, device='cuda'), rank_metrics(q, g, q_pids, g_pids))
    assert torch.equal(topk(q, g, 20, device='cuda')[0], topk(q, g, 20)[0])
