"A gallery: kills, two processes, any order of changes, a model alone, a vector database, broken input."
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from bdam_repro import gallery as gallery_module
from bdam_repro.batches import train_tokenizer
from bdam_repro.config import UserError, make_config
from bdam_repro.gallery import list_pictures
from bdam_repro.model import build_model
from bdam_repro.search import Gallery
from bdam_repro.trained import TrainedModel
from bdam_repro.vectors import take_rows

REPO = Path(__file__).resolve().parent.parent


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (8, 4, 3), np.uint8)).resize((32, 64)).save(path)
    return path


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp('model')
    tokenizer = train_tokenizer(['a tall woman in a red coat', 'a man with a bag']*2, home/'tokenizer', 300)
    torch.manual_seed(0)
    return TrainedModel(build_model(make_config(preset='smoke'), len(tokenizer)), tokenizer)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    for i in range(60): picture(folder/f'{i:02d}.png', i)
    return folder


def check_whole(gallery, expected):
    "Every picture is there once, with the feature of its own pixels."
    table = gallery.pictures()
    assert sorted(table['file']) == sorted(expected)
    rows = np.arange(gallery.total) if gallery.alive is None else gallery.alive
    images = torch.stack([gallery.model.read_image(gallery.path(f)) for f in table['file']])
    v = F.normalize(gallery.model.encode_images(images).f_id, dim=-1).numpy()
    np.testing.assert_allclose(take_rows(gallery.parts, rows), v, atol=1e-5)


def python(code, *args, **options):
    env = os.environ | {'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


KILLED = '''
import os, signal, sys
from bdam_repro import gallery
from bdam_repro.search import Gallery
gallery.CHUNK = 7
model, pictures, folder, after, where = sys.argv[1:]
steps = 0
real = getattr(gallery.GalleryKeeper, where)
def counted(*args):
    global steps
    steps += 1
    # inside a transaction
    if where == 'next_version' and steps == int(after): os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args)
    if steps == int(after): os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(gallery.GalleryKeeper, where, counted)
Gallery.build(model, pictures, folder, progress=False)
'''


KILLS = [('write_part', 3, 14), ('next_version', 4, 21), ('write_chunk', 2, 14), ('copy_rows', 1, 60)]


@pytest.mark.parametrize('where, after, there', KILLS)
def test_a_killed_build_is_completed(model, pictures, tmp_path, where, after, there):
    file = model.save_file(tmp_path/'model.safetensors')
    p = python(KILLED, file, pictures, tmp_path/'g', after, where)
    p.communicate()
    assert p.returncode == -signal.SIGKILL
    assert len(Gallery(model, tmp_path/'g')) == there
    gallery = Gallery.build(model, pictures, tmp_path/'g', progress=False)
    check_whole(gallery, [f'{i:02d}.png' for i in range(60)])
    assert len(list((tmp_path/'g'/'features').iterdir())) == len(gallery.parts)      # nothing is left over


def test_a_model_file_and_a_folder_are_enough(model, pictures, tmp_path):
    "In a folder of its own, with no dataset and no run beside it."
    file = model.save_file(tmp_path/'elsewhere'/'model.safetensors')
    code = '''
import sys
from bdam_repro.search import Gallery
g = Gallery.build(sys.argv[1], sys.argv[2], progress=False)
print(g.search("a man with a bag", k=3).table["file"].tolist(), g.folder)
'''
    p = python(code, file, pictures, cwd=tmp_path/'elsewhere')
    out, err = p.communicate()
    assert p.returncode == 0, err
    asked = Gallery.build(model, pictures, tmp_path/'g', progress=False).search('a man with a bag', k=3)
    assert str(asked.table['file'].tolist()) in out
    assert 'elsewhere' in out and 'runs' in out


def test_one_writer_many_readers(model, pictures, tmp_path):
    gallery = Gallery.build(model, pictures, tmp_path/'g', progress=False)
    code = '''
import sys, time
from bdam_repro.gallery import GalleryFiles
from pathlib import Path
with GalleryFiles(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
'''
    p = python(code, tmp_path/'g', stdin=subprocess.PIPE)
    assert p.stdout.readline() == 'held\n'
    with pytest.raises(UserError, match='another process is changing'): gallery.remove('00.png')
    assert len(gallery.search('a man')) == 10                   # reading goes on
    p.communicate()
    assert gallery.remove('00.png') == 1


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from(['add', 'remove', 'change', 'pack', 'index']),
                                st.sets(st.integers(0, 11), max_size=6)), min_size=1, max_size=8))
def test_any_order_of_changes(model, pictures, tmp_path_factory, steps, monkeypatch):
    "After any changes the gallery holds what it should, and finds it in the right order."
    monkeypatch.setattr(gallery_module, 'CHUNK', 4)
    home = tmp_path_factory.mktemp('changes')
    for i in range(12): shutil.copy(pictures/f'{i:02d}.png', home/f'{i:02d}.png')
    gallery = Gallery.build(model, home, home/'.gallery', progress=False)
    expected = {f'{i:02d}.png' for i in range(12)}
    for what, which in steps:
        names = {f'{i:02d}.png' for i in which}
        if what == 'add' and names:
            gallery.add([home/n for n in names], progress=False)
            expected |= names
        elif what == 'remove':
            assert gallery.remove([home/n for n in names]) == len(expected & names)
            expected -= names
        elif what == 'change':
            for n in names: picture(home/n, hash(n) % 1000 + 100)
            if names:
                gallery.add([home/n for n in names], progress=False)
                expected |= names
        elif what == 'pack': gallery.pack()
        elif gallery.total: gallery.index('hnsw')
    if expected: check_whole(gallery, expected)
    found = gallery.search('a tall woman', k=20).table
    assert sorted(found['file']) == sorted(expected)
    assert (np.diff(found['score']) <= 1e-6).all()


def test_a_gallery_opens_at_once(model, tmp_path):
    "Whatever its size: opening reads no feature. 200,000 rows, against a gallery of one picture."
    picture(tmp_path/'one'/'a.png', 0)
    small = Gallery.build(model, tmp_path/'one', tmp_path/'small', progress=False)
    large = Gallery.build(model, tmp_path/'one', tmp_path/'large', progress=False)
    n, dim = 200_000, model.model.config.dim
    v = F.normalize(torch.randn(n, dim), dim=-1)
    part = large.write_part(1, v, torch.ones(n))
    with large.db(write=True) as db:
        db.execute('insert into parts values(1, ?, ?)', (n, part))
        rows = ((i, f'{i}.png', '{}') for i in range(1, n + 1))
        db.executemany('insert into pictures values(?, ?, null, ?, 0, 0)', rows)
        large.next_version(db)
    def opening(folder):
        times = []
        for _ in range(7):
            start = time.process_time()
            Gallery(model, folder)
            times.append(time.process_time() - start)
        return min(times)
    once = opening(small.folder)
    assert opening(large.folder) < once + .05, 'milliseconds, not a pass over the features'
    assert len(Gallery(model, large.folder)) == n + 1


def test_bad_pictures_are_listed(model, tmp_path):
    home = tmp_path/'odd'
    picture(home/'good.png', 0)
    picture(home/'LOUD.JPG', 1)
    Image.new('L', (30, 60)).save(home/'gray.png')
    Image.new('CMYK', (30, 60)).save(home/'press.jpg')
    Image.new('RGB', (3, 5)).save(home/'tiny.png')
    (home/'cut.png').write_bytes((home/'good.png').read_bytes()[:60])
    (home/'empty.jpg').touch()
    (home/'page.png').write_text('<html>not found</html>')
    (home/'folder.png').mkdir()
    (home/'notes.txt').write_text('no picture')
    gallery = Gallery.build(model, home, tmp_path/'g', progress=False)
    assert sorted(gallery.pictures()['file']) == ['LOUD.JPG', 'good.png', 'gray.png', 'press.jpg']
    problems = gallery.problems().set_index('file')['kind'].to_dict()
    assert problems == {'tiny.png': 'tiny', 'cut.png': 'unreadable', 'empty.jpg': 'unreadable',
                        'page.png': 'unreadable', 'folder.png': 'missing'}
    assert repr(gallery) == '4 pictures in g, 5 more not readable'
    os.remove(home/'good.png')                                  # found still, shown as gone
    assert 'data:image' in gallery.search('a man')._repr_html_()


def test_filters_are_no_sql(model, pictures, tmp_path):
    import pandas as pd
    table = pd.DataFrame({'file': [str(p) for p in sorted(pictures.iterdir())], 'identity': range(60),
                          'camera': ['a', 'b', None]*20, 'hour': np.arange(60) % 24, 'gap': [np.nan, 1.5]*30})
    gallery = Gallery.build(model, table, tmp_path/'g', progress=False)
    def found(**where): return len(gallery.search('a man', k=60, where=where))
    assert (found(camera='a'), found(camera=['a', 'b']), found(hour=(0, 11))) == (20, 40, 36)
    assert (found(identity={3, 4}), found(gap=1.5)) == (2, 30)
    assert (found(nothing=1), found(camera="a' or '1'='1")) == (0, 0)
    assert found(**{'x") or 1 or ("': 1}) == 0
    assert list_pictures(table)[0] is None


def test_the_same_features_in_a_vector_database(model, pictures, tmp_path):
    qdrant = pytest.importorskip('qdrant_client')
    gallery = Gallery.build(model, pictures, tmp_path/'g', progress=False)
    client = qdrant.QdrantClient(':memory:')
    name = f'people-{model.sha256[:12]}'
    size = qdrant.models.VectorParams(size=gallery.parts[0].shape[1], distance=qdrant.models.Distance.DOT)
    client.create_collection(name, size)
    table = gallery.pictures()
    client.upload_collection(name, take_rows(gallery.parts, np.arange(len(table))), table.to_dict('records'),
                             ids=range(len(table)))
    q = F.normalize(model.encode_text(['a man with a bag']).t, dim=-1)[0].numpy()
    found = client.query_points(name, q, limit=10).points
    ours = gallery.search('a man with a bag').table
    assert [p.payload['file'] for p in found] == ours['file'].tolist()
    np.testing.assert_allclose([p.score for p in found], ours['score'], atol=1e-5)


def small_gallery(model, pictures, home, n=5, table=None):
    for i in range(n): shutil.copy(pictures/f'{i:02d}.png', home/f'{i:02d}.png')
    return Gallery.build(model, home if table is None else table, home/'.gallery', progress=False)


def test_pack_keeps_what_another_has_added(model, pictures, tmp_path):
    one = small_gallery(model, pictures, tmp_path)
    two = Gallery(model, tmp_path/'.gallery')
    one.remove('00.png')
    shutil.copy(pictures/'09.png', tmp_path/'09.png')
    two.add([tmp_path/'09.png'], progress=False)          # `one` has not looked since
    one.pack()
    check_whole(one, {'01.png', '02.png', '03.png', '04.png', '09.png'})


def test_an_index_is_of_what_is_there_now(model, pictures, tmp_path):
    one = small_gallery(model, pictures, tmp_path, 12)
    two = Gallery(model, tmp_path/'.gallery')
    two.remove('00.png')
    two.pack()
    one.index('hnsw')
    assert one.faiss.ntotal == one.total == 11


def test_a_removal_during_a_search(model, pictures, tmp_path, monkeypatch):
    one, two = small_gallery(model, pictures, tmp_path), Gallery(model, tmp_path/'.gallery')
    nearest, removed = Gallery.nearest, []
    def meanwhile(self, *args):
        found = nearest(self, *args)
        if not removed:
            removed.append('02.png')
            two.remove('02.png')
        return found
    monkeypatch.setattr(Gallery, 'nearest', meanwhile)
    assert sorted(one.search('a man').table['file']) == ['00.png', '01.png', '03.png', '04.png']


def test_one_file_in_two_spellings(model, pictures, tmp_path):
    gallery = small_gallery(model, pictures, tmp_path)
    shutil.copy(pictures/'09.png', tmp_path/'09.png')
    gallery.add([f'{tmp_path}/09.png', f'{tmp_path}/./09.png'], progress=False)
    check_whole(gallery, {'00.png', '01.png', '02.png', '03.png', '04.png', '09.png'})


def test_columns_of_a_table_with_our_names_and_odd_values(model, pictures, tmp_path):
    table = pd.DataFrame(dict(file=[str(pictures/f'{i:02d}.png') for i in range(3)], score=[1., 2., 3.],
                              rank=[9, 8, 7], x=[1., np.inf, 2.],
                              identity=pd.array([1, None, 2], 'Int64')))
    hits = Gallery.build(model, table, tmp_path/'g', progress=False)
    found = hits.search('a man').table
    assert found['rank'].tolist() == [1, 2, 3] and found['score'].abs().max() <= 1
    assert len(hits.search('a man', where={'x': (0, 5)}).table) == 2


def test_a_name_that_is_no_utf8(pictures, tmp_path):
    shutil.copy(pictures/'00.png', os.fsencode(tmp_path) + b'/caf\xe9.png')
    with pytest.raises(UserError, match=r'caf\\udce9\.png.*rename it'): list_pictures(tmp_path)
