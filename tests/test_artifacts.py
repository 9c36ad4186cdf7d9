"Tables: the same bytes from the same files, the paper's numbers to the digit, nothing where nothing was run."
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from bdam_repro import archive, artifacts, results, testing
from bdam_repro.config import VARIANTS, UserError, make_config, run_dir
from bdam_repro.grid import AS_PRINTED, REFERENCE, grid, table_rows

REPO = Path(__file__).resolve().parent.parent
PRINTED = json.loads((REPO/'tests'/'paper_numbers.json').read_text())
MAIN = ('mAP', 'R1', 'R5', 'R10')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Demo runs, collected and written as tables."
    p = artifacts.demo_tables(tmp_path_factory.mktemp('demo'))
    for n in REFERENCE: artifacts.write_table(n, p)
    return p


@pytest.fixture
def few(tmp_path):
    "The runs of Table 1 alone, to be spoiled."
    return testing.demo_runs(tmp_path, tables=(1,))


def table(p, n): return results.read_csv(p.tables_path/f'table{n}.csv', artifacts.TABLE)


def test_a_full_disk_keeps_the_old_archive(tmp_path, monkeypatch):
    file = tmp_path/'kept-seed0.zip'
    runs = {f'a/{i}': {archive.PACKED: os.urandom(900_000)} for i in range(4)}
    archive.write_kept(file, runs)
    assert len(archive.archive_parts(file)) > 1
    written, write = [], archive.atomic_path
    def full_at_the_last(path):
        written.append(path)
        if len(written) == 3: raise UserError(f'cannot write {path}: No space left on device')
        return write(path)
    with monkeypatch.context() as m, pytest.raises(UserError, match='No space'):
        m.setattr(archive, 'atomic_path', full_at_the_last)
        archive.write_kept(file, runs | {'b/0': {archive.PACKED: os.urandom(900_000)}})
    assert archive.read_kept(file) == runs
    assert not list(tmp_path.glob('.*.tmp'))


# ---- from runs.csv to the same bytes

def test_tables_come_from_the_three_files_alone(made, tmp_path):
    for name in ('runs', 'differences', 'styles'): shutil.copy(made.tables_path/f'{name}.csv', tmp_path)
    alone = results.ArtifactParameters(preset='smoke', runs='nowhere', tables=str(tmp_path))
    for n in REFERENCE:
        for f in artifacts.write_table(n, alone):
            assert f.read_bytes() == (made.tables_path/f.name).read_bytes()


def test_collecting_again_gives_the_same_bytes(made):
    before = {f.name: f.read_bytes() for f in made.tables_path.glob('*.csv')}
    artifacts.collect(made)
    assert {f.name: f.read_bytes() for f in made.tables_path.glob('*.csv')} == before


def test_committed_tables_are_those_of_the_committed_runs(tmp_path):
    committed = sorted((REPO/'tables').rglob('runs.csv'))
    assert committed
    for runs in committed:
        dataset, preset = pd.read_csv(runs)[['dataset', 'preset']].iloc[0]
        for name in ('runs', 'differences', 'styles', 'fusion'):
            if (runs.parent/f'{name}.csv').exists(): shutil.copy(runs.parent/f'{name}.csv', tmp_path)
        p = results.ArtifactParameters(dataset=dataset, preset=preset, tables=str(tmp_path))
        for n in REFERENCE:
            for f in artifacts.write_table(n, p):
                assert f.read_bytes() == (runs.parent/f.name).read_bytes(), f
        assert set(results.read_runs(runs)['device']) != {'demo'}


def test_every_cell_resolves_to_rows_of_runs(made):
    runs = results.read_runs(made.tables_path/'runs.csv')
    for n in REFERENCE:
        t = table(made, n)
        for r in t[t['n'] > 0].itertuples():
            rows = results.rows_where(runs, variant=r.variant, dataset=r.dataset, tag=r.tag)
            own = 'fused' if r.score == 'own' and 'fused' in set(rows['score']) else 'dual'
            of_seeds = rows['seed'].isin([int(s) for s in r.seeds.split()])
            values = rows[(rows['score'] == own) & of_seeds][r.metric]
            assert len(values) == r.n
            np.testing.assert_allclose([r.ours, r.sd], [values.mean(), values.std()], rtol=1e-12)


# ---- what is kept of runs

@pytest.fixture
def kept(tmp_path):
    "Two finished runs with features, archived."
    for c in (WHOLE, TAGGED): with_features(tmp_path/'runs', c)
    files = archive.keep_runs(tmp_path/'runs', results.collect_runs(tmp_path/'runs'), tmp_path/'tables')
    assert [f.name for f in files] == ['kept-seed0-full.zip', 'kept-seed0-readings.zip']
    return tmp_path


WHOLE = make_config('synth', 'smoke', 'full')
TAGGED = make_config('synth', 'smoke', 'full', tag='margin=0.5', margin=.5)


def with_features(root, c):
    testing.demo_run(folder := run_dir(c, root), c)
    rng, t = np.random.default_rng(0), load_file(folder/'features.safetensors')
    t |= {k: rng.normal(size=(40, 8)).astype(np.float32) for k in results.KEPT_FEATURES}
    t['top'] = rng.permuted(np.tile(np.arange(20), (40, 1)), axis=1)
    save_file(t | {'dual.rank': np.ones(40)}, folder/'features.safetensors', {'about': 'it'})
    save_file(dict(x=np.ones(3)), folder/'look-something.safetensors')
    (folder/'best.safetensors').write_bytes(b'weights')


def names(folder): return {f.name for f in folder.iterdir()}


def test_what_comes_back(kept):
    back = archive.restore_runs(kept/'back', kept/'tables', [WHOLE, TAGGED])
    assert set(back) == {run_dir(c, kept/'back') for c in (WHOLE, TAGGED)}
    for c in (WHOLE, TAGGED):
        here, there = run_dir(c, kept/'runs'), run_dir(c, kept/'back')
        assert names(there) == names(here) - {'best.safetensors'}
        for f in names(there) - {'features.safetensors'}:
            assert (here/f).read_bytes() == (there/f).read_bytes()
        t, u = load_file(here/'features.safetensors'), load_file(there/'features.safetensors')
        for k in t:
            if k.endswith(('R1', 'AP', 'q_rows')): np.testing.assert_array_equal(t[k], u[k])
        assert (set(results.KEPT_FEATURES) <= set(u)) == (c is WHOLE)
    t, u = (load_file(run_dir(WHOLE, kept/x)/'features.safetensors') for x in ('runs', 'back'))
    for k in results.KEPT_FEATURES: np.testing.assert_array_equal(results.half(t[k]), u[k].astype(np.float32))
    np.testing.assert_array_equal(t['top'][:, :archive.RANKED_IMAGES], u['top'])


def test_keeping_what_came_back_changes_nothing(kept):
    before = {f.name: f.read_bytes() for f in (kept/'tables').iterdir()}
    archive.restore_runs(kept/'back', kept/'tables', [WHOLE, TAGGED])
    archive.keep_runs(kept/'back', results.collect_runs(kept/'back'), kept/'tables')
    assert {f.name: f.read_bytes() for f in (kept/'tables').iterdir()} == before


def test_features_are_kept_of_the_first_seeds_alone():
    assert archive.kept_features('full', '', 0) == results.KEPT_FEATURES
    assert archive.kept_features('full', '', results.FEATURE_SEEDS - 1) == ('f_id', 'f_clo', 'g', 'w')
    assert archive.kept_features('full', '', results.FEATURE_SEEDS) == ()
    assert archive.kept_features('full', 'margin=0.5', 0) == archive.kept_features('sdm', '', 0) == ()


def test_the_kept_runs_of_the_repository_leave_room():
    "15 MiB for 250 runs: what a run without features takes is known from those that are kept."
    def size(file): return sum(part.stat().st_size for part in archive.archive_parts(file))
    files = sorted((REPO/'tables').glob('kept-seed*.zip'))
    runs = {file: len(archive.read_kept(file)) for file in files}
    later = [file for file in files if not file.stem.startswith('kept-seed0')]
    plain = [file for file in later if not any(file.stem.endswith(f'-{v}') for v in archive.RANKED)]
    each = sum(map(size, plain))/sum(runs[file] for file in plain)
    assert sum(map(size, files)) + max(0, 250 - sum(runs.values()))*each < 15*2**20


def test_runs_of_other_machines_stay_in_the_archive(kept):
    other = make_config('synth', 'smoke', 'full', tag='margin=0.7', margin=.7)
    testing.demo_run(run_dir(other, kept/'more'), other)
    archive.keep_runs(kept/'more', results.collect_runs(kept/'more'), kept/'tables')
    assert len(archive.restore_runs(kept/'back', kept/'tables', [WHOLE, TAGGED, other])) == 3


def test_other_options_do_not_come_back(kept):
    others = [make_config('synth', 'smoke', 'full', margin=.4), make_config('synth', 'smoke', 'baseline')]
    assert archive.restore_runs(kept/'back', kept/'tables', others) == []
    assert not (kept/'back').exists()


def test_what_was_begun_here_stays_and_other_options_make_room(kept):
    here = run_dir(WHOLE, kept/'runs')
    (here/'metrics.json').unlink(); (here/'last.ckpt').write_bytes(b'half way')
    assert archive.restore_runs(kept/'runs', kept/'tables', [WHOLE]) == [] and (here/'last.ckpt').exists()
    (here/'config.json').write_text('{"config_hash": "of other options"}')
    assert archive.restore_runs(kept/'runs', kept/'tables', [WHOLE]) == [here]
    assert (here/'metrics.json').exists() and not (here/'last.ckpt').exists()


def test_a_cut_archive_is_one_clear_line(kept):
    file = kept/'tables'/'kept-seed0-full.zip'
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match='no archive of runs'):
        archive.restore_runs(kept/'back', kept/'tables', [WHOLE])
    with pytest.raises(UserError, match='no archive of runs'):
        archive.keep_runs(kept/'runs', results.collect_runs(kept/'runs'), kept/'tables')
    assert file.stat().st_size > 1000


# ---- the print

@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_printed_numbers_and_order(made, n):
    t = table(made, n)
    for score in ('own', 'dual'):
        own = results.rows_where(t, score=score)
        rows = own.pivot_table(index='method', columns='metric', values='paper', sort=False)
        assert [dict(method=m, **r) for m, r in rows[list(MAIN)].iterrows()] == PRINTED[f'table{n}']['rows']


def test_printed_numbers_of_table5(made):
    t = table(made, 5)
    quoted = t[t['score'] == 'quoted'].set_index(['method', 'dataset', 'metric'])['paper']
    rows = PRINTED['table5']['rows']
    assert list(dict.fromkeys(quoted.index.get_level_values(0))) == [r['method'] for r in rows]
    printed = {(r['method'], d, m): r[d].get(m) for r in rows for d in ('cuhk', 'icfg', 'rstp') for m in MAIN}
    assert {k: None if np.isnan(v) else v for k, v in quoted.items()} == printed


@pytest.mark.parametrize('ending', ['md', 'tex'])
def test_two_decimals_as_printed(made, ending):
    text = (made.tables_path/f'table3.{ending}').read_text()
    for r in PRINTED['table3']['rows']:
        for m in MAIN: assert re.search(rf'(?<![\d.]){r[m]:.2f}(?!\d)', text)


# ---- what is missing

def test_a_variant_without_runs_is_a_dash_and_a_note(made):
    t = table(made, 3)
    gone = t[t['variant'] == 'no_gate_reg']
    assert len(gone) and gone[['ours', 'sd', 'diff', 'lo', 'hi']].isna().all(None) and (gone['n'] == 0).all()
    md = (made.tables_path/'table3.md').read_text()
    assert '–: no finished run yet: w/o Gate Reg.' in md
    row = next(l for l in md.splitlines() if l.startswith('| w/o Gate Reg.'))
    assert row.split(' | ')[2] == '–'


def test_fewer_seeds_are_said(few):
    shutil.rmtree(few.runs_path/'synth'/'smoke'/'bdam_no_gate'/'seed1')
    artifacts.collect(few)
    artifacts.write_table(1, few)
    t = table(few, 1)
    one = t[t['variant'] == 'bdam_no_gate']
    assert (one['n'] == 1).all() and one['sd'].isna().all() and one['diff'].notna().all()
    assert 'Fewer seeds than the other rows: w/o Gate: 1 (0).' in (few.tables_path/'table1.md').read_text()


def test_without_the_reference_there_are_no_differences(few):
    shutil.rmtree(few.runs_path/'synth'/'smoke'/'bdam')
    artifacts.collect(few)
    artifacts.write_table(1, few)
    assert table(few, 1)['diff'].isna().all()


def test_an_unfinished_run_does_not_count(few):
    (few.runs_path/'synth'/'smoke'/'bdam'/'seed0'/'metrics.json').unlink()
    runs = results.collect_runs(few.runs_path)
    assert set(runs[runs['variant'] == 'bdam']['seed']) == {1}


def test_no_table_of_ours_from_nothing(tmp_path):
    runs = pd.DataFrame(columns=results.RUN_COLUMNS)
    for n in REFERENCE:
        t, _ = artifacts.build_table(n, runs)
        assert t['ours'].isna().all() and (t['n'] == 0).all()
        assert artifacts.table_markdown(n, t, '') and artifacts.table_latex(n, t, '')


# ---- the numbers

def test_interval_is_that_of_the_queries(made):
    "A row that wins every query wins by exactly that, whatever is drawn."
    runs = results.read_runs(made.tables_path/'runs.csv')
    bdam = results.variant_results(made.runs_path, results.rows_where(runs, variant='bdam', tag=''), 'own')
    a, b = (replace(bdam, values={m: np.full_like(v, x) for m, v in bdam.values.items()}) for x in (70., 64.))
    rows = results.comparison_rows(a, b, 'own', dict.fromkeys(results.METRICS))
    for r in rows: assert (r['diff'], r['lo'], r['hi']) == (6., 6., 6.)


def test_ties_are_all_bold():
    t, words = artifacts.build_table(1, pd.DataFrame(columns=results.RUN_COLUMNS))
    t.loc[t['metric'] == 'R1', 'ours'] = [40.004, 40.001, 39.99, 12., float('nan'), 1.]*2
    t.loc[t['ours'].notna(), 'n'] = 1
    lines = [l for l in artifacts.table_markdown(1, t, words).splitlines() if l.startswith('| ')][2:7]
    assert [l.split(' | ')[4] for l in lines] == ['**40.00**', '**40.00**', '39.99', '12.00', '–']
    assert artifacts.table_latex(1, t, words).count(r'\textbf{40.00}') == 2


def test_floats_and_hashes_survive(few, tmp_path):
    runs = results.collect_runs(few.runs_path)
    runs.loc[0, 'config_hash'], runs.loc[1, 'config_hash'] = '123456789012', '12e456789012'
    runs.loc[0, 'R1'] = 0.1 + 0.2
    pd.testing.assert_frame_equal(results.read_runs(results.write_csv(runs, tmp_path/'r.csv')), runs)


# ---- LaTeX

@pytest.mark.parametrize('n', list(REFERENCE))
def test_latex_is_balanced(made, n):
    text = (made.tables_path/f'table{n}.tex').read_text()
    assert text.isascii()
    bare = re.sub(r'\\[\\{}%&#_$]', '', text)
    assert bare.count('{') == bare.count('}') and bare.count('$') % 2 == 0
    assert not re.search('[%_#&^~]', re.sub(r'\{%\n| & ', '', bare))
    assert text.count(r'\toprule') == text.count(r'\bottomrule') > 0
    for e in ('tabular', 'table*'): assert text.count(rf'\begin{{{e}}}') == text.count(rf'\end{{{e}}}') > 0


@pytest.mark.parametrize('n', list(REFERENCE))
def test_latex_rows_have_the_columns_of_their_tabular(made, n):
    text = (made.tables_path/f'table{n}.tex').read_text()
    for spec, body in re.findall(r'\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}', text, re.S):
        for line in [l for l in body.splitlines() if l.endswith(r'\\')]:
            cells = re.split(r'(?<!\\)&', line)
            spans = [re.match(r'\s*\\multicolumn\{(\d+)\}', c) for c in cells]
            assert sum(int(m[1]) if m else 1 for m in spans) == len(spec), line


def test_latex_escapes():
    assert artifacts.tex('50 % of a_b & c#$ ±') == r'50 \% of a\_b \& c\#\$ $\pm$'
    assert artifacts.tex('~^\\') == r'\textasciitilde{}\textasciicircum{}\textbackslash{}'


# ---- captions

def test_caption_says_what_a_reader_needs(made):
    words = (made.tables_path/'table1.md').read_text().splitlines()[0]
    for part in ('SynthPEDES', 'preset smoke', 'seeds 0, 1', 'Code demo', '+ BDAM'): assert part in words
    for part in ('no reproduction', 'a caption alone asks'): assert part in words


# ---- mistakes

def spoil(few, edit):
    path = few.runs_path/'synth'/'smoke'/'bdam'/'seed1'/'metrics.json'
    m = json.loads(path.read_text())
    edit(m)
    path.write_text(json.dumps(m))


def change_epochs(few):
    path = few.runs_path/'synth'/'smoke'/'bdam'/'seed1'/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(epochs=3)))


def shuffle_queries(few):
    path = few.runs_path/'synth'/'smoke'/'bdam'/'seed1'/'features.safetensors'
    t = load_file(path)
    save_file(t | dict(q_rows=t['q_rows'] + 1), path)


def cut_features(few): (few.runs_path/'synth/smoke/bdam/seed1/features.safetensors').write_bytes(b'cut')


@pytest.mark.parametrize('harm, says', [
    (lambda f: spoil(f, lambda m: m.update(config_hash='0'*12)), 'different runs'),
    (lambda f: spoil(f, lambda m: m.pop('epoch')), "'epoch'"),
    (lambda f: (f.runs_path/'synth/smoke/bdam/seed1/metrics.json').write_text('{'), 'not a JSON object'),
    (lambda f: (f.runs_path/'synth/smoke/bdam/seed1/provenance.json').unlink(), 'missing'),
    (cut_features, 'cannot be read'),
    (change_epochs, "{'epochs': 3}"),
    (shuffle_queries, 'other queries'),
], ids=['hash', 'key', 'json', 'provenance', 'features', 'budget', 'queries'])
def test_a_spoiled_run_is_refused(few, harm, says):
    harm(few)
    with pytest.raises(UserError, match=re.escape(says)): artifacts.collect(few)
    assert not few.tables_path.exists() or not list(few.tables_path.glob('differences.csv'))


def test_differences_of_other_runs_are_refused(few):
    artifacts.collect(few)
    path = few.tables_path/'runs.csv'
    t = results.read_runs(path)
    results.write_csv(t.assign(R1=t['R1'].where(t['variant'] != 'baseline', t['R1'] + 1)), path)
    with pytest.raises(UserError, match=r'differences\.csv does not belong'): artifacts.write_table(1, few)


def test_bad_files_are_refused(few, tmp_path):
    with pytest.raises(UserError, match=r'collect\.ipynb'): artifacts.write_table(1, few)
    artifacts.collect(few)
    path = few.tables_path/'runs.csv'
    t = results.read_runs(path)
    results.write_csv(pd.concat([t, t[:1]]), path)
    with pytest.raises(UserError, match='stands twice'): artifacts.write_table(1, few)
    results.write_csv(t.drop(columns='seed'), path)
    with pytest.raises(UserError, match='must have the columns'): artifacts.write_table(1, few)


def test_presets_do_not_mix(few):
    runs = results.collect_runs(few.runs_path)
    both = pd.concat([runs, runs.assign(preset='tiny')])
    with pytest.raises(UserError, match='several presets'): artifacts.build_table(1, both)


# ---- the grid

def test_grid_has_what_the_tables_name():
    have = {(c.variant, c.tag) for c in grid(seeds=[0])}
    assert {(row.variant, row.tag) for n in REFERENCE for row in table_rows(n)} <= have
    assert {v for v, _ in have} == set(VARIANTS) - {'baseline_all_texts'}      # of 90_change
    assert len(have) == len(grid(seeds=[0]))


def test_real_data_without_a_model_has_no_other_styles():
    assert not [c for c in grid('cuhk', styles=False) if c.variant.startswith('style_')]
    assert {c.preset for c in grid('cuhk')} == {'paper'}
    extra_rows = {'clothing=both', 'clothing=literal', AS_PRINTED}             # of Tables 1 to 3
    assert {c.tag for c in grid('cuhk')} == {'', *extra_rows}


def test_unknown_variant():
    with pytest.raises(UserError, match='bdamm'): grid(variants=['bdamm'])
