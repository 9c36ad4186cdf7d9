"Figure 5: exact counts, measurements that mean what they say, a figure that hides no missing run and no missing measurement."
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from bdam_repro import bdam
from bdam_repro import efficiency as E
from bdam_repro.artifacts import demo_run, save_figure
from bdam_repro.config import PRESETS, UserError, make_config, run_dir
from bdam_repro.training import code_version

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def p(tmp_path_factory): return E.demo_fusions(tmp_path_factory.mktemp('demo'), without=['Transformer ×4'])


@pytest.fixture(scope='module')
def table(p):
    with E.one_core(): return E.measure_fusions(p, CPU, budget=.01)


@pytest.fixture(scope='module')
def costs():
    with E.one_core(): return E.layer_costs(CPU, (64, 256, 1024), make_config('synth', 'smoke'), each=.01)


# ---- counts

@pytest.mark.parametrize('kind', ['mamba', 'transformer', 'simple', 'none'])
def test_flops_are_linear_in_the_batch(kind):
    one, five = E.layer_flops(kind, 1, 37, 48), E.layer_flops(kind, 5, 37, 48)
    assert five == tuple(5*n for n in one)


def test_only_attention_grows_faster_than_the_length():
    for kind in ('mamba', 'simple'): assert sum(E.layer_flops(kind, 1, 200, 48)) == 2*sum(E.layer_flops(kind, 1, 100, 48))
    extra = E.layer_flops('transformer', 1, 200, 48)[0] - 2*E.layer_flops('transformer', 1, 100, 48)[0]
    assert extra == 4*48*(200**2 - 2*100**2)


def test_flops_of_a_pair_by_hand():
    c = make_config('synth', 'smoke', 'fusion_simple')
    D, dim = c.fusion_dim, c.dim
    align, gate, layer, out = 2*(2*dim*D + 2*D*D), 2*2*D*2, 2*2*D*2*D, 2*D*dim + 2*dim
    assert E.fusion_flops(c) == (align + gate + c.fusion_layers*layer + out, 0)


def test_a_default_that_moves_takes_its_reading_with_it(monkeypatch):
    assert [E.fusion_config(f'Mamba ({r})').tag for r in ('pooled', 'tokens')] == ['', 'fusion_input=tokens']
    monkeypatch.setitem(PRESETS['tiny'], 'fusion_input', 'tokens')
    assert [E.fusion_config(f'Mamba ({r})').tag for r in ('pooled', 'tokens')] == ['fusion_input=pooled', '']
    assert E.fusion_config('Simple').fusion_input == 'tokens'


def test_what_is_measured_is_what_was_trained(tmp_path):
    c = E.fusion_config('Mamba (pooled)', preset='smoke', fusion_dim=24, epochs=1)
    demo_run(run_dir(c, tmp_path), c)
    found = E.fusion_configs(E.ArtifactParameters(preset='smoke', runs=str(tmp_path)))
    assert {c.fusion_dim for c in found.values()} == {24} and list(found) == list(E.FUSIONS)
    assert [c.fusion_input for c in found.values()] == ['pooled', 'pooled', 'tokens', 'pooled', 'pooled', 'pooled']


def test_sizes_of_a_checkpoint_come_from_its_config_alone(tmp_path):
    (tmp_path/'v').mkdir(), (tmp_path/'t').mkdir()
    (tmp_path/'v'/'config.json').write_text('{"model_type": "vit", "hidden_size": 40, "patch_size": 8}')
    (tmp_path/'t'/'config.json').write_text('{"model_type": "bert", "hidden_size": 24, "num_attention_heads": 2}')
    c = make_config('synth', 'smoke', vision=str(tmp_path/'v'), text=str(tmp_path/'t'), fusion_input='tokens')
    assert E.sizes(c) == E.Sizes(c.dim, 24, (64//8)*(32//8), c.max_length)


# ---- measurements

def test_peak_counts_what_lives_at_once_and_not_what_was_there():
    x = torch.randn(2**18)                                            # 1 MiB
    def freed():
        for _ in range(5): x + 1
    def kept(): return [x + 1 for _ in range(5)]
    assert [round(E.peak_bytes(f, CPU)/2**20, 3) for f in (freed, kept)] == [1, 5]
    assert E.peak_bytes(lambda: None, CPU) == 0


def test_peak_of_attention_holds_the_matrix_of_weights_only_where_it_is_written_out():
    c, L = make_config('synth', 'smoke'), 1024
    peak = {}
    for name in ('Transformer, plain attention', 'Transformer, fused attention'):
        step, n = E.layer_step('transformer', L, c, CPU)
        with E.attention_by(E.LAYERS[name][1]): peak[name] = E.peak_bytes(step, CPU)/n
    weights = 4*c.fusion_heads*L**2
    assert peak['Transformer, plain attention'] > c.fusion_layers*weights > weights > peak['Transformer, fused attention']


def test_seconds_are_this_process_s_own():
    import time
    with E.one_core():
        assert E.seconds(lambda: time.sleep(.05), CPU, budget=0)[0] < .04        # waiting costs nothing
        took, n = E.seconds(lambda: sum(range(200_000)), CPU, budget=.05, repeats=3)
    assert took > 0 and 1 <= n <= 3


def test_what_is_changed_for_a_measurement_comes_back_after_a_fault():
    attend, threads = bdam.attend, torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), E.one_core(), E.attention_by(F.scaled_dot_product_attention): raise ZeroDivisionError
    assert bdam.attend is attend and torch.get_num_threads() == threads


def test_steps_leave_no_gradient_behind():
    c = E.fusion_config('Mamba (tokens)', preset='smoke')
    fusion, inputs = E.lone_fusion(c), E.pair_inputs(c, 3)
    E.training_step(fusion, inputs)()
    assert fusion.training and all(x.grad is None for x in fusion.parameters())
    E.scoring_step(fusion, inputs)()
    assert not fusion.training


def test_a_length_without_time_is_left_out_and_every_longer_one_too(monkeypatch):
    ticks = iter(range(0, 10**6, 2))                                 # each look at the clock takes two seconds
    monkeypatch.setattr(E, 'clock', lambda device: float(next(ticks)))
    costs = E.layer_costs(CPU, (64, 128, 256), make_config('synth', 'smoke'), budget=70.)
    measured = costs.assign(done=costs['seconds'].notna()).pivot(index='length', columns='layers', values='done')
    assert measured.loc[64].any() and not measured.loc[256].all()
    assert all(list(m) == sorted(m, reverse=True) for _, m in measured.items())
    assert costs['flops'].notna().all() and (costs['memory'].isna() == costs['seconds'].isna()).all()


def test_pairs_fit(table):
    configs = [E.fusion_config(n) for n in E.FUSIONS]
    n = E.number_of_pairs(configs, CPU)
    assert n & (n - 1) == 0 and n*96*64 <= 2**21 and set(table['pairs']) == {256}
    huge = [E.fusion_config('Mamba (tokens)').model_copy(update=dict(fusion_dim=2**20))]
    assert E.number_of_pairs(huge, CPU) == 1


def test_costs_mean_one_sequence(costs):
    "A batch of 16 short sequences and one long one: the cost a token is of the same size."
    m = costs[costs['layers'] == 'Mamba'].set_index('length')
    assert list(m['sequences']) == [16, 4, 1]
    assert m.loc[1024, 'memory']/m.loc[64, 'memory'] == pytest.approx(16, rel=.3)
    assert E.growth(costs).loc['Mamba', 'FLOPs'] == pytest.approx(1)


# ---- mAP

def test_map_is_of_the_fused_score_and_the_right_runs(table, p):
    runs = E.collect_runs(p.runs_path)
    for name, r in table.iterrows():
        c = E.fusion_config(name, preset='smoke')
        t = runs[(runs['variant'] == c.variant) & (runs['tag'] == c.tag) & (runs['score'] == 'fused')]
        assert len(t) == r['n'] and (r['n'] == 0 or r['mAP'] == pytest.approx(t['mAP'].mean()))
    assert math.isnan(table.loc['Transformer ×4', 'mAP'])


def test_no_run_at_all_is_no_error(tmp_path, table, costs, p):
    alone = p.model_copy(update=dict(runs=str(tmp_path/'nowhere'), figures=str(tmp_path)))
    none = E.collect_runs(alone.runs_path, ['synth'], 'smoke')
    empty = table.assign(**pd.DataFrame([E.map_of(E.fusion_config(n, preset='smoke'), none) for n in table.index], table.index))
    assert empty['mAP'].isna().all() and 'no run yet' in E.words(empty, costs, alone, CPU)
    fig = E.plot_efficiency(empty, costs, alone, CPU)
    assert any('no run' in t for t in texts(fig))
    save_figure(fig, 'fig5', alone)


def test_a_broken_run_is_one_clear_line(tmp_path):
    p = E.demo_fusions(tmp_path)
    (next(p.runs_path.glob('*/*/full/seed0'))/'metrics.json').write_text('{')
    with pytest.raises(UserError, match='not a JSON object'): E.measure_fusions(p, CPU, budget=0)


def test_runs_of_another_preset_do_not_count(tmp_path):
    c = E.fusion_config('Simple', preset='tiny')
    demo_run(run_dir(c, tmp_path/'runs'), c)
    asked = []
    for preset in ('smoke', 'tiny'): asked.append(E.map_of(c, E.collect_runs(tmp_path/'runs', ['synth'], preset))['n'])
    assert asked == [0, 1]


# ---- the figure

def texts(fig):
    import matplotlib.text
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text()]


def test_figure_shows_every_value_with_its_unit(table, costs, p):
    shown = texts(E.plot_efficiency(table, costs, p, CPU))
    for name, r in table.iterrows():
        for column in E.HEADS: assert E.value_text(r, column) in shown
        assert name in shown
    assert '–' in shown                                                           # the run that is missing
    for axis in E.AXES: assert any(t.startswith(f'{axis}\n') and '…' in t for t in shown)


def test_figure_is_small_and_the_same_twice(table, costs, p, tmp_path):
    p = p.model_copy(update=dict(figures=str(tmp_path)))
    def made(): return [f.read_bytes() for f in save_figure(E.plot_efficiency(table, costs, p, CPU), 'fig5', p)]
    first = made()
    assert made() == first and len(first[1]) < 2**20
    width = int.from_bytes(first[1][16:20], 'big')
    assert width == 7*200


def test_caption_says_what_a_reader_needs(table, costs, p):
    said = E.words(table, costs, p, CPU)
    for word in ('SynthPEDES', 'no photographs', 'preset smoke', 'seeds 0, 1', 'Transformer ×4: no run yet',
                 'code of the runs demo', 'one core', 'float32', 'width 256', code_version()): assert word in said
    assert 'Left out' not in said
    few = costs.copy()
    few.loc[(few['length'] == 1024) & (few['layers'] != 'Mamba'), ['seconds', 'memory']] = np.nan
    said = E.words(table, few, p, CPU)
    assert 'Left out for time: Transformer, plain attention from 1,024 on; Transformer, fused attention from 1,024 on.' in said
    E.plot_efficiency(table, few, p, CPU)


def test_radar_puts_the_worst_on_the_inner_ring_and_the_best_on_the_rim(table):
    for name, (column, good) in E.AXES.items():
        v = table[column].dropna()
        ends = E.axis_ends(table[column], name)
        r = [E.radius(x, *ends, log=name != 'mAP') for x in v]
        assert max(r) == pytest.approx(1) and min(r) >= E.INNER - 1e-9
        assert v.iloc[int(np.argmax(r))] == good(v)
    assert E.axis_ends(pd.Series([50., 50.4]), 'mAP') == (pytest.approx(40.4), 50.4)      # half a point is no chasm
    assert E.radius(5., 5., 5., log=True) == 1


def test_growth_and_crossing_of_made_curves():
    cost = dict(zip(E.LAYERS, (lambda L: 100.*L, lambda L: 1.*L*L, lambda L: 10.*L)))
    rows = [dict(layers=n, length=L) | dict.fromkeys(E.COSTS, f(L)) for L in E.LENGTHS for n, f in cost.items()]
    made = pd.DataFrame(rows)
    assert E.growth(made)['seconds'].round(6).tolist() == [1, 2, 1]
    assert E.crossing(made, 'Transformer, plain attention', 'seconds') == 128
    assert E.crossing(made, 'Transformer, fused attention', 'seconds') is None
    made.loc[made['length'] > 64, 'seconds'] = np.nan
    assert math.isnan(E.growth(made).loc['Mamba', 'seconds'])
    assert 'not up to the longest' in E.crossings(made)


@pytest.mark.parametrize('x, text', [(0, '0'), (12, '12'), (999, '999'), (999.96, '1.00 k'), (1000, '1.00 k'), (99_960, '100 k'),
                                     (2.5e9, '2.50 G'), (.5, '0.50')])
def test_numbers_have_three_digits(x, text): assert E.si(x) == text
