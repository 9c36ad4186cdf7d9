"SynthPEDES: the same bytes whoever draws, official layouts, honest captions, nothing half-written."
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from bdam_repro import captions, people, synth
from bdam_repro.captions import STYLES, SYNONYMS, caption, describe_factors, visible
from bdam_repro.config import UserError
from bdam_repro.people import CLOTHING_FACTORS, IDENTITY_FACTORS, image_factors, stream
from bdam_repro.rendering import render
from bdam_repro.synth import make_synth, rewrite_descriptions


def make(root, **kw):
    return make_synth(root, **{'n_ids': 10, 'images_per_id': 2, 'workers': 1, 'progress': False} | kw)

def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob('*')) if p.is_file()}

def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]

def words_of(*concepts: str) -> list[str]:
    return [w for c in concepts for w in SYNONYMS.get(c, (c,))]

def speaks_of(text: str, words: list[str]) -> list[str]:
    return [w for w in words if re.search(rf'(?<![\w-]){re.escape(w)}(?![\w-])', text.lower())]

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return make(tmp_path_factory.mktemp('small'))

@pytest.fixture(scope='module')
def crowd():
    return [image_factors(5, i, 0) for i in range(300)]


# --- the same bytes -------------------------------------------------------------------------------

@pytest.mark.parametrize('workers', [2, 3])
def test_workers_and_repetition_do_not_matter(small, tmp_path, workers):
    again = make(tmp_path, workers=workers)
    assert tree(again) == tree(small)

def test_seed_matters(small, tmp_path):
    a, b = tree(small), tree(make(tmp_path, seed=1))
    pictures = [{digest for name, digest in files.items() if name.endswith('.jpg')} for files in (a, b)]
    assert not pictures[0] & pictures[1]

def test_a_person_does_not_depend_on_the_size_of_the_dataset(small, tmp_path):
    big = make(tmp_path, n_ids=14, val_ids=1, test_ids=2)
    name = 'imgs/train_query/p1_s64.jpg'
    assert tree(big)[name] == tree(small)[name]

def test_known_values():
    """Factors and captions of one picture are the same on every machine, and in every version with this
    number."""
    f = image_factors(0, 9, 0)
    text = json.dumps([f, [caption(f, s, stream(0, 3, 9)) for s in range(12)]], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    known = '80e6f21faab9c3a40f52109664c3436c3be1a1ebc2c98adf36156f5afd765e50'
    assert digest == known, 'raise VERSION if this is meant'

def test_render_is_a_function_of_the_factors_alone():
    f = image_factors(3, 1, 0)
    np.random.seed(1)  # noqa: NPY002 - the global generator must have no say
    a = render(f).tobytes()
    np.random.seed(2)  # noqa: NPY002
    assert render(json.loads(json.dumps(f))).tobytes() == a  # also after a way through JSON


# --- layouts --------------------------------------------------------------------------------------

OFFICIAL = {'cuhk': ('reid_raw.json', {'id', 'split', 'captions', 'file_path', 'processed_tokens'}, 1, 2,
                     r'(train|test)_query/p\d+_s\d+\.jpg'),
            'icfg': ('ICFG-PEDES.json', {'id', 'split', 'captions', 'file_path', 'processed_tokens'}, 0, 1,
                     r'(train|test)/\d{4}/\d{4}_\d{3}_\d{2}_\w+\.jpg'),
            'rstp': ('data_captions.json', {'id', 'split', 'captions', 'img_path'}, 0, 2,
                     r'\d{4}_c\d+_\d{4}\.jpg')}

@pytest.mark.parametrize('layout', OFFICIAL)
def test_layout(tmp_path, layout):
    file, keys, first, captions, pattern = OFFICIAL[layout]
    folder = make(tmp_path, layout=layout, val_ids=2, test_ids=3)
    rows = json.loads((folder/file).read_text())
    assert len(rows) == 20 and all(set(r) == keys for r in rows)
    assert min(r['id'] for r in rows) == first and len({r['id'] for r in rows}) == 10
    for r in rows:
        assert len(r['captions']) == captions
        assert all(isinstance(c, str) and c.strip() for c in r['captions'])
    ids = {s: {r['id'] for r in rows if r['split'] == s} for s in ('train', 'val', 'test')}
    assert [len(ids[s]) for s in ids] == ([7, 0, 3] if layout == 'icfg' else [5, 2, 3])
    assert not ids['train'] & ids['test']
    paths = [r.get('file_path') or r['img_path'] for r in rows]
    assert len(set(paths)) == 20 and all(re.fullmatch(pattern, p) for p in paths)
    assert {p.relative_to(folder/'imgs').as_posix() for p in (folder/'imgs').rglob('*.jpg')} == set(paths)
    assert [r['image'] for r in jsonl(folder/'factors.jsonl')] == paths
    assert [r['image'] for r in jsonl(folder/'descriptions.jsonl')] == paths
    assert [r['pid'] for r in jsonl(folder/'factors.jsonl')] == [r['id'] for r in rows]
    if layout != 'rstp': assert all(len(r['processed_tokens']) == len(r['captions']) for r in rows)

def test_file_names_stay_apart_with_many_pictures(tmp_path):
    folder = make(tmp_path, layout='rstp', n_ids=4, images_per_id=64, size=(32, 16), val_ids=0, test_ids=1)
    assert len(list((folder/'imgs').glob('*.jpg'))) == 256

def test_pictures_have_the_size_asked_for(tmp_path):
    folder = make(tmp_path, n_ids=3, size=(96, 48), val_ids=0, test_ids=1)
    for p in (folder/'imgs').rglob('*.jpg'):
        with Image.open(p) as img: assert (img.size, img.mode) == ((48, 96), 'RGB')

def test_synth_json_names_everything(small):
    spec = json.loads((small/'synth.json').read_text())
    assert spec['layout'] == 'cuhk' and spec['n_ids'] == 10
    assert spec['version'] == people.VERSION and spec['error_rate'] == .05

def test_description_schema(small):
    keys = {'image', 'identity', 'clothing', 'attributes', 'style', 'model', 'prompt_hash', 'seed', 'tries',
            'tokens', 'cost', 'latency', 'status', 'reason'}
    for r in jsonl(small/'descriptions.jsonl'):
        assert set(r) == keys and r['identity'] and r['clothing']
        assert r['status'] == 'ok' and r['model'] == 'synth'


# --- factors ------------------------------------------------------------------------------------------------

def test_clothes_change_keeps_the_person(tmp_path):
    standard, change = (jsonl(make(tmp_path/str(c), n_ids=6, images_per_id=4,
                                   clothes_change=c)/'factors.jsonl')
                        for c in (False, True))
    def kinds(rows, pid, keys): return {tuple(str(r[k]) for k in keys) for r in rows if r['pid'] == pid}
    def outfits(rows, pid): return kinds(rows, pid, CLOTHING_FACTORS)
    def persons(rows, pid): return kinds(rows, pid, (*IDENTITY_FACTORS, 'head_size', 'stature'))
    for pid in range(1, 7):
        assert len(outfits(standard, pid)) == 1 and len(outfits(change, pid)) == 4
        assert persons(standard, pid) == persons(change, pid) and len(persons(change, pid)) == 1

def test_two_outfits_are_worn_in_turn(tmp_path):
    rows = jsonl(make(tmp_path, n_ids=6, images_per_id=4, outfits=2)/'factors.jsonl')
    def worn(r): return tuple(str(r[k]) for k in CLOTHING_FACTORS)
    for pid in range(1, 7):
        a, b, c, d = (r for r in rows if r['pid'] == pid)
        assert worn(a) == worn(c) and worn(b) == worn(d) and worn(a) != worn(b)
        assert len({tuple(str(r[k]) for k in IDENTITY_FACTORS) for r in (a, b, c, d)}) == 1
    assert a == jsonl(make(tmp_path/'one', n_ids=6, images_per_id=4)/'factors.jsonl')[-4]


def test_a_dataset_older_than_the_outfits_is_found(tmp_path):
    folder = make(tmp_path)
    spec = json.loads((folder/'synth.json').read_text())
    assert spec.pop('outfits') == 1
    (folder/'synth.json').write_text(json.dumps(spec))
    assert make(tmp_path) == folder
    with pytest.raises(UserError, match=r'outfits=1 \(asked: 2\)'): make(tmp_path, outfits=2)


def test_outfit_and_person_are_independent_of_the_picture():
    rows = [image_factors(0, i, k) for i in range(200) for k in range(2)]
    by_view = {v: [r for r in rows if r['view'] == v] for v in ('front', 'back')}
    share = {v: np.mean([r['gender'] == 'man' for r in rs]) for v, rs in by_view.items()}
    assert abs(share['front'] - share['back']) < .15
    assert len({r['camera'] for r in rows}) == 6 and len({r['view'] for r in rows}) == 4

@pytest.mark.parametrize('factor, a, b', [
    ('upper_color', 'red', 'green'), ('upper_pattern', 'plain', 'striped'),
    ('lower_type', 'trousers', 'shorts'),
    ('bag_type', 'none', 'backpack'), ('hat_type', 'none', 'cap'), ('hair_style', 'short', 'long'),
    ('build', 'slim', 'heavy'), ('height', 'short', 'tall'), ('view', 'front', 'back'),
    ('camera', 'park', 'station')])
def test_a_factor_shows(factor, a, b):
    clothing = dict(upper_type='sweater', upper_pattern='plain', upper_color='blue', upper_color2='yellow',
                    inner_color='none', scarf_color='none', lower_type='trousers', lower_color='black',
                    bag_type='none', bag_color='red', hat_type='none', hat_color='red')
    nuisance = dict(view='back' if factor == 'bag_type' else 'front', occlusion='none', noise=0, blur=0)
    base = image_factors(0, 2, 0) | clothing | nuisance | dict(hair_color='black')
    x, y = (np.asarray(render(base, **{factor: v}), np.int16) for v in (a, b))
    assert (np.abs(x - y).max(-1) > 24).sum() > 40  # pixels

@pytest.mark.parametrize('view', ['front', 'back', 'left', 'right'])
def test_every_garment_can_be_drawn_from_every_side(view):
    kinds = {'upper_type': (*people.UPPER, 'dress'), 'shoes_type': people.SHOES, 'bag_type': people.BAGS,
             'hat_type': people.HATS, 'hair_style': captions.DOMAINS['hair_style'],
             'occlusion': people.OCCLUSIONS}
    base = image_factors(1, 4, 0) | dict(view=view, bag_color='red', hat_color='blue', inner_color='white')
    for factor, values in kinds.items():
        for value in values: assert np.asarray(render(base, **{factor: value})).std() > 10


# --- captions -------------------------------------------------------------------------------------

def test_captions_are_deterministic(crowd):
    for s in range(len(STYLES)):
        assert caption(crowd[0], s, stream(1, 2)) == caption(crowd[0], s, stream(1, 2))

HIDDEN = [(dict(view='back', glasses=True), words_of('glasses')),
          (dict(view='back', beard=True, gender='man'), words_of('beard')),
          (dict(occlusion='box'), words_of('sneakers', 'leather shoes', 'boots', 'sandals')),
          (dict(bag_type='none', bag_color='none'), words_of('backpack', 'handbag', 'suitcase')),
          (dict(hat_type='cap', hat_color='red', hair_style='short'), ['hair', 'curls']),
          (dict(view='left', bag_type='handbag', bag_side='right', bag_color='red'), words_of('handbag')),
          (dict(view='back', age='elderly'), words_of('elderly', 'young', 'middle-aged'))]

@pytest.mark.parametrize('changes, words', HIDDEN)
@pytest.mark.parametrize('style', range(12))
def test_what_is_hidden_is_not_mentioned(crowd, changes, words, style):
    for i, f in enumerate(crowd[:60]):
        text = caption(f | changes, style, stream(2, i), mistakes=0)
        assert not speaks_of(text, words), text

@pytest.mark.parametrize('style', range(12))
def test_captions_say_what_is_there(crowd, style):
    "Without mistakes a caption names color and kind of the upper garment, and no color that is not there."
    for i, f in enumerate(crowd[:100]):
        text = caption(f, style, stream(3, i), mistakes=0)
        assert speaks_of(text, words_of(f['upper_type'])), text
        assert speaks_of(text, words_of(f['upper_color'])), text
        there = words_of(*[str(v) for v in visible(f).values()])
        named = [w for w in speaks_of(text, words_of(*people.COLORS)) if not any(w in t for t in there)]
        assert not named, (named, text)

def test_captions_read_as_english(crowd):
    for s in range(12):
        for i, f in enumerate(crowd):
            text = caption(f, s, stream(4, i))
            assert not re.search(r'  |\{|\}| ,|,,|\.\.|\ba [aeiou]|\ban [^aeiou]|None|none', text), text
            assert STYLES[s].capital == text[0].isupper()

def test_length_and_mistakes_of_captions(crowd):
    lengths = [[len(caption(f, s, stream(5, i)).split()) for i, f in enumerate(crowd)] for s in range(12)]
    means = np.mean(lengths, axis=1)
    assert 20 < means.mean() < 35 and means.max() / means.min() > 2  # the terse and the wordy
    right, wrong = ([caption(f, 0, stream(6, i), mistakes=m) for i, f in enumerate(crowd)] for m in (0, 1))
    assert np.mean([a == b for a, b in zip(right, wrong)]) < .02

def test_styles_differ_in_more_than_words(crowd):
    "The first word alone, content words aside, splits the annotators into several groups."
    first = {}
    for s in (0, 3, 4, 7, 8, 9):
        first[s] = {caption(f, s, stream(7, i)).split()[0].lower() for i, f in enumerate(crowd[:40])}
    common = [set.intersection(first[a], first[b]) for a in first for b in first if a < b]
    assert np.mean([len(c) for c in common]) < 2


# --- descriptions ---------------------------------------------------------------------------------

GARMENTS = words_of(*people.UPPER, 'dress', *people.LOWER['woman'], *people.SHOES, *list(people.BAGS)[1:],
                    *list(people.HATS)[1:], 'scarf', 'shoes', 'hat', 'bag')
BODIES = words_of('man', 'woman', 'boy', 'girl', 'young', 'middle-aged', 'elderly', 'glasses', 'beard',
                  'hair', 'skin', 'he', 'she', 'his', 'her', 'tall')

@pytest.mark.parametrize('style', [None, *range(12)])
def test_descriptions_are_pure(crowd, style):
    for i, f in enumerate(crowd[:80]):
        answer = describe_factors(f, stream(8, i), .3, style)
        assert not speaks_of(answer['identity'], GARMENTS), answer['identity']
        assert not speaks_of(answer['clothing'], BODIES), answer['clothing']

@pytest.mark.parametrize('rate', [0, .05, .5, 1])
def test_error_rate_is_what_is_stated(crowd, rate):
    pairs = [(describe_factors(f, stream(9, i), rate)['attributes'], visible(f)) for i, f in enumerate(crowd)]
    assert all(set(d) == set(v) for d, v in pairs)
    wrong = [d[k] != v[k] for d, v in pairs for k in v]
    assert abs(np.mean(wrong) - rate) <= 4 * (rate * (1 - rate) / len(wrong)) ** .5  # four standard errors

def test_describe_again(small, tmp_path):
    before = (small/'descriptions.jsonl').read_bytes()
    assert rewrite_descriptions(small, .05, 0, out=tmp_path/'same.jsonl').read_bytes() == before
    def again(**kw): return jsonl(rewrite_descriptions(small, out=tmp_path/'again.jsonl', **kw))
    noisy, clean, styled = again(error_rate=1.), again(error_rate=0), again(style='random', seed=3)
    for wrong, right in zip(noisy, clean):
        assert all(wrong['attributes'][k] != v for k, v in right['attributes'].items())
    assert len({r['style'] for r in styled}) > 3 and {r['style'] for r in noisy} == {None}
    chosen = {r['image']: i % 12 for i, r in enumerate(styled)}
    assert [r['style'] for r in again(style=chosen)] == list(chosen.values())
    assert (small/'descriptions.jsonl').read_bytes() == before

@pytest.mark.parametrize('kw', [dict(error_rate=1.5), dict(error_rate='x'), dict(style=12), dict(style='odd'),
                                dict(style={})])
def test_bad_descriptions_are_refused(small, tmp_path, kw):
    with pytest.raises(UserError) as e: rewrite_descriptions(small, out=tmp_path/'d.jsonl', **kw)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())

def test_describing_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'factors\.jsonl'): rewrite_descriptions(tmp_path)


# --- faults ---------------------------------------------------------------------------------------

BAD = [dict(layout='market'), dict(n_ids=0), dict(n_ids=1), dict(n_ids='many'), dict(n_ids=2.5),
       dict(images_per_id=0), dict(images_per_id=65), dict(seed=-1),
       dict(val_ids=5, test_ids=5), dict(val_ids=-1), dict(size=(8, 8)), dict(size=64), dict(size=(64,)),
       dict(error_rate=-.1), dict(mistakes=2), dict(n_styles=13), dict(n_styles=0),
       dict(captions_per_image=-1), dict(captions_per_image=0), dict(workers=0), dict(workers='all'),
       dict(folder='../x'), dict(folder=''), dict(clothes_change='yes'),
       dict(outfits=0), dict(outfits=2, clothes_change=True)]

@pytest.mark.parametrize('kw', BAD, ids=str)
def test_bad_arguments(tmp_path, kw):
    with pytest.raises(UserError) as e: make(tmp_path, **kw)
    assert '\n' not in str(e.value) and str(e.value).startswith('make_synth:')
    assert not list(tmp_path.iterdir())

def test_another_dataset_is_not_overwritten(small):
    before = tree(small)
    with pytest.raises(UserError, match=r'seed=0 \(asked: 1\)'): make(small.parent, seed=1)
    assert make(small.parent) == small and tree(small) == before

def test_two_processes_that_draw_the_same_at_once(tmp_path, monkeypatch):
    "The second to end finds the dataset of the first, and leaves nothing of its own."
    write = synth.write_tables
    def late(folder, s, workers):
        monkeypatch.setattr(synth, 'write_tables', write)
        make(tmp_path/'first').rename(tmp_path/'SynthPEDES')
        write(folder, s, workers)
    monkeypatch.setattr(synth, 'write_tables', late)
    made = make(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'SynthPEDES', 'first'} and (made/'synth.json').exists()

@pytest.mark.parametrize('content', [None, "{", "[1]", "[]"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path/'SynthPEDES').mkdir()
    if content is not None: (tmp_path/'SynthPEDES'/'synth.json').write_text(content)
    with pytest.raises(UserError): make(tmp_path)
    assert len(list((tmp_path/'SynthPEDES').iterdir())) == (content is not None)

def test_an_exception_leaves_nothing(tmp_path, monkeypatch):
    drawn = []
    def fails(f, size):
        drawn.append(f)
        if len(drawn) > 5: raise RuntimeError('power')
        return render(f, size)
    monkeypatch.setattr(synth, 'render', fails)
    with pytest.raises(RuntimeError, match='power'): make(tmp_path)
    assert len(drawn) == 6 and not list(tmp_path.iterdir())

def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(synth, 'write_tables', full)
    with pytest.raises(UserError, match='No space left'): make(tmp_path)
    assert not list(tmp_path.iterdir())

def test_a_failing_worker_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(synth.sys, 'executable', '/bin/false')
    with pytest.raises(UserError, match='drawing process failed'): make(tmp_path, workers=2)
    assert not list(tmp_path.iterdir())

def test_kill_in_the_middle(tmp_path):
    code = ('from bdam_repro.synth import make_synth\n'
            f'make_synth({str(tmp_path)!r}, n_ids=3000, workers=2, progress=False)')
    p = subprocess.Popen([sys.executable, '-c', code], cwd=Path(synth.__file__).parents[1])
    while len(list(tmp_path.rglob('*.jpg'))) <= 30:
        assert p.poll() is None, 'it ended before it was killed'
        time.sleep(.05)
    workers = psutil.Process(p.pid).children(recursive=True)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    assert list(tmp_path.rglob('*.jpg')) and not (tmp_path/'SynthPEDES').exists()
    assert workers and not psutil.wait_procs(workers, timeout=600)[1]     # they stop by themselves
    left = next(tmp_path.iterdir())
    for path in (left, *left.glob('part*.jsonl')): os.utime(path, (0, 0))  # a while later
    folder = make(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
