"""Bad inputs, one table: each ends in one line that says what is wrong, where, and how to mend it.

A row is what somebody did, the call that meets it, and words that the line must have. The files stay as they
were, and nothing half-written is left. Whole programs, with their exit codes, stand below the table."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdam_repro.config import Options, UserError, make_config, run_dir
from bdam_repro.describers import DescribeParameters, check_parameters, describe_dataset
from bdam_repro.encoders import checkpoint_config, load_encoder
from bdam_repro.files import read_tensors, write_tensors
from bdam_repro.gallery import list_pictures
from bdam_repro.grid import grid
from bdam_repro.hub import hub_folder
from bdam_repro.panel import search_parameters
from bdam_repro.parameters import from_globals
from bdam_repro.pedes import load_pedes
from bdam_repro.pretrained import from_pretrained
from bdam_repro.ranked import load_run
from bdam_repro.results import artifact_parameters
from bdam_repro.run_data import check_encoders, load_data
from bdam_repro.runs import train
from bdam_repro.search import Gallery
from bdam_repro.style import cluster_styles
from bdam_repro.trained import TrainedModel

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A small dataset in the layout of CUHK-PEDES, and a finished run."
    root = tmp_path_factory.mktemp('world')
    c = make_config(preset='smoke', data_root=str(root/'data'), epochs=1)
    load_data(c, progress=False)
    drawn = root/'data'/c.folder
    shutil.copytree(drawn, root/'data'/'CUHK-PEDES')
    for name in ('synth.json', 'factors.jsonl'): (root/'data'/'CUHK-PEDES'/name).unlink(missing_ok=True)
    folder = train(c, root/'runs', progress=False)
    folder.rename(root/'run')
    return root


def rows_of(w): return w/'data/CUHK-PEDES/reid_raw.json'

def edit(w, change):
    rows = json.loads(rows_of(w).read_text())
    change(rows)
    rows_of(w).write_text(json.dumps(rows))

def set_first(**fields): return lambda w: edit(w, lambda rows: rows[0].update(fields))
def put(name, content): return lambda w: (w/name).write_bytes(content)
def said(name, text): return put(f'data/CUHK-PEDES/{name}', text.encode())

def described(*lines):
    return said('descriptions.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))

def cuhk(w): return load_pedes('cuhk', w/'data')
def training(w, **options):
    c = make_config('cuhk', 'smoke', data_root=str(w/'data'), **options)
    return train(c, w/'new', progress=False)

def checkpoint(content):
    def make(w):
        (w/'vit').mkdir()
        if content is not None: (w/'vit'/'config.json').write_bytes(content)
    return make

def tower(w): return checkpoint_config(w/'vit', 'vision')
def weights(w): return load_encoder(w/'vit', tower(w))
def ask(**names): return lambda w: check_parameters(names)
def options(**names): return lambda w: from_globals(names)
def describe(**names):
    return lambda w: describe_dataset(cuhk(w), DescribeParameters(out=str(w/'out.jsonl'), **names))

def cut_run(name, keep):
    def damage(w): (w/'run'/name).write_bytes((w/'run'/name).read_bytes()[:keep])
    return damage

def nothing(w): pass
def one_photo(w):
    (w/'photos').mkdir()
    Image.new('RGB', (16, 32)).save(w/'photos'/'a.png')

def gallery(w, **more): return Gallery.build(str(w/'run'), w/'photos', w/'gallery', progress=False, **more)

VIT = b'{"model_type": "vit"}'
GOOD = {'image': 'x.jpg', 'identity': 'A man.', 'clothing': 'A coat.'}
TABLE = {
    # datasets
    'no folder': (lambda w: shutil.rmtree(w/'data'/'CUHK-PEDES'), cuhk, 'CUHK-PEDES'),
    'no annotations': (lambda w: rows_of(w).unlink(), cuhk, 'reid_raw.json'),
    'annotations cut': (said('reid_raw.json', '[{"split": '), cuhk, 'not JSON'),
    'annotations empty': (said('reid_raw.json', ''), cuhk, 'reid_raw.json'),
    'annotations of another kind': (said('reid_raw.json', '{"a": 1}'), cuhk, 'reid_raw.json'),
    'a key missing': (lambda w: edit(w, lambda rows: rows[3].pop('captions')), cuhk, 'row 3'),
    'a number as path': (set_first(file_path=7), cuhk, 'row 0'),
    'a path that climbs out': (set_first(file_path='../../secret.jpg'), cuhk, 'row 0'),
    'an absolute path': (set_first(file_path='/etc/hostname'), cuhk, 'row 0'),
    'a split of another name': (set_first(split='training'), cuhk, 'row 0'),
    'a person who is a word': (set_first(id='Ann'), cuhk, 'row 0'),
    'captions that are numbers': (set_first(captions=[1, 2]), cuhk, 'row 0'),
    'unknown dataset': (nothing, lambda w: load_pedes('market', w), 'choose one of'),
    'validation share of one': (nothing, lambda w: load_pedes('cuhk', w/'data', val_fraction=1.),
        'val_fraction'),
    'a picture gone': (lambda w: next((w/'data/CUHK-PEDES/imgs').rglob('*.jpg')).unlink(), training,
        'no such image'),
    'a picture cut': (lambda w: [p.write_bytes(p.read_bytes()[:99])
                                 for p in (w/'data/CUHK-PEDES/imgs').rglob('*.jpg')], training,
                                     'not a readable'),
    'no captions for training': (lambda w: [edit(w, lambda rows: [
        row.update(captions=[]) for row in rows if row['split'] == 'train']),
        (w/'data/CUHK-PEDES/descriptions.jsonl').unlink()], training,
        "the split 'train' has pictures but no captions, so there is nothing"),
    # descriptions
    'a line cut': (said('descriptions.jsonl', '{"image": 3}\n{"ima'), cuhk, 'descriptions.jsonl'),
    'a line that is a list': (described([1, 2]), cuhk, 'descriptions.jsonl'),
    'a field missing': (described({'image': 'x.jpg'}), cuhk, 'descriptions.jsonl'),
    'of other pictures': (described(GOOD), cuhk, 'does not have'),
    'an identity that is a number': (described(GOOD | {'identity': 3}), cuhk, 'descriptions.jsonl'),
    'a file that is not there': (nothing, lambda w: training(w, descriptions='none.jsonl'), 'no such file'),
    'no styles file': (nothing, describe(model='m', styles_file='no.json', dry_run=True), 'no.json'),
    'an unknown describer': (nothing, describe(describer='oracle'), 'choose one of'),
    'the describer of another dataset': (nothing, describe(describer='synth'), 'choose split or mllm'),
    'a model without a name': (nothing, describe(describer='mllm'), '-p model'),
    'one price of two': (nothing, describe(model='m', price_in=1., dry_run=True), 'price_out'),
    # checkpoints
    'no checkpoint': (nothing, lambda w: hub_folder('./nowhere'), 'no folder'),
    'no config.json': (checkpoint(None), tower, 'config.json'),
    'config.json cut': (checkpoint(b'{"model_type": '), tower, 'not JSON'),
    'config.json a list': (checkpoint(b'[1]'), tower, 'config.json'),
    'another architecture': (checkpoint(b'{"model_type": "resnet"}'), tower, 'resnet'),
    'no weights': (checkpoint(b'\xef\xbb\xbf' + VIT), weights, 'model.safetensors'),     # a BOM is no mistake
    'weights of a run cut': (cut_run('best.safetensors', 900),
        lambda w: from_pretrained(w/'run/best.safetensors'),
                             'not a whole safetensors'),
    'tensors of somebody else': (lambda w: write_tensors(w/'x.safetensors', {'a': torch.ones(2)}, {}),
                                 lambda w: from_pretrained(w/'x.safetensors'), 'x.safetensors'),
    'a text as weights': (put('x.safetensors', b'hello'), lambda w: read_tensors(w/'x.safetensors'),
        'x.safetensors'),
    'a run that is not finished': (lambda w: (w/'run'/'metrics.json').unlink(), lambda w: load_run(w/'run'),
                                   'no finished run'),
    'metrics of a run cut': (cut_run('metrics.json', 30), lambda w: load_run(w/'run'), 'metrics.json'),
    'both encoders missing': (nothing, lambda w: check_encoders(make_config('cuhk', vision='./a',
        text='./b')),
                              'vision=./a, text=./b'),
    # configurations
    'an unknown option': (nothing, lambda w: make_config(epoch=3), "did you mean 'epochs'"),
    'a word for a number': (nothing, lambda w: make_config(epochs='three'), 'epochs'),
    'no epochs': (nothing, lambda w: make_config(epochs=0), 'epochs'),
    'nan': (nothing, lambda w: make_config(lr=float('nan')), 'lr'),
    'an unknown variant': (nothing, lambda w: make_config(variant='best'), 'choose one of'),
    'an unknown preset': (nothing, lambda w: make_config(preset='large'), 'choose one of'),
    'heads that do not divide': (nothing, lambda w: make_config(dim=97), 'multiple of bdam_heads'),
    'nothing to learn': (nothing, lambda w: make_config(variant='baseline', c_align=0.), 'c_align'),
    'an unknown way with equal texts': (nothing, lambda w: make_config(equal_texts='merge'), 'equal_texts'),
    # parameters of notebooks
    'a parameter misspelled': (nothing, options(dataset='cuhk', sed=2), "did you mean 'seed'"),
    'a parameter of describe misspelled': (nothing, ask(modle='m'), 'unknown parameter'),
    'a word for a limit': (nothing, ask(limit='ten'), 'limit'),
    'a parameter of search misspelled': (nothing, lambda w: search_parameters(dict(querry='a')), 'querry'),
    'a score that is none': (nothing, lambda w: search_parameters(dict(score='pair')), 'score'),
    'a parameter of a table misspelled': (nothing, lambda w: artifact_parameters(dict(table='x')), 'table'),
    # workflow
    'a variant that no table needs': (nothing, lambda w: grid(variants=['best']), 'no table or figure'),
    'a clustering that is none': (nothing, lambda w: cluster_styles(np.eye(3), 'birch'), 'choose one of'),
    # search
    'no pictures': (lambda w: (w/'photos').mkdir(), lambda w: list_pictures(w/'photos'), 'photos'),
    'no folder of pictures': (nothing, lambda w: list_pictures(w/'photos'), 'photos'),
    'no model': (one_photo, lambda w: Gallery.build(str(w/'nowhere'), w/'photos', progress=False), 'nowhere'),
    'an empty query': (one_photo, lambda w: gallery(w).search('  '), 'say in a few words'),
    'no hits asked for': (one_photo, lambda w: gallery(w).search('a man', k=0), 'one picture'),
    'a model without its tokenizer': (lambda w: shutil.rmtree(w/'run'/'tokenizer'),
                                      lambda w: TrainedModel.from_pretrained(w/'run'), 'tokenizer'),
}


def test_there_are_as_many_as_the_readme_says():
    said, = re.findall(r'^\| (\d+) bad inputs', (REPO/'README.md').read_text(), re.M)
    assert len(TABLE) == int(said) >= 40


def files(folder): return {p.relative_to(folder).as_posix() for p in folder.rglob('*')}
def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize('case', TABLE)
def test_one_line_that_says_what_where_and_how_to_mend(world, tmp_path, case):
    damage, call, words = TABLE[case]
    here = tmp_path/'here'
    shutil.copytree(world, here, copy_function=os.link)             # linked, so that it is quick
    for name in ('data/CUHK-PEDES', 'run'):                         # what is damaged is a copy
        shutil.rmtree(here/name)
        shutil.copytree(world/name, here/name)
    damage(here)
    before, as_it_was = files(here), contents(here)
    with pytest.raises(UserError) as e: call(here)
    line = str(e.value)
    assert words in line and '\n' not in line and 20 < len(line) < 600, line
    left = {name for name in files(here) - before if not name.startswith(('new', 'gallery'))}
    assert left <= {'data/CUHK-PEDES/.prepared'}, left
    after = contents(here)
    assert [name for name, data in as_it_was.items() if after.get(name) != data] == []
    assert not [name for name in files(here) if name.endswith('.tmp') or Path(name).name.startswith('.tmp')]
    assert not list(here.rglob('new/**/metrics.json')) and not (here/'out.jsonl').exists()


# ---- whole programs: the exit code is not zero, and no traceback

BIN = Path(sys.executable).parent
PROGRAMS = {
    'train': ([BIN/'papermill', 'nbs/train.ipynb', '-p', 'dataset', 'market'], 'dataset'),
    'styles': ([BIN/'papermill', 'nbs/styles.ipynb', '-p', 'methods', 'birch', '-p', 'preset', 'smoke'],
        'birch'),
    'search': ([BIN/'papermill', 'nbs/search.ipynb', '-p', 'k', 'ten'], 'parameter k'),
    'workflow': ([BIN/'snakemake', '--snakefile', 'workflow/Snakefile', '--cores', '1', '--dry-run',
        '--config',
                  'variants=[best]'], 'no table or figure'),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize('name', PROGRAMS)
def test_a_program_ends_with_an_error(tmp_path, name):
    command, words = PROGRAMS[name]
    own = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'BDAM_ROOT': str(tmp_path)}
    r = subprocess.run(list(map(str, command)), cwd=REPO, env=own, capture_output=True, text=True,
                       stdin=subprocess.DEVNULL)
    assert r.returncode != 0 and words in r.stdout + r.stderr, r.stdout + r.stderr
    assert 'Traceback' not in r.stdout + r.stderr
    assert not list(tmp_path.rglob('metrics.json')) and not list(tmp_path.rglob('*.tmp'))


def test_every_options_class_refuses_what_it_does_not_know():
    for kind in [Options, *Options.__subclasses__()]:
        with pytest.raises(ValueError): kind(no_such_option=1)


def test_a_tilde_is_the_home_folder_in_every_path(world, tmp_path, monkeypatch):
    "Written into a cell or a file, no shell replaces it: no folder may be called `~`."
    home, away = tmp_path/'home', tmp_path/'away'
    shutil.copytree(world, home)
    away.mkdir()
    one_photo(home)
    (home/'styles.json').write_text('[["A man in red."]]')
    first = (home/'data'/'CUHK-PEDES'/'descriptions.jsonl').read_text().split('\n')[0]
    (home/'mine.jsonl').write_text(first + '\n')
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.chdir(away)
    c = make_config(preset='smoke')
    assert run_dir(c, '~/runs') == run_dir(c, home/'runs')
    settings = artifact_parameters(dict(runs='~/runs', tables='~/t', figures='~/f'))
    found = settings.runs_path, settings.tables_path, settings.figures_path
    assert found == (home/'runs', home/'t', home/'f')
    p = DescribeParameters(model='m', styles_file='~/styles.json', out='~/out.jsonl', dry_run=True)
    assert describe_dataset(load_pedes('cuhk', '~/data'), p)[1] == home/'out.jsonl'
    mine = load_data(make_config('cuhk', 'smoke', data_root='~/data', descriptions='~/mine.jsonl'), False)
    assert mine.records.id_text.notna().sum() == 1
    assert load_run('~/run').config.preset == 'smoke'
    assert len(Gallery.build('~/run', '~/photos', '~/gallery', progress=False).search('a man', k=1)) == 1
    assert len(Gallery('~/run', '~/gallery').search('a man', k=1)) == 1
    assert (home/'gallery').is_dir() and not list(away.iterdir())
