"The workflow as it is started: what it lists, and that a killed one goes on where it stopped."
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bdam_repro.config import config_hash, run_dir
from bdam_repro.grid import DATA, LAYOUT_TAGS, audit_grid, design_grid, grid, lean_grid

pytest.importorskip('snakemake')
pytestmark = pytest.mark.timeout(1200)        # processes that start processes, on a machine that may be busy
REPO = Path(__file__).resolve().parent.parent
SNAKEMAKE = [str(Path(sys.executable).parent/'snakemake'), '--snakefile', str(REPO/'workflow'/'Snakefile'),
             '--profile', str(REPO/'workflow'/'profiles'/'local'), '--cores', '1']
TOY = ['preset=smoke', 'layouts=false', 'seeds=[0,1]', 'variants=[baseline]']
COLLECTED = 'tables/synth-smoke/runs.csv'


def environment(root):
    inherited = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    return inherited | {'BDAM_ROOT': str(root), 'OMP_NUM_THREADS': '1'}


def snakemake(root, *args, config=TOY, targets=()):
    "Exit code and all that it says."
    command = [*SNAKEMAKE, *args, '--config', *config, '--', *targets]
    r = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True)
    return r.returncode, r.stdout + r.stderr


def jobs(said):
    "The table of a dry run."
    return {m[1]: int(m[2]) for m in re.finditer(r'(?m)^(\w+) +(\d+)$', said)}


@pytest.fixture(scope='module')
def root(tmp_path_factory): return tmp_path_factory.mktemp('workflow')


# ---- what is listed

def different(configs): return len({run_dir(c) for c in configs})      # two runs are in two lists


def test_dry_run_lists_the_grid(root):
    code, said = snakemake(root, '--dry-run', '--quiet', 'rules', config=['dataset=synth'])
    found, runs = jobs(said), different(lean_grid(grid(layouts=False), frozen=False))
    assert code == 0 and found['train'] == runs
    assert found['styles'] == 1 and found['collect'] == 1
    assert all(found[f'table{n}'] == 1 for n in range(1, 6)) and found['audit'] == 1
    assert f'{runs} of {runs} runs to train; no run of this kind is finished yet' in said
    assert not (root/'runs').exists()


def test_runs_of_audit_and_layouts_are_asked_for(root):
    plan, full = ('--dry-run', '--quiet', 'rules'), grid(variants=['full'], layouts=False)
    tables = lean_grid(grid(layouts=False), frozen=False)
    of_audit = tables + audit_grid() + design_grid()
    more = tables + audit_grid(seeds=(0, 1)) + design_grid()
    for config, runs in (('audit=true', of_audit), ('audit=true audit_seeds=[0,1]', more),
                         ('layouts=true', lean_grid(grid(), False)), ('variants=[full]', full)):
        code, said = snakemake(root, *plan, config=['dataset=synth', *config.split()])
        assert code == 0 and jobs(said)['train'] == different(runs), config
    code, said = snakemake(root, *plan, config=['dataset=synth', 'audit=true', 'layouts=true'])
    folders = ({c.tag for c in audit_grid()} & set(DATA)) - set(LAYOUT_TAGS)
    assert code == 0 and jobs(said)['styles'] == 3 + len(folders)
    quick = '--configfile', str(REPO/'workflow'/'quick.yaml')
    code, said = snakemake(root, *quick, *plan, config=['dataset=synth'])
    assert code == 0 and jobs(said)['train'] == len(grid(seeds=[0], layouts=False))


def test_fusions_on_frozen_towers_are_not_trained_again(tmp_path):
    plan, few = ('--dry-run', '--quiet', 'rules'), 'seeds=[0]'
    (tmp_path/'tables').mkdir()
    (tmp_path/'tables'/'fusion.csv').touch()
    code, said = snakemake(tmp_path, *plan, config=['dataset=synth', few])
    needed = lean_grid(grid(seeds=[0], layouts=False), frozen=True)
    assert code == 0 and jobs(said)['train'] == len(needed)
    code, said = snakemake(tmp_path, *plan, config=['dataset=synth', few, 'variants=[fusion]'])
    assert code == 0 and jobs(said)['train'] == 1                        # whoever names it, gets it


def test_dry_run_of_real_data(root):
    code, said = snakemake(root, '--dry-run', '--quiet', 'rules', config=['dataset=cuhk', 'model=a-model'])
    assert code == 0 and jobs(said)['train'] == len(grid('cuhk'))
    assert jobs(said)['describe'] == 7 and jobs(said)['styles'] == 1
    code, said = snakemake(root, '--dry-run', '--quiet', 'rules', config=['dataset=cuhk'])
    assert code == 0 and jobs(said)['train'] == len(grid('cuhk', styles=False))
    assert jobs(said)['describe'] == 1


@pytest.mark.parametrize('typed, words', [
    ('dataset=market', ['market']),
    ('variant=[full]', ["no 'variant'", "did you mean 'variants'"]),
    ('redo=yes', ["redo='yes'", 'true or false']),
    ('audit=flase', ["audit='flase'", 'true or false']),
    ('seeds=[a]', ['seeds', "'a", 'which, such as']),
    ('seeds=0', ['how many, such as 3']),
    ('kept=true', ['no kept runs in tables/', '`make paper`']),
    ('kept=true redo=true', ['give one of them']),
    ('threads=two', ["threads='two'", 'whole number']),
    ('options=epochs', ["options='epochs'", '{"epochs":4}'])])
def test_a_mistake_is_one_clear_line(root, typed, words):
    code, said = snakemake(root, '--dry-run', config=typed.split())
    assert code != 0 and 'Traceback' not in said
    for word in words: assert word in said, said
    assert not (root/'runs').exists()


def test_a_number_of_seeds_and_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    few = ['preset=smoke', 'layouts=false', 'variants=baseline', 'seeds=3']
    plan, data = ('--dry-run', '--quiet', 'rules'), 'data_root=~/reid'
    code, said = snakemake(tmp_path, *plan, config=[*few, 'runs=~/mine', data])
    assert code == 0 and jobs(said)['train'] == 3, said
    (tmp_path/'reid'/'CUHK-PEDES').mkdir(parents=True)
    (tmp_path/'reid'/'CUHK-PEDES'/'descriptions.jsonl').touch()          # the user's own, found in its place
    code, said = snakemake(tmp_path, *plan, config=['dataset=cuhk', data])
    assert code == 0 and jobs(said)['train'] and 'describe' not in jobs(said), said
    assert not (tmp_path/'~').exists()


def test_the_picture_shows_the_rules(root, tmp_path):
    spec = importlib.util.spec_from_file_location('graph', REPO/'workflow'/'graph.py')
    spec.loader.exec_module(graph := importlib.util.module_from_spec(spec))
    command = [*SNAKEMAKE, '--rulegraph', '--quiet', 'all', '--config', 'dataset=synth']
    dot = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True).stdout
    names, edges = graph.boxes(*graph.read_graph(dot))
    assert set(names) == {'styles', 'train', 'collect', 'table1-5', 'fig1-5', 'audit'}
    last = {('collect', x) for x in ('audit', 'fig1-5', 'table1-5')}
    assert edges == {('styles', 'train'), ('styles', 'collect'), ('train', 'collect'), *last}
    assert [graph.layers(names, edges)[n] for n in ('styles', 'train', 'collect', 'audit')] == [0, 1, 2, 3]
    graph.draw(names, edges, tmp_path/'graph.png')
    assert (tmp_path/'graph.png').stat().st_size > 10_000 and (REPO/'workflow'/'graph.png').exists()


# ---- a grid of two runs

@pytest.fixture(scope='module')
def killed(root):
    "The workflow, shot with all its children as soon as a run is done; what was done by then."
    command = [*SNAKEMAKE, '--config', *TOY, '--', COLLECTED]
    with open(root/'said', 'w') as said:
        started = dict(cwd=root, env=environment(root), start_new_session=True)
        p = subprocess.Popen(command, stdout=said, stderr=said, **started)
    deadline = time.monotonic() + 900
    while not list(root.glob('runs/**/*.done')) or not list(root.glob('runs/**/seed*/*.done')):
        assert p.poll() is None and time.monotonic() < deadline, (root/'said').read_text()
        time.sleep(.1)
    def under_way():                                          # a job has begun that has not finished
        said = (root/'said').read_text()
        return len(re.findall(r'^(?:local)?rule ', said, re.M)) > len(re.findall('^Finished job', said, re.M))
    while not under_way() and p.poll() is None: time.sleep(.05)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    return {f: f.stat() for f in root.glob('runs/**/metrics.json')}


@pytest.fixture(scope='module')
def resumed(root, killed):
    "Started again as `make paper` does."
    snakemake(root, '--unlock')
    code, said = snakemake(root, targets=[COLLECTED])
    assert code == 0, said
    return said


def test_no_finished_run_repeats(root, killed, resumed):
    assert len(killed) == 1
    for f, before in killed.items():
        assert (f.stat().st_mtime_ns, f.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_all_is_there(root, resumed):
    for c in grid('synth', 'smoke', seeds=(0, 1), layouts=False, variants=['baseline']):
        folder = run_dir(c, root/'runs')
        h = config_hash(c)
        assert {f'{h}.done', f'{h}.ipynb', 'metrics.json'} <= {f.name for f in folder.iterdir()}
    assert len((root/COLLECTED).read_text().splitlines()) == 1 + 2
    assert len((root/'tables/synth-smoke/styles.csv').read_text().splitlines()) == 1 + 7


def test_nothing_is_left_to_do(root, resumed):
    assert 'Nothing to be done' in snakemake(root, targets=[COLLECTED])[1]


def test_another_option_runs_again(root, resumed):
    (root/'own.yaml').write_text('options: {epochs: 3}\n')
    dry = '--configfile', 'own.yaml', '--dry-run', '--quiet', 'rules'
    code, said = snakemake(root, *dry, targets=[COLLECTED])
    assert code == 0 and jobs(said)['train'] == 2
    assert jobs(said)['collect'] == 1 and 'styles' not in jobs(said)
    assert 'going by 2 finished runs' in said


def test_an_interrupted_run_of_other_options_makes_room(root, resumed):
    here = root.with_name('here')                             # beside it: the paths in it are relative
    shutil.copytree(root, here)
    c, = grid('synth', 'smoke', seeds=(1,), layouts=False, variants=['baseline'], epochs=3)
    folder = run_dir(c, here/'runs')
    (folder/'metrics.json').unlink()
    for name in ('last.ckpt', 'previous.ckpt'): (folder/name).write_bytes(b'after some steps with 2 epochs')
    (here/'own.yaml').write_text('options: {epochs: 3}\n')
    done = folder.relative_to(here)/f'{config_hash(c)}.done'
    code, said = snakemake(here, '--configfile', 'own.yaml', targets=[str(done)])
    assert code == 0 and (here/done).exists(), said
    assert json.loads((folder/'metrics.json').read_text())['config_hash'] == config_hash(c)


def test_runs_of_other_code_are_named_and_can_be_made_anew_beside(root, resumed):
    metrics, = root.glob('runs/**/seed0/metrics.json')
    noted, before = metrics.with_name('provenance.json'), metrics.stat()
    made = json.loads(noted.read_text())
    def plan(*config):
        return snakemake(root, '--dry-run', '--quiet', 'rules', config=[*TOY, *config], targets=())
    code, said = plan()
    assert code == 0 and 'other code' not in said and 'noted their code' not in said
    noted.write_text(json.dumps(made | {'modules': made['modules'] | {'losses': 'before'}}))
    code, said = plan()
    assert code == 0 and 'finished runs of other code: 1 (losses changed since); `make paper REDO=1`' in said
    folder = re.search(r'anew in (runs/code-[0-9a-f]{8}),', said)[1]
    code, said = plan('redo=true')
    assert code == 0 and jobs(said)['train'] == 2 and jobs(said)['collect'] == 1
    assert not (root/folder).exists() and metrics.stat().st_mtime_ns == before.st_mtime_ns
    noted.write_text(json.dumps({k: v for k, v in made.items() if k != 'modules'}))
    code, said = plan()
    assert code == 0 and 'made before runs noted their code: 1' in said and 'other code' not in said
    noted.write_text(json.dumps(made))


@pytest.fixture
def elsewhere(root, resumed, tmp_path):
    "Another machine: what git has, and nothing else."
    shutil.copytree(root/'tables', tmp_path/'tables')
    return tmp_path


def test_kept_runs_are_put_back(root, elsewhere):
    code, said = snakemake(elsewhere, targets=[COLLECTED])
    assert code == 0 and '2 finished runs put back' in said and '0 of 2 runs to train' in said, said
    assert not list(elsewhere.glob('runs/**/seed*/*.ipynb'))
    assert len(list(elsewhere.glob('runs/**/seed*/*.done'))) == 2
    for f in (root/'tables/synth-smoke').iterdir():
        assert f.read_bytes() == (elsewhere/'tables/synth-smoke'/f.name).read_bytes(), f.name
    assert 'Nothing to be done' in snakemake(elsewhere, targets=[COLLECTED])[1]


def test_of_kept_runs_alone_nothing_is_trained(root, elsewhere):
    "Whatever seeds are asked for: all kept runs come back, and tables that are there are made again."
    config = [*TOY[:2], 'seeds=[0,5]', *TOY[3:], 'kept=true']
    code, said = snakemake(elsewhere, '--forcerun', 'collect', config=config, targets=[COLLECTED])
    assert code == 0 and '2 runs put back' in said and 'nothing was trained' in said, said
    assert 'train' not in jobs(said) and jobs(said)['collect'] == 1
    for f in (root/'tables/synth-smoke').iterdir():
        assert f.read_bytes() == (elsewhere/'tables/synth-smoke'/f.name).read_bytes(), f.name


def test_only_missing_kept_runs_are_trained(elsewhere):
    more_seeds = [*TOY[:2], 'seeds=[0,1,2]', *TOY[3:]]
    _, said = snakemake(elsewhere, '--dry-run', '--quiet', 'rules', config=more_seeds)
    assert jobs(said)['train'] == 1 and '1 of 3 runs to train' in said


def test_kept_runs_of_other_options_are_not(elsewhere):
    (elsewhere/'own.yaml').write_text('options: {epochs: 3}\n')
    _, said = snakemake(elsewhere, '--configfile', 'own.yaml', '--dry-run', '--quiet', 'rules')
    assert jobs(said)['train'] == 2 and 'put back' not in said and not list(elsewhere.glob('runs/**/seed*'))


def test_deleted_runs_are_noticed_though_tables_are_there(elsewhere):
    for f in elsewhere.glob('tables/**/kept-*.zip'): f.unlink()
    _, said = snakemake(elsewhere, '--dry-run', '--quiet', 'rules')
    assert jobs(said)['train'] == 2 and jobs(said)['styles'] == 1


def test_a_deleted_dataset_is_noticed(root, resumed):
    shutil.rmtree(root/'data')
    _, said = snakemake(root, '--dry-run', '--quiet', 'rules', config=[*TOY[:2], 'seeds=[0,1,2]', *TOY[3:]])
    assert jobs(said)['styles'] == 1
