"The model that comes with the repository answers as the run that it was made from, and travels in the wheel."
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from bdam_repro.archive import read_kept, run_files
from bdam_repro.config import config_hash, make_config
from bdam_repro.evaluate import evaluate
from bdam_repro.features import unit_rows
from bdam_repro.pedes import load_pedes
from bdam_repro.probes import gallery_rows, spec_of
from bdam_repro.release import RELEASED, released_model
from bdam_repro.rendering import render
from bdam_repro.synth import LAYOUT_FILES, annotation

REPO = Path(__file__).resolve().parent.parent
RUN = 'synth/tiny/full/seed0'
TOLERANCE = .1          # percentage points: what storing 16 bits per number may move in R-1


@pytest.fixture(scope='module')
def of_run():
    "What the repository keeps of the run."
    return run_files(read_kept(REPO/'tables'/'kept-seed0-full.zip')[RUN])


def drawn_picture(row, folder):
    "A test picture, byte for byte as `make_synth` writes it."
    path = folder/'imgs'/row['image']
    path.parent.mkdir(parents=True, exist_ok=True)
    s = spec_of(make_config('synth'), False)
    render(row['factors'], (s.height, s.width)).save(path, quality=92, subsampling=0)
    return path


def test_the_card_has_the_scores_of_the_run(of_run):
    test = json.loads(of_run['metrics.json'])['test']
    model = released_model()
    assert config_hash(model.model.config) == config_hash(make_config('synth')) and model.name == 'bdam-tiny'
    assert model.evaluation['of_run'] == test
    for score, values in test.items():
        for name, value in values.items():
            assert abs(model.evaluation['scores'][score][name] - value) < TOLERANCE, (score, name)
    card = (REPO/RELEASED/'README.md').read_text()
    assert f'| dual | {model.evaluation["scores"]["dual"]["R1"]:.1f} |' in card
    assert '8,000 queries' in card and '| skin | dark |' in card


def test_it_answers_as_the_run_did(of_run, tmp_path):
    """Fifty test people are drawn anew and encoded by the released files; the rest of the gallery are the
    features that the run kept. Each query must find what it found in the run."""
    t, model = load(of_run['features.safetensors']), released_model()
    rows = gallery_rows(spec_of(make_config('synth'), False))
    assert len(rows) == len(t['g_rows']) == 4000
    some = rows[:200]
    texts = [text for row in some for text in row['captions']]
    images = torch.stack([model.read_image(drawn_picture(row, tmp_path)) for row in some])
    f, q = unit_rows(model.encode_images(images).f_id.numpy()), unit_rows(model.encode_text(texts).t.numpy())
    kept_f, kept_q = (unit_rows(t[name].astype(np.float32)) for name in ('f_id', 't'))
    assert (f*kept_f[:len(f)]).sum(1).min() > .999 and (q*kept_q[:len(q)]).sum(1).min() > .999
    gallery, pids = np.concatenate([f, kept_f[len(f):]]), np.array([row['pid'] for row in rows])
    right = pids[(q @ gallery.T).argmax(1)] == np.repeat(pids[:len(f)], 2)
    before = t['dual.R1'][:len(q)]
    assert abs(right.mean() - before.mean()) < .01 and (right == (before > .5)).mean() > .99


@pytest.mark.soak
def test_r1_on_all_test_people(of_run, tmp_path):
    "The whole test split, drawn and scored: two and a half minutes of one core."
    model, c = released_model(), make_config('synth')
    folder, spec = tmp_path/'SynthPEDES', spec_of(make_config('synth'), False)
    rows = gallery_rows(spec)
    for row in rows: drawn_picture(row, folder)
    entries = [annotation(c.synth_layout, row) for row in rows]
    (folder/LAYOUT_FILES[c.synth_layout]).write_text(json.dumps(entries))
    ds = load_pedes('synth', tmp_path, val_fraction=0., descriptions=None)
    results = evaluate(model.model, ds, model.tokenizer, 'test')['results']
    for score, values in json.loads(of_run['metrics.json'])['test'].items():
        now = results[score].summary()
        for name, value in values.items(): assert abs(now[name] - value) < TOLERANCE, (score, name)


def test_it_travels_in_the_wheel(tmp_path):
    source = tmp_path/'source'
    for name in ('bdam_repro', 'weights'): shutil.copytree(REPO/name, source/name)
    for name in ('pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(REPO/name, source)
    offline = '--no-deps', '--no-build-isolation', '--no-index'
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', *offline, '-w', tmp_path, '.']
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    shutil.rmtree(source)
    zipfile.ZipFile(next(tmp_path.glob('*.whl'))).extractall(tmp_path/'site')
    code = """import sys; sys.path.insert(0, 'site')
import bdam_repro
from bdam_repro.release import released_model
print(bdam_repro.__file__, released_model().sha256)"""
    said = subprocess.check_output([sys.executable, '-c', code], cwd=tmp_path, text=True)
    file, sha256 = said.split()
    assert file.startswith(str(tmp_path)) and sha256 == released_model().sha256
