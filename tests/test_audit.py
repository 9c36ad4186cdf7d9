"The audit: verdicts follow from intervals, missing runs are said, every number resolves to a run."
import json
import re
import shutil
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file

from bdam_repro import ceiling, files, findings, probes, protocol, readings, report, results
from bdam_repro.archive import keep_runs, restore_runs
from bdam_repro.claims import ALL_CLAIMS, GAIN_METRICS, METRIC_NAMES
from bdam_repro.config import Config, UserError, make_config, run_dir
from bdam_repro.deciding import CONTRASTS, FUSION_CONTRASTS, MEASURES
from bdam_repro.grid import (
    CLOTHES,
    DATA,
    LOG_TEST,
    READINGS,
    audit_grid,
    grid,
    layout_options,
    reading_reference,
    reading_run,
)
from bdam_repro.paper import OPEN_POINTS
from bdam_repro.results import ArtifactParameters, collect_runs, own_options
from bdam_repro.testing import demo_run

CKA = ('full', 'hsic_kernel=cka')
VERDICTS = {'', 'default', 'better', 'worse', *findings.JUDGED, findings.ONE_SEED, 'invalid', 'same epoch',
            'holds', 'does not', findings.NOT_RUN, findings.NOT_HERE, findings.NO_OPTION,
            findings.NOT_MEASURED}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Three small runs of two seeds, audited."
    folder = tmp_path_factory.mktemp('audit')
    p = findings.demo_audit(folder, (findings.FULL, findings.BASELINE, CKA), seeds=(0, 1))
    return p, *report.write_audit(p)


@pytest.fixture
def drawn(tmp_path):
    "Run folders of two seeds whose results a test sets."
    for seed in (0, 1):
        for variant, tag in (findings.FULL, findings.BASELINE, CKA):
            of_tag = layout_options('smoke', tag)
            c = make_config('synth', 'smoke', variant, seed=seed, tag=tag or None, **of_tag)
            demo_run(run_dir(c, tmp_path/'runs'), c)
    places = {k: str(tmp_path/k) for k in ('runs', 'tables')}
    return ArtifactParameters(preset='smoke', **places, data_root=str(tmp_path/'data'))


def change_results(p, side, change):
    "Every query's result of a drawn run goes through `change`."
    for path in (p.runs_path/'synth'/'smoke'/findings.side_name(side)).glob('seed*/features.safetensors'):
        t = load_file(path)
        changed = {k: np.ascontiguousarray(change(v)) for k, v in t.items() if k.endswith(('.R1', '.AP'))}
        save_file(t | changed, path)


def verdicts(p):
    e, r = findings.gather(p), next(r for r in READINGS if r.options == dict(hsic_kernel='cka'))
    return {f.metric: f.verdict for f in readings.reading_findings(e, r)}


# ---- what is in it

def test_every_point_and_every_claim_is_there(made):
    _, t, _ = made
    assert list(t.columns) == [*findings.FINDING_COLUMNS, 'decides']
    assert set(t['part']) == set('abcdef') and set(t['verdict']) <= VERDICTS
    items = set(t[t['part'].isin(['a', 'c', 'e'])]['item'].astype(str)) - {'gallery'}
    assert {p.n for p in OPEN_POINTS} == set(map(int, items))
    claims = t[(t['part'] == 'b') & (t['reading'] == '')]
    assert list(claims['item']) == [c.id for c in ALL_CLAIMS]
    known = {'holds', 'does not', *findings.JUDGED[2:], findings.NOT_RUN, findings.NOT_HERE}
    assert set(claims['verdict']) <= known


def test_a_claim_is_settled_by_its_own_rows(made):
    _, t, _ = made
    for c in ALL_CLAIMS:
        own = t[(t['part'] == 'b') & (t['item'] == c.id)]
        said = own[own['reading'] == '']['verdict'].iloc[0]
        of_rows = findings.claim_verdict(own[own['reading'] != ''].itertuples())
        assert said == (findings.NOT_HERE if c.id == 'sota' else of_rows)


def test_what_decides_is_said_in_the_file_and_read_back(made):
    _, t, files = made
    back = report.read_audit(files[0])
    pd.testing.assert_frame_equal(back, t)
    assert back['decides'].sum() > 50 and set(back[back['decides']]['part']) == {'b'}
    assert list(back['decides']) == [r.startswith('decides') for r in back['rule']]


def test_no_verdict_hangs_on_the_wording_of_a_rule():
    worded = findings.Finding('b', 'whole', 'x', verdict='against', rule='decides: it seems', decides=False)
    silent = findings.Finding('b', 'whole', 'y', verdict='for', decides=True)
    assert findings.claim_verdict([worded, silent]) == 'holds'


def test_intervals_and_verdicts_agree(made):
    _, t, _ = made
    judged = t[t['verdict'].isin(['better', 'worse', *findings.JUDGED]) & t['diff'].notna()]
    assert len(judged) > 20
    for r in judged.itertuples():
        bound = float(m[1]) if (m := re.search(r'below (-?[\d.]+)(,|$)', r.rule)) and r.part == 'b' else 0.
        margin = float(m[1]) if (m := re.search(r'±([\d.]+)', r.rule)) else np.nan
        verdict = {'better': 'for', 'worse': 'against'}.get(r.verdict, r.verdict)
        assert verdict == findings.judge_interval(r.lo, r.hi, bound, margin), r
        assert r.lo <= r.diff + 1e-3 and r.diff <= r.hi + 1e-3
        if r.decides and r.p == r.p: assert (r.verdict == findings.TOO_NOISY) == (r.p > 1 - r.level/100), r


def test_deciding_findings_are_those_that_were_fixed_beforehand(made):
    _, t, _ = made
    decided = t[t['decides']]
    contrasts = {(c.claim, f'{findings.side_name(c.better)} − {findings.side_name(c.worse)}',
                  METRIC_NAMES[c.score, c.metric]) for c in CONTRASTS if c.share == 1}
    contrasts |= {(c.claim, f'{c.better} − {c.worse}, same towers', GAIN_METRICS[c.metric])
                  for c in FUSION_CONTRASTS}
    found = set(decided[['item', 'reading', 'metric']].itertuples(index=False, name=None))
    assert contrasts <= found
    others = {(item, metric) for item, reading, metric in found if (item, reading, metric) not in contrasts}
    fixed = {(claim, metric) for claim, metrics in MEASURES.items() for metric in metrics}
    assert others - fixed == {('infonce', readings.HEAD)}


def test_one_seed_gets_a_number_and_no_verdict(made, tmp_path):
    p, _, _ = made
    shutil.copytree(p.runs_path, tmp_path/'runs')
    shutil.rmtree(tmp_path/'runs/synth/smoke/full-hsic_kernel=cka/seed1')
    e = findings.gather(p.model_copy(update=dict(runs=str(tmp_path/'runs'))))
    r = next(r for r in READINGS if r.options == dict(hsic_kernel='cka'))
    one = next(f for f in readings.reading_findings(e, r) if f.metric == readings.HEAD)
    assert one.verdict == findings.ONE_SEED and np.isnan([one.lo, one.hi]).all() and one.seeds == '0 | 0'
    mine, other = (findings.seed_query_values(e, side, seeds=[0])[0].mean() for side in (CKA, findings.FULL))
    assert one.diff == pytest.approx(mine - other)          # of the seed that both have


def test_runs_of_one_objective_are_the_noise_floor(tmp_path):
    for seed in (0, 1):
        for variant in ('baseline', 'fusion', 'fusion_no_mamba', 'bdam'):
            c = make_config('synth', 'smoke', variant, seed=seed)
            demo_run(run_dir(c, tmp_path/'runs'), c)
    places = {k: str(tmp_path/k) for k in ('runs', 'tables')}
    e = findings.gather(ArtifactParameters(preset='smoke', **places, data_root=str(tmp_path/'data')))
    names = {tuple(sorted(side[0] for side in pair)) for pair in protocol.null_pairs(e)}
    assert names == {('baseline', 'fusion'), ('baseline', 'fusion_no_mamba'), ('fusion', 'fusion_no_mamba')}
    whole, *pairs = protocol.noise_floor(e)
    assert len(pairs) == 3 and whole.hi == max(f.value for f in pairs) and 'of 3 pairs' in whole.rule
    assert whole.reading.startswith('all 6 differences')                # two seeds of three pairs


def test_the_same_run_on_another_device_is_a_null_run_too(tmp_path):
    for variant, tag in (('full', None), ('bdam', None), ('bdam', 'cpu')):
        c = make_config('synth', 'smoke', variant, tag=tag)
        demo_run(run_dir(c, tmp_path/'runs'), c)
    old = tmp_path/'runs/synth/smoke/bdam/seed0/config.json'        # made before there was such an option
    options = json.loads(old.read_text())
    old.write_text(json.dumps({k: v for k, v in options.items() if k != 'equal_texts'}))
    features = old.with_name('features.safetensors')
    t = load_file(features)
    save_file(t | {'dual.R1': np.ascontiguousarray(1 - t['dual.R1'])}, features)      # what the device did
    places = {k: str(tmp_path/k) for k in ('runs', 'tables')}
    e = findings.gather(ArtifactParameters(preset='smoke', **places, data_root=str(tmp_path/'data')))
    found = {f.reading: f for f in protocol.noise_floor(e)}
    device = found['bdam − bdam-cpu']
    assert device.verdict == findings.ONE_SEED and device.rule.endswith('1 of 1 not 0') and device.value > 0
    assert 'of 0 pairs' in next(iter(found.values())).rule             # one seed calls nothing different
    assert any(re.fullmatch(r'all \d differences of null runs, \d of them not 0', name) for name in found)


def test_what_was_not_run_has_no_difference(made):
    _, t, _ = made
    missing = t[(t['verdict'] == findings.NOT_RUN) & (t['part'] != 'f')]
    assert len(missing) > 100 and missing[missing['reading'] != ''][['diff', 'lo', 'hi']].isna().all(None)
    row = t[(t['item'] == 'bdam') & (t['reading'] != '')].iloc[0]
    assert row['evidence'] == 'no finished run of bdam' and np.isnan(row['value'])


def test_every_path_is_a_run_and_every_mean_is_that_of_runs(made):
    p, t, _ = made
    runs = collect_runs(p.runs_path)
    folders = [results.run_folder(p.runs_path, r) for r in runs.itertuples()]
    known = {f.relative_to(p.runs_path).as_posix() for f in folders}
    paths = {x for e in t['evidence'] if 'no finished' not in e for x in re.findall(r'\S+/seed\d+', e)}
    assert paths and paths <= known
    own = runs.sort_values('score').drop_duplicates(['variant', 'tag', 'seed'], keep='last')
    own = own.set_index(['variant', 'tag'])
    for metric, column in ((readings.HEAD, 'R1'), ('mAP', 'mAP'), ('val R-1', 'val_R1')):
        of_cka = t['evidence'].str.startswith('synth/smoke/full-hsic')
        for r in t[of_cka & (t['part'] == 'a') & (t['metric'] == metric)].itertuples():
            assert r.value == pytest.approx(own.loc[CKA, column].mean(), abs=1e-3)


def test_markdown_reads_alone(made):
    p, _, files = made
    text = files[1].read_text()
    heads = [f'## {x}.' for x in 'abcdef']
    said = ['SynthPEDES', 'preset smoke', 'no reproduction', 'Seeds: 0', 'Code ', '(invalid)', *heads]
    assert [part for part in said if part not in text] == []
    for c in ALL_CLAIMS: assert f'| {c.id} | {c.where} |' in text
    for point in OPEN_POINTS: assert re.search(rf'(?m)^\| {point.n} \| {re.escape(point.where)} \|', text)
    assert str(p.runs_path) not in text + files[0].read_text() and 'nan' not in text
    for block in [b for b in text.split('\n\n') if b.startswith('|')]:
        assert len({line.count('|') for line in block.splitlines()}) == 1, block[:200]


def test_same_runs_same_bytes_and_no_litter(made):
    p, _, files = made
    before = [f.read_bytes() for f in files]
    assert [f.read_bytes() for f in report.write_audit(p)[1]] == before
    assert {f.name for f in p.tables_path.iterdir()} == {'audit.csv', 'audit.md', 'costs.csv'}
    back = pd.read_csv(files[0], keep_default_na=False, na_values={c: [''] for c in findings.NUMBERS})
    assert list(back.columns) == findings.FINDING_COLUMNS and len(back) == before[0].count(b'\n') - 1


def test_an_old_audit_survives_a_full_disk(made, monkeypatch):
    _, _, files = made
    before = [f.read_bytes() for f in files]
    def full(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(pd.DataFrame, 'to_csv', full)
    with pytest.raises(UserError, match='No space left'): results.write_csv(pd.DataFrame(), files[0])
    assert [f.read_bytes() for f in files] == before


def test_pictures(made):
    _, t, _ = made
    assert len(readings.plot_readings(t).axes[0].get_yticklabels()) == 1
    assert protocol.plot_noise(t).axes[0].lines[0].get_xdata().tolist() == [5.]


# ---- readings

@pytest.mark.parametrize('change, says', [
    (lambda v: v*0 + 1, {'better'}), (lambda v: v*0, {'worse'}), (lambda v: v, {'negligible', 'too noisy'}),
    (lambda v: v*0 + (np.arange(len(v)) < len(v)//2), {'too noisy'})])
def test_a_reading_is_judged_by_its_queries(drawn, change, says):
    change_results(drawn, findings.FULL, lambda v: v*0 + np.arange(len(v)) % 2)
    change_results(drawn, CKA, lambda v: change(v*0 + np.arange(len(v)) % 2))
    assert {verdicts(drawn)[m] for m in (readings.HEAD, 'mAP', 'dual R-1')} <= says


def test_other_queries_are_refused(drawn):
    for path in (drawn.runs_path/'synth/smoke/full-hsic_kernel=cka').glob('seed*/features.safetensors'):
        t = load_file(path)
        save_file(t | dict(q_rows=t['q_rows'] + 1), path)
    with pytest.raises(UserError, match='other queries'): verdicts(drawn)


def test_a_run_with_other_options_is_left_out_and_named(drawn):
    for path in (drawn.runs_path/'synth/smoke/full-hsic_kernel=cka').glob('seed*/config.json'):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(margin=.9)))
    e = findings.gather(drawn)
    assert e.left_out == [f'synth/smoke/full-hsic_kernel=cka/seed{s}' for s in (0, 1)]
    assert set(verdicts(drawn).values()) == {findings.NOT_RUN}
    not_run = [findings.Finding('b', c.id, '', verdict=findings.NOT_RUN) for c in ALL_CLAIMS]
    empty = findings.findings_frame(not_run)
    text = report.audit_markdown(empty, '', e.left_out)
    assert 'Left out, since trained with other options: synth/smoke/full-hsic' in text


def test_options_of_all_runs_are_no_obstacle(drawn):
    for path in drawn.runs_path.rglob('config.json'):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(epochs=3)))
    e = findings.gather(drawn)
    assert e.left_out == [] and e.base.epochs == 3


def test_a_run_that_cannot_be_read_is_one_clear_line(drawn):
    (drawn.runs_path/'synth/smoke/full/seed0/features.safetensors').write_bytes(b'cut')
    with pytest.raises(UserError, match='train the run again'): verdicts(drawn)


def test_nothing_to_look_at(tmp_path):
    with pytest.raises(UserError, match='no finished run of synth'):
        findings.gather(ArtifactParameters(preset='smoke', runs=str(tmp_path)))


def test_test_metrics_in_the_history_are_used(drawn):
    for second in list(drawn.runs_path.glob('*/*/*/seed1')): shutil.rmtree(second)
    folder = drawn.runs_path/'synth/smoke/full/seed0'
    h = pd.DataFrame(dict(epoch=[1, 2, 3], val_fused_R1=[4., 6., 5.], val_fused_mAP=[4., 5., 6.],
                          val_fused_R5=[9., 8., 9.], val_fused_R10=[9., 9., 9.]))
    h.to_csv(folder/'history.csv', index=False)
    gain = lambda e: {f.reading: (f.diff, f.verdict) for f in protocol.selection_on_test(e)}
    e = findings.gather(drawn)
    assert gain(e)['the best epoch on test'][1] == findings.NOT_RUN
    assert {f.reading: f.verdict for f in readings.selection_readings(e)} == {
        'R1': 'default', 'mAP': findings.NOT_RUN, 'sum': 'same epoch'}
    c = make_config('synth', 'smoke', 'full', tag=LOG_TEST, **layout_options('smoke', LOG_TEST))
    logged = run_dir(c, drawn.runs_path)
    demo_run(logged, c)
    h.assign(test_fused_R1=[1., 2., 5.]).to_csv(logged/'history.csv', index=False)
    e = findings.gather(drawn)
    assert gain(e)['the best epoch on test'] == (3, '')
    assert next(f for f in readings.selection_readings(e) if f.reading == 'mAP').diff == 3


def test_choosing_a_reading_on_test_gains_what_validation_would_not_choose(drawn):
    e = findings.gather(drawn)
    full = e.runs['variant'] == 'full'
    e.runs.loc[full, ['R1', 'val_R1']] = [[60., 50.] if t else [40., 55.] for t in e.runs[full]['tag']]
    found = protocol.selection_on_test(e)[2]
    assert (found.reading, found.value, found.diff) == ('the best reading on test', 60, 20)


# ---- the grid of readings

def test_each_reading_changes_what_it_says_and_nothing_else():
    for base in (make_config(), make_config('synth', 'smoke')):
        for c in audit_grid('synth', base.preset):
            usual = make_config('synth', base.preset, c.variant).model_dump()
            changed = {k for k, v in c.model_dump().items() if usual[k] != v} - {'tag', 'folder'}
            named = set(layout_options(None, c.tag))
            if base.preset == 'smoke' and c.variant in ('sdm', 'tal') and named <= {'tau', 'tau_decay'}:
                assert not changed, c.tag                    # `smoke` has their published τ already
            else: assert changed == named and changed, c.tag
    noise = {t for t in DATA if t.startswith('synth_error')}
    assert {c.tag for c in audit_grid()} & set(DATA) == {CLOTHES, 'icfg', *noise}


def test_the_audit_finds_the_runs_that_the_grid_makes(tmp_path):
    made = set()
    for c in audit_grid('synth', 'smoke'):
        demo_run(run_dir(c, tmp_path), c)
        assert own_options(run_dir(c, tmp_path)) == {}, c.tag
        made.add((c.variant, c.tag))
    base, tables = make_config('synth', 'smoke'), {(c.variant, c.tag) for c in grid('synth', 'smoke')}
    for r in READINGS: assert {reading_run(r, base), reading_reference(r, base)} <= made | tables


def test_a_default_that_moves_takes_its_reading_with_it():
    tags = {c.tag for c in audit_grid(hsic_kernel='cka', tau=.07)}
    assert 'hsic_kernel=cka' not in tags and {'hsic_kernel=linear_normalized', 'tau=0.05'} <= tags
    assert all(c.tau == .07 for c in audit_grid(tau=.07) if not c.tag.startswith('tau='))
    names = [r.name for r in readings.all_readings(make_config(tau=.07)) if r.n == 20]
    assert names.count('tau=0.07') == 1


def test_tags_and_folders_are_distinct():
    runs = [*grid(), *audit_grid(seeds=(0, 1))]
    assert len({run_dir(c) for c in runs}) == len(runs) and all(isinstance(c, Config) for c in runs)


# ---- claims, ceilings

def test_settling():
    rows = lambda *v: [findings.Finding('b', 'claim', 'x', verdict=x, decides=True) for x in v]
    kinds = ('for', *findings.JUDGED[1:], findings.NOT_RUN)
    for n in (1, 2, 3):
        for v in combinations(kinds, n):
            if 'against' in v: want = 'does not'
            elif findings.NEGLIGIBLE in v: want = findings.NEGLIGIBLE
            elif findings.TOO_NOISY in v: want = findings.TOO_NOISY
            else: want = findings.NOT_RUN if findings.NOT_RUN in v else 'holds'
            assert findings.claim_verdict(rows(*v)) == want


@pytest.mark.parametrize('layout', ['cuhk', 'icfg', 'rstp'])
def test_captions_are_heard_in_every_layout(layout):
    few = dict(synth_train_ids=2, synth_val_ids=1, synth_test_ids=12)
    s = probes.spec_of(make_config('synth', synth_layout=layout, **few), True)
    texts, heard = [t for r in probes.gallery_rows(s) for t in r['captions']], ceiling.captions_heard(s)
    assert len(texts) == len(heard)
    for text, h in zip(texts, heard):
        assert ('scarf' in text.lower()) == ('scarf_color' in h)
        assert ('beard' in text.lower()) == ('beard' in h)
        assert h['upper_type'] and 'gender' in h and not {False, 'average', 'plain'} & set(h.values())


def test_ceilings_where_clothes_change():
    c = make_config('synth', 'smoke', synth_test_ids=40)
    kept, changed = ceiling.perfect(c, False), ceiling.perfect(c, True)
    # clothes mislead, or tell all
    assert changed['clothing']['R1 other'].mean() < 20 < kept['clothing']['R1 other'].mean()
    assert abs(changed['identity']['R1 other'].mean() - kept['identity']['R1 other'].mean()) < 10


def test_other_pictures_never_show_the_own():
    scores = torch.eye(6).double()
    r = probes.other_pictures(scores, np.arange(6), np.array([0, 0, 0, 1, 1, 1]))
    assert np.allclose(r['R1'], .5)
    same = torch.tensor([[0., 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]).double()
    assert (probes.other_pictures(same, np.arange(4), np.array([0, 0, 1, 1]))['R1'] == 1).all()


def test_a_run_is_looked_at_once_and_again_under_other_options(made):
    p, _, _ = made
    f = p.runs_path/'synth/smoke/full/seed0/look-clothes.safetensors'
    before = f.stat().st_mtime_ns
    values = findings.model_findings(findings.gather(p), f.parent, probes.CLOTHES_CHANGED)
    assert f.stat().st_mtime_ns == before
    shutil.copy(p.runs_path/'synth/smoke/baseline/seed0'/f.name, f)                 # of another model
    again = findings.model_findings(findings.gather(p), f.parent, probes.CLOTHES_CHANGED)
    config = json.loads((f.parent/'config.json').read_text())
    assert files.read_tensors(f)[1]['config_hash'] == config['config_hash']
    for k in values: np.testing.assert_array_equal(values[k], again[k])


def test_an_audit_without_models_or_large_features_is_the_same(made, tmp_path):
    "From what is kept of the runs, every finding is remade."
    p, t, _ = made
    runs = collect_runs(p.runs_path)
    keep_runs(p.runs_path, runs, tmp_path/'tables')
    options = {(r.variant, r.tag): dict(variant=r.variant, tag=r.tag, **layout_options('smoke', r.tag))
               for r in runs.itertuples()}
    cs = [make_config('synth', 'smoke', epochs=1, seed=s, **o) for o in options.values() for s in (0, 1)]
    assert len(restore_runs(tmp_path/'runs', tmp_path/'tables', cs)) == 6
    (tmp_path/'audit').mkdir()
    shutil.copy(p.tables_path/'costs.csv', tmp_path/'audit')
    places = dict(runs=str(tmp_path/'runs'), tables=str(tmp_path/'audit'))
    again, _ = report.write_audit(p.model_copy(update=places))
    pd.testing.assert_frame_equal(again, t)


def test_a_run_that_was_never_looked_at_is_left_out(made, tmp_path):
    p, _, _ = made
    shutil.copytree(p.runs_path, tmp_path/'runs')
    folder = tmp_path/'runs/synth/smoke/full/seed0'
    (folder/findings.MODEL).unlink()
    for f in folder.glob('look-*'): f.unlink()
    shutil.rmtree(folder.with_name('seed1'))
    e = findings.gather(p.model_copy(update=dict(runs=str(tmp_path/'runs'))))
    not_run, = protocol.score_findings(e)
    assert (not_run.verdict, not_run.evidence) == (findings.NOT_RUN, 'no run of full has its model')
    deciding = [f for f in probes.robust_claim(e) if f.decides]
    assert deciding and {f.verdict for f in deciding} == {findings.NOT_RUN}


def test_real_data_has_no_factors(made):
    p, _, _ = made
    e = findings.gather(p)
    e.base = make_config('cuhk')
    for found in (protocol.part_d(e), ceiling.part_e(e), probes.robust_claim(e)):
        assert [f.verdict for f in found] == [findings.NOT_HERE]


def test_dependence_needs_a_pairing():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(60, 5))
    assert probes.hsic_excess(x, np.abs(x)).p < .05 < probes.hsic_excess(x, y).p


def test_every_question_has_a_name_of_its_own():
    names = [q.name for q in report.MODEL_QUESTIONS]
    of_archives = ['branches', 'clothes', 'dependence', 'gate', 'other', 'rerank', 'ties', 'worth']    # kept
    assert sorted(names) == of_archives


def test_no_name_of_the_module_is_taken_for_a_test():
    assert not [n for n in dir(findings) if n.startswith('test_')]
