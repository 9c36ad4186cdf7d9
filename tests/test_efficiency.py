"Figure 5: exact counts, measurements that mean what they say, a figure that hides nothing that is missing."
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from bdam_repro import bdam, cost_figure, efficiency, results
from bdam_repro.config import PRESETS, UserError, make_config, run_dir
from bdam_repro.figure_style import save_figure
from bdam_repro.runs import code_version
from bdam_repro.testing import demo_run

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def p(tmp_path_factory):
    return efficiency.demo_fusions(tmp_path_factory.mktemp('demo'), without=['Transformer ×4'])


@pytest.fixture(scope='module')
def table(p):
    with efficiency.one_core(): return efficiency.measure_fusions(p, CPU, budget=.01)


@pytest.fixture(scope='module')
def costs():
    with efficiency.one_core():
        return efficiency.layer_costs(CPU, (64, 256, 1024), make_config('synth', 'smoke'), each=.01)


# ---- counts

@pytest.mark.parametrize('kind', ['mamba', 'transformer', 'simple', 'none'])
def test_flops_are_linear_in_the_batch(kind):
    one, five = efficiency.layer_flops(kind, 1, 37, 48), efficiency.layer_flops(kind, 5, 37, 48)
    assert five == tuple(5*n for n in one)


def test_only_attention_grows_faster_than_the_length():
    for kind in ('mamba', 'simple'):
        assert sum(efficiency.layer_flops(kind, 1, 200, 48)) == 2*sum(efficiency.layer_flops(
            kind, 1, 100, 48))
    extra = efficiency.layer_flops('transformer', 1, 200, 48)[0] - 2*efficiency.layer_flops(
        'transformer', 1, 100, 48)[0]
    assert extra == 4*48*(200**2 - 2*100**2)


def test_flops_of_a_pair_by_hand():
    c = make_config('synth', 'smoke', 'fusion_simple')
    D, dim = c.fusion_dim, c.dim
    align, gate, layer, out = 2*(2*dim*D + 2*D*D), 2*2*D*2, 2*2*D*2*D, 2*D*dim + 2*dim
    assert efficiency.fusion_flops(c) == (align + gate + c.fusion_layers*layer + out, 0)


def test_a_default_that_moves_takes_its_reading_with_it(monkeypatch):
    assert [efficiency.fusion_config(f'Mamba ({r})').tag for r in ('pooled', 'tokens')] == [
        '', 'fusion_input=tokens']
    monkeypatch.setitem(PRESETS['tiny'], 'fusion_input', 'tokens')
    assert [efficiency.fusion_config(f'Mamba ({r})').tag
            for r in ('pooled', 'tokens')] == ['fusion_input=pooled', '']
    assert efficiency.fusion_config('Simple').fusion_input == 'tokens'


def test_what_is_measured_is_what_was_trained(tmp_path):
    c = efficiency.fusion_config('Mamba (pooled)', preset='smoke', fusion_dim=24, epochs=1)
    demo_run(run_dir(c, tmp_path), c)
    found = efficiency.fusion_configs(results.ArtifactParameters(preset='smoke', runs=str(tmp_path)))
    assert {c.fusion_dim for c in found.values()} == {24} and list(found) == list(efficiency.FUSIONS)
    assert [c.fusion_input for c in found.values()] == [
        'pooled', 'pooled', 'tokens', 'pooled', 'pooled', 'tokens', 'pooled']


def test_sizes_of_a_checkpoint_come_from_its_config_alone(tmp_path):
    (tmp_path/'v').mkdir(), (tmp_path/'t').mkdir()
    (tmp_path/'v'/'config.json').write_text('{"model_type": "vit", "hidden_size": 40, "patch_size": 8}')
    (tmp_path/'t'/'config.json').write_text('{"model_type": "bert", "hidden_size": 24, '
                                            '"num_attention_heads": 2}')
    c = make_config('synth', 'smoke', vision=str(tmp_path/'v'), text=str(tmp_path/'t'), fusion_input='tokens')
    assert efficiency.sizes(c) == efficiency.Sizes(c.dim, 24, (64//8)*(32//8), c.max_length)


# ---- measurements

def test_peak_counts_what_lives_at_once_and_not_what_was_there():
    x = torch.randn(2**18)                                            # 1 MiB
    def freed():
        for _ in range(5): x + 1
    def kept(): return [x + 1 for _ in range(5)]
    assert [round(efficiency.peak_bytes(f, CPU)/2**20, 3) for f in (freed, kept)] == [1, 5]
    assert efficiency.peak_bytes(lambda: None, CPU) == 0


def test_peak_of_attention_holds_the_matrix_of_weights_only_where_it_is_written_out():
    c, L = make_config('synth', 'smoke'), 1024
    peak = {}
    for name in ('Transformer, plain attention', 'Transformer, fused attention'):
        step, n = efficiency.layer_step('transformer', L, c, CPU)
        with efficiency.attention_by(efficiency.LAYER_KINDS[name][1]):
            peak[name] = efficiency.peak_bytes(step, CPU)/n
    weights = 4*c.fusion_heads*L**2
    assert peak['Transformer, plain attention'] > c.fusion_layers*weights > weights > peak['Transformer, '
                                                                                           'fused attention']


def test_seconds_are_this_process_s_own():
    import time
    with efficiency.one_core():
        # waiting costs nothing
        assert efficiency.seconds(lambda: time.sleep(.05), CPU, budget=0)[0] < .04
        took, n = efficiency.seconds(lambda: sum(range(200_000)), CPU, budget=.05, repeats=3)
    assert took > 0 and 1 <= n <= 3


def test_what_is_changed_for_a_measurement_comes_back_after_a_fault():
    attend, threads = bdam.attend, torch.get_num_threads()
    attention = efficiency.attention_by(F.scaled_dot_product_attention)
    with pytest.raises(ZeroDivisionError), efficiency.one_core(), attention:
        raise ZeroDivisionError
    assert bdam.attend is attend and torch.get_num_threads() == threads


def test_steps_leave_no_gradient_behind():
    c = efficiency.fusion_config('Mamba (tokens)', preset='smoke')
    fusion, inputs = efficiency.lone_fusion(c), efficiency.pair_inputs(c, 3)
    efficiency.training_step(fusion, inputs)()
    assert fusion.training and all(x.grad is None for x in fusion.parameters())
    efficiency.scoring_step(fusion, inputs)()
    assert not fusion.training


def test_a_length_without_time_is_left_out_and_every_longer_one_too(monkeypatch):
    # each look at the clock takes two seconds
    ticks = iter(range(0, 10**6, 2))
    monkeypatch.setattr(efficiency, 'clock', lambda device: float(next(ticks)))
    costs = efficiency.layer_costs(CPU, (64, 128, 256), make_config('synth', 'smoke'), budget=70.)
    measured = costs.assign(done=costs['seconds'].notna()).pivot(
        index='length', columns='layers', values='done')
    assert measured.loc[64].any() and not measured.loc[256].all()
    assert all(list(m) == sorted(m, reverse=True) for _, m in measured.items())
    assert costs['flops'].notna().all() and (costs['memory'].isna() == costs['seconds'].isna()).all()


def test_pairs_fit(table):
    configs = [efficiency.fusion_config(n) for n in efficiency.FUSIONS]
    n = efficiency.number_of_pairs(configs, CPU)
    assert n & (n - 1) == 0 and n*96*64 <= 2**21 and set(table['pairs']) == {256}
    huge = [efficiency.fusion_config('Mamba (tokens)').model_copy(update=dict(fusion_dim=2**20))]
    assert efficiency.number_of_pairs(huge, CPU) == 1


def test_costs_mean_one_sequence(costs):
    "A batch of 16 short sequences and one long one: the cost a token is of the same size."
    m = costs[costs['layers'] == 'Mamba'].set_index('length')
    assert list(m['sequences']) == [16, 4, 1]
    assert m.loc[1024, 'memory']/m.loc[64, 'memory'] == pytest.approx(16, rel=.3)
    assert efficiency.growth(costs).loc['Mamba', 'FLOPs'] == pytest.approx(1)


# ---- mAP

def test_map_is_of_the_fused_score_and_the_right_runs(table, p):
    runs = results.collect_runs(p.runs_path)
    for name, r in table.iterrows():
        c = efficiency.fusion_config(name, preset='smoke')
        t = runs[(runs['variant'] == c.variant) & (runs['tag'] == c.tag) & (runs['score'] == 'fused')]
        assert len(t) == r['n'] and (r['n'] == 0 or r['mAP'] == pytest.approx(t['mAP'].mean()))
    assert math.isnan(table.loc['Transformer ×4', 'mAP'])


def test_no_run_at_all_is_no_error(tmp_path, table, costs, p):
    alone = p.model_copy(update=dict(runs=str(tmp_path/'nowhere'), figures=str(tmp_path)))
    none = results.collect_runs(alone.runs_path, ['synth'], 'smoke')
    empty = table.assign(**pd.DataFrame([efficiency.map_of(efficiency.fusion_config(n, preset='smoke'), none)
                                         for n in table.index], table.index))
    assert empty['mAP'].isna().all() and 'no run yet' in cost_figure.figure5_caption(empty, costs, alone, CPU)
    fig = cost_figure.plot_efficiency(empty, costs, alone, CPU)
    assert any('no run' in t for t in texts(fig))
    save_figure(fig, 'fig5', alone)


def test_a_broken_run_is_one_clear_line(tmp_path):
    p = efficiency.demo_fusions(tmp_path)
    (next(p.runs_path.glob('*/*/full/seed0'))/'metrics.json').write_text('{')
    with pytest.raises(UserError, match='not a JSON object'): efficiency.measure_fusions(p, CPU, budget=0)


def test_runs_of_another_preset_do_not_count(tmp_path):
    c = efficiency.fusion_config('Simple', preset='tiny')
    demo_run(run_dir(c, tmp_path/'runs'), c)
    asked = []
    for preset in ('smoke', 'tiny'):
        asked.append(efficiency.map_of(c, results.collect_runs(tmp_path/'runs', ['synth'], preset))['n'])
    assert asked == [0, 1]


# ---- the figure

def texts(fig):
    import matplotlib.text
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text()]


def test_figure_shows_every_value_with_its_unit(table, costs, p):
    shown = texts(cost_figure.plot_efficiency(table, costs, p, CPU))
    for name, r in table.iterrows():
        for column in cost_figure.HEADS: assert cost_figure.value_text(r, column) in shown
        assert name.replace(' (', '\n(') in shown                       # its reading on a second line
    assert '–' in shown                                                           # the run that is missing
    for axis in cost_figure.AXES: assert any(t.startswith(f'{axis}\n') and '…' in t for t in shown)


def test_figure_is_small_and_the_same_twice(table, costs, p, tmp_path):
    p = p.model_copy(update=dict(figures=str(tmp_path)))
    def made():
        return [f.read_bytes() for f in save_figure(
            cost_figure.plot_efficiency(table, costs, p, CPU), 'fig5', p)]
    first = made()
    assert made() == first and len(first[1]) < 2**20
    width = int.from_bytes(first[1][16:20], 'big')
    assert width == 7*200


def test_caption_says_what_a_reader_needs(table, costs, p):
    said = cost_figure.figure5_caption(table, costs, p, CPU)
    for word in ('SynthPEDES', 'no photographs', 'preset smoke', 'seeds 0, 1', 'Transformer ×4: no run yet',
                 'code of the runs demo', 'one core', 'float32', 'width 256',
                 code_version()): assert word in said
    assert 'Left out' not in said
    few = costs.copy()
    few.loc[(few['length'] == 1024) & (few['layers'] != 'Mamba'), ['seconds', 'memory']] = np.nan
    said = cost_figure.figure5_caption(table, few, p, CPU)
    left_out = said.split('Left out for time: ')[1]
    for kernel in ('plain', 'fused'): assert f'Transformer, {kernel} attention from 1,024 on' in left_out
    cost_figure.plot_efficiency(table, few, p, CPU)


def test_radar_puts_the_worst_on_the_inner_ring_and_the_best_on_the_rim(table):
    for name, (column, good) in cost_figure.AXES.items():
        v = table[column].dropna()
        ends = cost_figure.axis_ends(table[column], name)
        r = [cost_figure.radius(x, *ends, log=name != 'mAP') for x in v]
        assert max(r) == pytest.approx(1) and min(r) >= cost_figure.INNER - 1e-9
        assert v.iloc[int(np.argmax(r))] == good(v)
    # half a point is no chasm
    assert cost_figure.axis_ends(pd.Series([50., 50.4]), 'mAP') == (pytest.approx(40.4), 50.4)
    assert cost_figure.radius(5., 5., 5., log=True) == 1


def test_growth_and_crossing_of_made_curves():
    cost = dict(zip(efficiency.LAYER_KINDS, (lambda L: 100.*L, lambda L: 1.*L*L, lambda L: 10.*L)))
    rows = [dict(layers=n, length=L) | dict.fromkeys(efficiency.COSTS, f(L)) for L in efficiency.LENGTHS
            for n, f in cost.items()]
    made = pd.DataFrame(rows)
    assert efficiency.growth(made)['seconds'].round(6).tolist() == [1, 2, 1]
    assert efficiency.crossing(made, 'Transformer, plain attention', 'seconds') == 128
    assert efficiency.crossing(made, 'Transformer, fused attention', 'seconds') is None
    made.loc[made['length'] > 64, 'seconds'] = np.nan
    assert math.isnan(efficiency.growth(made).loc['Mamba', 'seconds'])
    assert 'not up to the longest' in efficiency.crossings(made)


@pytest.mark.parametrize(
    'x, text', [(0, '0'), (12, '12'), (999, '999'), (999.96, '1.00 k'), (1000, '1.00 k'), (99_960, '100 k'),
                                     (2.5e9, '2.50 G'), (.5, '0.50')])
def test_numbers_have_three_digits(x, text): assert cost_figure.si(x) == text
