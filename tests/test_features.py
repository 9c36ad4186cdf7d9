"Figures 3 and 4: what is read, what is counted, and what a printed figure must be."
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from bdam_repro import features, figure_style, gates, results, testing
from bdam_repro.config import UserError
from bdam_repro.figure_style import save_figure, small_texts
from bdam_repro.files import write_tensors

PRINTED = json.loads((Path(__file__).parent/'paper_numbers.json').read_text())['figure3']


@pytest.fixture(scope='module')
def p(tmp_path_factory): return testing.smoke_runs(tmp_path_factory.mktemp('features'), seeds=(0, 1))


@pytest.fixture(scope='module')
def full(p): return results.find_features(p)


@pytest.fixture(scope='module')
def baseline(p): return results.find_features(p, 'baseline')


@pytest.fixture(scope='module')
def ds(full, p): return results.load_dataset(full[0], p)


@pytest.fixture(scope='module')
def measured(baseline, full, ds):
    return features.measure_features(baseline, full, ds, full[:1])     # one run twice: as if without the loss


def no_tsne(patch): patch.setattr(features, 'tsne_map', lambda x, *_: x[:, :2])


@pytest.fixture
def quick_maps(monkeypatch): no_tsne(monkeypatch)


@pytest.fixture(scope='module')
def drawn(full, ds, measured):
    with pytest.MonkeyPatch.context() as patch:
        no_tsne(patch)
        return dict(fig3=gates.plot_gates(full, ds.records['pid'].to_numpy()),
                    fig4=features.plot_features(measured))


def with_tensors(run, **tensors):
    return replace(run, tensors=run.tensors | {k: torch.from_numpy(v).float() for k, v in tensors.items()})


def texts(fig):
    fig.canvas.draw()
    return [t.get_text() for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip()]


# ---- runs

def test_seeds_come_in_their_order_and_unfinished_runs_do_not(p, tmp_path):
    runs = tmp_path/'synth'/'smoke'/'full'
    for seed in ('seed10', 'seed9', 'seed0-old', 'seed3'):
        shutil.copytree(p.runs_path/'synth'/'smoke'/'full'/'seed0', runs/seed)
    (runs/'seed3'/'metrics.json').unlink()
    found = results.find_features(p.model_copy(update=dict(runs=str(tmp_path))))
    assert [r.folder.name for r in found] == ['seed9', 'seed10']


@pytest.mark.parametrize('spoil, say', [
    (lambda f: (f/'features.safetensors').unlink(), 'features.safetensors'),
    (lambda f: (f/'features.safetensors').write_bytes((f/'features.safetensors').read_bytes()[:999]),
     'not a whole'),
    (lambda f: write_tensors(f/'features.safetensors', {'g': torch.ones(2, 2)}, dict(config_hash='another')),
     'different runs'),
    (lambda f: (f/'config.json').write_text('[1'), 'not a JSON object'),
    (lambda f: (f/'config.json').write_text('{}'), 'different runs'),
    (lambda f: (f/'provenance.json').unlink(), 'provenance.json is missing'),
])
def test_a_spoiled_run_is_one_line(p, tmp_path, spoil, say):
    folder = shutil.copytree(p.runs_path/'synth'/'smoke'/'full'/'seed0', tmp_path/'seed0')
    spoil(folder)
    with pytest.raises(UserError, match=say) as e: results.load_features(folder)
    assert '\n' not in str(e.value)


def test_runs_that_do_not_go_together(full, baseline, ds):
    with pytest.raises(UserError, match='no seed in common'):
        features.make_samples(baseline[:1], full[1:], ds)
    tensors = baseline[0].tensors
    moved = replace(baseline[0], tensors=tensors | dict(g_rows=tensors['g_rows'].flip(0)))
    with pytest.raises(UserError, match='different images'): features.make_samples([moved], full, ds)


# ---- gates

def test_the_ranking_with_the_learned_gate_is_that_of_the_run(full, ds):
    pids = ds.records['pid'].to_numpy()
    for run in full:
        assert gates.gate_worth(run, pids)['as learned'] == pytest.approx(100*run['dual.R1'].mean(), abs=1e-3)


def test_a_gate_without_spread_has_no_shape_and_no_shares(full, ds):
    flat = with_tensors(full[0], g=np.full_like(full[0]['g'], .5))
    assert gates.gate_table([flat])['sd'].iloc[:3].tolist() == [
        0, 0, 0] and gates.gate_table([flat])['skewness'].iloc[:3].isna().all()
    assert np.isnan(list(gates.variance_shares(flat['g']).values())).all()
    worth = gates.gate_worth(with_tensors(flat, f_id=full[0]['f_id']), ds.records['pid'].to_numpy())
    assert len(set(worth.values())) == 1                    # the same number everywhere is no gate
    gates.plot_gates([flat], ds.records['pid'].to_numpy())


def test_variance_shares_sum_to_one_and_find_their_part():
    rng = np.random.default_rng(0)
    d, n, r = rng.normal(size=(1, 50)), rng.normal(size=(80, 1)), rng.normal(size=(80, 50))
    r -= r.mean(0) + r.mean(1, keepdims=True) - r.mean()
    for a, b, c in ((1, 2, 3), (0, 1, 0), (5, .1, .1)):
        shares = gates.variance_shares(a*d + b*n + c*r)
        want = np.array([a**2*d.var(), b**2*n.var(), c**2*r.var()])
        assert np.allclose(list(shares.values()), want/want.sum())


def test_a_gate_of_zeros_does_not_divide(full, ds):
    g = full[0]['g'].copy()
    g[:, :3] = 0
    f_id = full[0]['f_id']*(g > 0)
    assert all(0 <= v <= 100 for v in gates.gate_worth(
        with_tensors(full[0], g=g, f_id=f_id), ds.records['pid'].to_numpy()).values())


def test_printed_numbers_stand_in_figure_3_as_printed(drawn):
    said = texts(drawn['fig3'])
    for gate in ('bdam_identity', 'bdam_clothing', 'fusion_image', 'fusion_text'):
        v = PRINTED[gate]
        assert f'{v["mean"]:.2f}' + (f' ± {v["std"]:.2f}' if 'std' in v else '') in said


# ---- probes, silhouettes, dependence

def test_a_class_that_a_fold_never_saw():
    people = np.repeat(np.arange(6), 2)
    x = np.random.default_rng(0).normal(size=(12, 3))
    only_one = np.where(people == 0, 'rare', 'usual')
    assert np.isnan(features.probe(x, only_one, people)).all()                   # one class is left
    assert np.isnan(features.probe(x, np.full(12, True), people)).all()
    many = np.repeat(np.arange(40), 2)
    y = np.where(many < 12, 'a', 'b')
    y[many == 39] = 'rare'
    x = np.c_[np.random.default_rng(0).normal(size=(80, 3)), 9*(y == 'a')]
    hits, k = features.probe_hits(x, y, many)
    assert k == 2 and (hits[many == 39] == 0).all() and hits.mean() == pytest.approx(1)


def test_what_is_not_there_is_read_at_chance_however_skewed():
    rng, people = np.random.default_rng(3), np.repeat(np.arange(100), 3)
    x, found = rng.normal(size=(100, 20))[people] + .2*rng.normal(size=(300, 20)), []
    for share in (.1, .2, .5):
        found += [features.probe(x, (rng.permutation(100) < 100*share)[people], people)[0] for _ in range(10)]
    assert abs(np.mean(found) - .5) < .03


def test_probe_does_not_depend_on_scale_or_order():
    rng = np.random.default_rng(1)
    people, y = np.repeat(np.arange(200), 3), np.repeat(rng.integers(0, 3, 200), 3)
    x = np.eye(3)[y] + .5*rng.normal(size=(600, 3))
    want = features.probe(x, y, people)
    assert features.probe(1e3*x + 7, y, people) == want and want[0] > want[1] + .2


def test_factors_are_those_that_vary(ds):
    known = ds.records[ds.records['split'] == 'test'].assign(f_gender='man')
    names = features.factors_of(known)
    assert ('clothing', 'upper_color') in names and 'gender' not in [k for _, k in names]
    assert features.factors_of(known[['pid', 'split']]) == []


def test_dependence_tells_shared_from_separate():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(150, 12)), rng.normal(size=(150, 12))
    apart, shared = features.feature_dependence(a, b), features.feature_dependence(a, a + .5*b)
    assert abs(apart['CKA'] - apart['CKA, dealt anew']) < .03 and shared['CKA'] > .4
    assert shared['HSIC'] > 3*shared['HSIC, dealt anew']
    assert features.feature_dependence(a, b) == apart


def test_each_model_has_its_dependence(measured):
    t = measured.dependence.set_index(['model', 'seed'])
    assert list(t.index) == [('full', 0), ('full', 1), ('w/o decoupling', 0), ('untrained', 0),
                             ('untrained', 1)]
    assert np.allclose(t.loc[('full', 0)], t.loc[('w/o decoupling', 0)])


def test_regions_of_two_biases_vanish_with_their_means(full, ds, measured):
    t = measured.silhouettes.query("label == 'branch'").groupby('feature')['silhouette'].mean()
    assert t['as it is'] > .3 and abs(t['means removed']) < .15
    again = features.untrained(full[0], ds)
    # a seed, one start
    assert all(np.array_equal(again[k], v) for k, v in features.untrained(full[0], ds).items())
    # … which is not the end
    assert not np.allclose(again['f_id'], features.unit_rows(full[0]['f_id']), atol=1e-3)


def test_outfits_that_one_person_wears_are_left_out():
    known = pd.DataFrame(dict(pid=[1, 1, 2, 2, 3], f_upper_color=list('aaaab'), f_lower_color=list('ccccc')))
    assert features.outfit(known).tolist() == ['a / c']*4 + ['']
    assert features.outfit(known[['pid']]) is None


# ---- the figures

@pytest.mark.parametrize('name', ['fig3', 'fig4'])
def test_a_figure_as_it_must_be(drawn, p, name):
    fig = drawn[name]
    assert fig.get_size_inches()[0] == 7 and fig.get_size_inches()[1] < 9 and small_texts(fig) == []
    files = save_figure(fig, name, p)
    assert [f.suffix for f in files] == ['.pdf', '.png'] and max(f.stat().st_size for f in files) < 2**20
    with Image.open(files[1]) as image: assert image.size[0] == 1400
    caption = ' '.join(next(t for t in texts(fig) if t.startswith(f'Figure {name[-1]}.')).split())
    for word in ('SynthPEDES (rendered; no photographs)', 'preset smoke', 'full', 'seeds 0, 1', 'Code 0.'):
        assert word in caption


def test_the_same_runs_give_the_same_picture(full, ds, drawn, p):
    first = save_figure(drawn['fig3'], 'first', p)[0].read_bytes()
    assert save_figure(drawn['fig3'], 'first', p)[0].read_bytes() == first      # drawing moves nothing
    assert save_figure(gates.plot_gates(full, ds.records['pid'].to_numpy()), 'again',
                       p)[0].read_bytes() == first


def test_a_map_is_that_of_its_seed():
    x = features.unit_rows(np.random.default_rng(0).normal(size=(60, 5)))
    assert np.array_equal(
        features.tsne_map(x, 9), features.tsne_map(x, 9)) and not np.array_equal(
            features.tsne_map(x, 9), features.tsne_map(x, 9, seed=1))


def test_identity_and_clothing_differ_on_gray_paper():
    gray = [np.array([int(c[i:i + 2], 16) for i in (1, 3, 5)]) @ (.299, .587, .114)
            for c in (figure_style.IDENTITY_COLOR, figure_style.BASELINE_COLOR, figure_style.CLOTHING_COLOR)]
    assert np.diff(gray).min() > 25 and len({m for m, *_ in features.FEATURE_MARKS.values()}) == 3


def test_photographs_have_people_but_no_factors(full, baseline, ds, quick_maps):
    plain = replace(ds, records=ds.records[[c for c in ds.records if not c.startswith('f_')]])
    m = features.measure_features(baseline[:1], full[:1], plain)
    assert m.probes.empty and set(m.silhouettes['label']) == {'identity', 'branch'}
    assert 'no factor of this dataset is known' in texts(features.plot_features(m))
