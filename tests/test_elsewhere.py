"The second world and what models do there: the same bytes for everybody, nothing of home, honest refusals."
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from bdam_repro import transfer
from bdam_repro.captions import visible
from bdam_repro.config import UserError, make_config
from bdam_repro.elsewhere import (
    OTHER_ARRANGE,
    OTHER_CAMERAS,
    OTHER_GOING,
    OTHER_STYLES,
    Witness,
    captions_elsewhere,
    elsewhere_factors,
    render_elsewhere,
)
from bdam_repro.people import CAMERAS, OCCLUSIONS, VIEWS, image_factors, stream
from bdam_repro.probes import spec_of
from bdam_repro.runs import train
from bdam_repro.synth import Spec, picture_rows

TINY = spec_of(make_config('synth', 'tiny'), False)
NAMES = {'elsewhere.csv', 'elsewhere.md', 'elsewhere_differences.csv', 'elsewhere_people.csv.gz'}


def world(people) -> str:
    "All factors and captions of some people, as text."
    rows = [[elsewhere_factors(0, i, k), *(text for text, _ in captions_elsewhere(TINY, i, k))]
            for i in people for k in range(4)]
    return json.dumps(rows)


def test_factors_and_captions_are_those_that_the_tables_were_made_with():
    digest = hashlib.sha256(world(range(7200, 7220)).encode()).hexdigest()[:16]
    assert digest == 'ac1d389d242ad0f6', 'tables/elsewhere* are of another world: make them again'


def test_the_same_bytes_in_another_process():
    code = '''import hashlib
from bdam_repro.elsewhere import elsewhere_factors, render_elsewhere
people = range(7200, 7203)
pictures = [render_elsewhere(elsewhere_factors(0, i, k)).tobytes() for i in people for k in range(4)]
print(hashlib.sha256(b"".join(pictures)).hexdigest())'''
    def digest(seed):
        env = os.environ | {'PYTHONHASHSEED': seed}
        return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True,
                              check=True).stdout
    here = hashlib.sha256(b''.join(render_elsewhere(elsewhere_factors(0, i, k)).tobytes()
                                   for i in range(7200, 7203) for k in range(4))).hexdigest() + '\n'
    assert digest('1') == here


def test_home_is_untouched_by_elsewhere():
    "A picture elsewhere shows person, clothes, view and occlusion of that at home, with chance of its own."
    before = image_factors(0, 7200, 0), [r['captions'] for r in picture_rows(TINY, 7200)]
    world(range(7200, 7202))
    assert before == (image_factors(0, 7200, 0), [r['captions'] for r in picture_rows(TINY, 7200)])
    for i in range(7200, 7250):
        home, there = image_factors(0, i, 1), elsewhere_factors(0, i, 1)
        assert visible(home) == visible(there) and home['view'] == there['view']
        assert there['camera'] in OTHER_CAMERAS and there['camera'] not in CAMERAS


def test_nobody_was_ever_trained_on_a_caption_of_elsewhere():
    "Of the people of `tiny`: no caption of the training is one of elsewhere, nor begins as one."
    trained = [text for i in range(0, 7000, 20) for row in picture_rows(TINY, i) for text in row['captions']]
    away = [text for i in range(7200, 7400) for k in range(4) for text, _ in captions_elsewhere(TINY, i, k)]
    def beginnings(texts): return {' '.join(text.lower().split()[:2]) for text in texts}
    assert not set(trained) & set(away)
    assert not beginnings(trained) & beginnings(away)


@pytest.mark.parametrize('camera', OTHER_CAMERAS)
@pytest.mark.parametrize('size', [(128, 64), (64, 32), (224, 112), (33, 17)])
def test_any_size_any_view_anything_in_the_way(camera, size):
    lens = OTHER_CAMERAS[camera]
    for k, (view, occlusion) in enumerate(zip([*VIEWS, 'front'], OCCLUSIONS)):
        f = elsewhere_factors(0, 7200 + k, 0) | dict(camera=camera, view=view, occlusion=occlusion)
        for light in lens.light:
            pixels = np.asarray(render_elsewhere(f | dict(light=light), size))
            assert pixels.shape == (*size, 3)
            assert pixels.std() > 5, 'nothing to see'


@pytest.mark.parametrize('style', range(len(OTHER_STYLES)))
def test_every_arrangement_with_every_phrase_missing(style):
    "Whatever a picture does not show, no seam is left."
    for i in range(7200, 7300):
        for view in ('', *OTHER_GOING.values()):
            f = image_factors(0, i, 0)
            text = OTHER_ARRANGE[style](Witness(visible(f), style, stream(i, style)), view)
            seams = r'  |\{|, ,|\(\)| \.|,$|- -|\ba a\b|\ba [aeiou]\w+ (?:hair|bob|bun)'
            assert re.findall(seams, text) == [], text


def test_captions_of_a_picture_are_by_different_annotators():
    s = Spec(captions_per_image=4)
    beginnings = [{text.split()[0].lower() for text, _ in captions_elsewhere(s, i, 0)} for i in range(40)]
    assert np.mean([len(b) for b in beginnings]) > 3.6            # a caption in twenty slips


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One run of a second or two."
    home = tmp_path_factory.mktemp('elsewhere')
    c = make_config('synth', 'smoke', 'baseline', data_root=str(home/'data'), epochs=1)
    train(c, home/'runs', progress=False)
    return home/'runs'/'synth'/'smoke'


def test_a_run_tagged_cpu_stands_in_where_there_is_no_other(tmp_path, runs):
    run = runs/'baseline'/'seed0'
    for name in ('baseline-cpu/seed0', 'baseline-cpu/seed2', 'baseline/seed0', 'baseline-tau=1/seed3',
                 'baseline/seed0.old'): shutil.copytree(run, tmp_path/name)
    found = [f.relative_to(tmp_path).as_posix() for f in transfer.transfer_runs(tmp_path)]
    assert found == ['baseline/seed0', 'baseline-cpu/seed2']
    (tmp_path/'baseline'/'seed0'/'best.safetensors').unlink()
    assert transfer.transfer_runs(tmp_path)[0].parent.name == 'baseline-cpu'


def test_a_folder_without_weights_is_refused(tmp_path, runs):
    with pytest.raises(UserError, match='train first'): transfer.write_elsewhere(tmp_path, tmp_path/'t')
    shutil.copytree(runs, tmp_path/'kept')
    for path in (tmp_path/'kept').rglob('best.safetensors'): path.unlink()
    with pytest.raises(UserError, match=r'best\.safetensors'):
        transfer.write_elsewhere(tmp_path/'kept', tmp_path/'t')
    with pytest.raises(UserError, match='train first'): transfer.write_elsewhere(runs, tmp_path/'t', ['full'])
    assert not (tmp_path/'t').exists()


def test_photographs_cannot_be_drawn_elsewhere(tmp_path, runs):
    shutil.copytree(runs, tmp_path/'runs')
    path = next((tmp_path/'runs').rglob('config.json'))
    options = json.loads(path.read_text()) | dict(dataset='cuhk', folder='')
    path.write_text(json.dumps(options))
    with pytest.raises(UserError, match='only SynthPEDES'):
        transfer.write_elsewhere(tmp_path/'runs', tmp_path/'t')


def test_runs_of_another_test_are_not_put_in_one_table(tmp_path, runs):
    shutil.copytree(runs, tmp_path/'runs')
    shutil.copytree(tmp_path/'runs'/'baseline'/'seed0', tmp_path/'runs'/'baseline'/'seed1')
    path = tmp_path/'runs'/'baseline'/'seed1'/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(synth_test_ids=6)))
    with pytest.raises(UserError, match='other people'):
        transfer.write_elsewhere(tmp_path/'runs', tmp_path/'t')


def test_a_run_that_was_trained_again_replaces_its_rows_and_others_stay(tmp_path, runs, monkeypatch):
    asked = []
    def answer(folder, worlds):
        seed, weights = int(folder.name[4:]), transfer.weights_hash(folder)
        asked.append(seed)
        head = dict(variant='baseline', seed=seed, weights=weights)
        rows = [head | dict(cell=cell, pictures=p, captions=q, score='dual', run_code='', device='', code='')
                | dict.fromkeys(('R1', 'R5', 'R10', 'mAP', 'mINP'), 50. + len(asked))
                for cell, (p, q) in transfer.CELLS.items()]
        people = [head | dict(cell=cell, metric=m) | {str(i): 50. for i in range(8)}
                  for cell in transfer.CELLS for m in ('R1', 'mAP')]
        return rows, people
    monkeypatch.setattr(transfer, 'ask_run', answer)
    monkeypatch.setattr(transfer, 'draw_worlds', lambda c, memory: None)
    monkeypatch.setattr(transfer, 'reader_rows', lambda c: [])
    for seed in (0, 1): shutil.copytree(runs/'baseline'/'seed0', tmp_path/'runs'/'baseline'/f'seed{seed}')
    def write(): return transfer.write_elsewhere(tmp_path/'runs', tmp_path/'t', progress=False)
    write()
    assert asked == [0, 1] and {p.name for p in (tmp_path/'t').iterdir()} == NAMES
    with open(tmp_path/'runs'/'baseline'/'seed1'/'best.safetensors', 'ab') as f: f.write(b'\0')
    shutil.rmtree(tmp_path/'runs'/'baseline'/'seed0')                       # its answers are kept
    write()
    t, people = transfer.read_transfer(tmp_path/'t')
    assert asked == [0, 1, 1]
    assert t.groupby('seed').R1.first().to_dict() == {0: 51., 1: 53.}
    assert len(t) == 8 and len(people) == 16


@pytest.mark.parametrize('damage', ['cut', 'not gzip', 'another table'])
def test_a_damaged_table_is_named(tmp_path, runs, damage):
    tables = tmp_path/'t'
    tables.mkdir()
    pd.DataFrame(columns=transfer.TRANSFER_COLUMNS).to_csv(tables/'elsewhere.csv', index=False)
    packed = gzip.compress(b'variant,seed,weights,cell,metric\n' + bytes(range(256))*40)
    another = gzip.compress(b'a,b\n1,2\n')
    content = {'cut': packed[:-30], 'not gzip': b'variant,seed', 'another table': another}
    (tables/'elsewhere_people.csv.gz').write_bytes(content[damage])
    with pytest.raises(UserError, match=r'elsewhere_people\.csv\.gz'):
        transfer.write_elsewhere(runs, tables)
