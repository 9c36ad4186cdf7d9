"""The three official layouts with their quirks, and what a broken or hostile copy of them may hold."""
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bdam_repro.config import UserError
from bdam_repro.pedes import (
    OFFICIAL,
    PedesDataset,
    attach_descriptions,
    clean_caption,
    load_pedes,
    read_descriptions,
    safe_file,
)
from bdam_repro.picture_files import ImageError, load_image

TITLES = {'cuhk': 'CUHK-PEDES', 'icfg': 'ICFG-PEDES', 'rstp': 'RSTPReid', 'synth': 'SynthPEDES'}
FILES = {'cuhk': 'reid_raw.json', 'icfg': 'ICFG-PEDES.json', 'rstp': 'data_captions.json'}
FOLDERS = {'cuhk': ['CUHK01', 'CUHK03', 'Market', 'cam_a', 'test_query', 'train_query'],
           'icfg': ['train/0000', 'test/0001'], 'rstp': ['']}


def picture(path: Path, seed: int = 0, size=(16, 32), mode: str = 'RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def rows_of(layout: str, splits=('train',) * 8 + ('val',) * 2 + ('test',) * 4) -> list[dict]:
    key = 'img_path' if layout == 'rstp' else 'file_path'
    rows = []
    for i, split in enumerate(splits):
        if layout == 'icfg' and split == 'val': split = 'train'
        folder = FOLDERS[layout][i % len(FOLDERS[layout])]
        row = {'split': split, 'captions': [f'Caption {i} {k}.' for k in range(1 if layout == 'icfg' else 2)],
               key: f'{folder}/{i:04d}.jpg'.lstrip('/'), 'id': i // 2 + (layout == 'cuhk')}
        if layout != 'rstp': row['processed_tokens'] = [['caption', str(i)]]
        rows.append(row)
    return rows


def write(root: Path, layout: str, rows=None, name=None, file=None, images: bool = True) -> list[dict]:
    "Write a small dataset in an official layout; the rows."
    rows = rows_of(layout) if rows is None else rows
    folder = root / TITLES[name or layout]
    (folder / 'imgs').mkdir(parents=True, exist_ok=True)
    (folder / (file or FILES[layout])).write_text(json.dumps(rows))
    if images:
        for i, row in enumerate(rows): picture(folder / 'imgs' / row.get('file_path', row.get('img_path')), i)
    return rows


# --- the layouts --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('layout', ['cuhk', 'icfg', 'rstp'])
def test_layout(tmp_path, layout):
    rows = write(tmp_path, layout)
    ds = load_pedes(layout, tmp_path)
    assert list(ds.records.columns) == ['split', 'pid', 'image_id', 'file', 'captions']
    assert ds.records.pid.tolist() == [r['id'] for r in rows]
    assert ds.records.image_id.tolist() == list(range(len(rows)))
    assert ds.records.captions.tolist() == [r['captions'] for r in rows]
    assert set(ds.records.split) == {'train', 'val', 'test'}
    assert ds.image(0).mode == 'RGB' and ds.image(0).size == (16, 32)
    test = load_pedes(layout, tmp_path, 'test')
    assert test.records.image_id.tolist() == [10, 11, 12, 13] and (test.records.split == 'test').all()
    captions = test.captions
    assert captions.text.tolist() == [c for r in rows[10:] for c in r['captions']]
    assert (test.records.pid.to_numpy()[captions['row']] == captions.pid).all()


def test_caption_quirks(tmp_path):
    rows = rows_of('cuhk')
    rows[0]['captions'] = 'A bare string.'
    rows[1]['captions'] = [f'Caption {k}.' for k in range(10)]
    rows[2]['captions'] = [f'Caption {k}.' for k in range(4)]
    rows[3]['captions'] = []
    write(tmp_path, 'cuhk', rows)
    ds = load_pedes('cuhk', tmp_path)
    assert ds.records.captions.str.len().tolist()[:4] == [1, 10, 4, 2] and len(ds) == 13
    assert len(ds.captions) == 15 + 2 * 10 and 3 not in set(ds.records.image_id)
    assert any('bare string' in note for note in ds.notes)
    assert 'training images without a caption, left out: 1' in ds.notes


def test_captions_without_words_beside_others_are_left_out(tmp_path):
    rows = rows_of('rstp')
    rows[8]['captions'] = ['', 'A man.']
    rows[10]['captions'] = ['_x000D_', 'A man.', ' ']
    rows[11]['captions'] = ['_x000D_']   # a test image without words
    write(tmp_path, 'rstp', rows)
    ds = load_pedes('rstp', tmp_path)
    captions = ds.records.set_index('image_id').captions
    assert (captions[8], captions[10], captions[11]) == (['A man.'], ['A man.'], [])
    assert any('no words, left out' in note for note in ds.notes)
    assert (ds.captions.text != '').all()


def test_paths_that_repeat_imgs(tmp_path):
    rows = rows_of('rstp')
    write(tmp_path, 'rstp', rows)
    for row in rows: row['img_path'] = 'imgs/' + row['img_path']
    write(tmp_path, 'rstp', rows, images=False)
    ds = load_pedes('rstp', tmp_path)
    assert ds.image(0).mode == 'RGB' and 'paths that repeat imgs/, read without it: 14' in ds.notes


def test_own_data_without_a_validation_split(tmp_path):
    write(tmp_path, 'cuhk', rows_of('cuhk', ('train',) * 40 + ('test',) * 4), images=False)
    ds = load_pedes('cuhk', tmp_path)
    assert not set(ds.split('val').records.pid) & set(ds.split('train').records.pid)
    assert any('held out as val' in note for note in ds.notes)
    with pytest.raises(UserError, match="'val' is empty"): load_pedes('cuhk', tmp_path, 'val', val_fraction=0)


def test_icfg_both_spellings_and_other_folder(tmp_path):
    write(tmp_path, 'icfg', file='ICFG_PEDES.json')
    (tmp_path / 'ICFG-PEDES').rename(tmp_path / 'icfg')
    assert len(load_pedes('icfg', tmp_path, folder='icfg')) == 14
    with pytest.raises(UserError, match='no ICFG-PEDES at'): load_pedes('icfg', tmp_path)


def test_icfg_hold_out_is_by_identity_and_seeded(tmp_path):
    rows = rows_of('icfg', ('train',) * 80 + ('test',) * 4)
    write(tmp_path, 'icfg', rows, images=False)
    held = [set(load_pedes('icfg', tmp_path, 'val', seed=s, val_fraction=.25).records.pid) for s in (0, 0, 1)]
    assert len(held[0]) == 10 and held[0] == held[1] != held[2]
    ds = load_pedes('icfg', tmp_path, val_fraction=.25)
    assert not set(ds.split('train').records.pid) & held[0]
    assert any('10 of 40 train identities' in note for note in ds.notes)
    whole = load_pedes('icfg', tmp_path, val_fraction=0)
    assert set(whole.records.split) == {'train', 'test'} and not whole.notes
    with pytest.raises(UserError, match="'val' is empty"): whole.split('val')
    for bad in (1, -.1, float('nan')):
        with pytest.raises(UserError, match='val_fraction'): load_pedes('icfg', tmp_path, val_fraction=bad)
    with pytest.raises(UserError, match='too few'): load_pedes('icfg', tmp_path, val_fraction=.99)


def test_caption_all_alone_is_refused_and_reid_raw_wins(tmp_path):
    rows = [{k: v for k, v in r.items() if k != 'split'} for r in rows_of('cuhk')]
    write(tmp_path, 'cuhk', rows, file='caption_all.json')
    with pytest.raises(UserError, match=r'no split.*take reid_raw\.json'): load_pedes('cuhk', tmp_path)
    (tmp_path / 'CUHK-PEDES/caption_all.json').rename(tmp_path / 'CUHK-PEDES/reid_raw.json')
    with pytest.raises(UserError, match=r'is caption_all\.json of CUHK-PEDES'): load_pedes('cuhk', tmp_path)
    write(tmp_path, 'cuhk', images=False)
    assert len(load_pedes('cuhk', tmp_path)) == 14


@pytest.mark.parametrize('layout', ['cuhk', 'icfg', 'rstp'])
def test_synth(tmp_path, layout):
    rows = write(tmp_path, layout, name='synth')
    folder = tmp_path / 'SynthPEDES'
    (folder / 'synth.json').write_text(json.dumps({'layout': layout, 'n_ids': 7}))
    files = [r.get('file_path', r.get('img_path')) for r in rows]
    known = {'gender': 'male', 'upper_color': 'red'}
    factors = [{'image': f, 'pid': r['id'], **known, 'styles': list(range(len(r['captions'])))}
               for f, r in zip(files, rows, strict=True)]
    (folder / 'factors.jsonl').write_text('\n'.join(map(json.dumps, factors[::-1])) + '\n')
    ds = load_pedes('synth', tmp_path)
    assert ds.name == 'synth' and (ds.records.f_gender == 'male').all() and 'f_pid' not in ds.records
    assert ds.captions['style'].tolist() == [k for r in rows for k in range(len(r['captions']))]
    assert ('held out' in ' '.join(ds.notes)) == (layout == 'icfg')
    report = ds.check()
    assert report.ok and 'official images' not in report.counts
    assert ds.captions['style'].dtype == np.int64

    factors[0]['styles'] = [0] * 7
    (folder / 'factors.jsonl').write_text('\n'.join(map(json.dumps, factors)))
    with pytest.raises(UserError, match="'styles' must have an entry for each caption"):
        load_pedes('synth', tmp_path)
    (folder / 'factors.jsonl').write_text('\n'.join(map(json.dumps, factors[1:])))
    with pytest.raises(UserError, match='without factors: 1'): load_pedes('synth', tmp_path)
    (folder / 'synth.json').write_text(json.dumps({'layout': ['cuhk']}))
    with pytest.raises(UserError, match="'layout' must be one of"): load_pedes('synth', tmp_path)


# --- bad input: one line, with file and row -----------------------------------------------------------------

def _set(i, **kw): return lambda rows: rows[i].update(kw)
def _drop(i, key): return lambda rows: rows[i].pop(key)


BAD_ROWS = {
    'no split': (_drop(3, 'split'), "row 3: the key 'split' is missing"),
    'no captions': (_drop(2, 'captions'), "row 2: the key 'captions' is missing"),
    'no path': (_drop(1, 'file_path'), "row 1: the key 'file_path' is missing"),
    'no id': (_drop(0, 'id'), "row 0: the key 'id' is missing"),
    'id as text': (_set(4, id='12'), "row 4: 'id' must be an integer"),
    'id as bool': (_set(4, id=True), "row 4: 'id' must be an integer"),
    'id negative': (_set(4, id=-1), "row 4: 'id' must be from 0"),
    'id too large': (_set(4, id=10**30), "row 4: 'id' must be from 0"),
    'captions null': (_set(5, captions=None), "row 5: 'captions' must be a list of strings"),
    'captions of numbers': (_set(5, captions=[1, 2]), "row 5: 'captions' must be a list of strings"),
    'unknown split': (_set(6, split='dev'), "row 6: 'split' must be one of train, val, test"),
    'path a number': (_set(7, file_path=7), "row 7: 'file_path' must be a string"),
    'climbs out': (_set(8, file_path='../../secret.png'), "row 8: the image path '../../secret.png' leaves"),
    'climbs out late': (_set(8, file_path='a/b/../../../x.png'), 'row 8: .* leaves'),
    'climbs out backwards': (_set(8, file_path='a\\..\\..\\x.png'), 'row 8: .* leaves'),
    'absolute': (_set(9, file_path='/etc/passwd'), 'row 9: .* is absolute'),
    'drive': (_set(9, file_path='C:\\x.png'), 'row 9: .* is absolute'),
    'NUL': (_set(10, file_path='a\0.png'), 'row 10: .* control character'),
    'half a character': (_set(10, file_path='\ud800.png'), 'row 10: .* control character'),
    'no name': (_set(11, file_path='  '), 'row 11: .* is empty'),
    'row a list': (lambda rows: rows.__setitem__(12, [1]), 'row 12: expected an object'),
}


@pytest.mark.parametrize('case', BAD_ROWS)
def test_bad_row(tmp_path, case):
    damage, message = BAD_ROWS[case]
    rows = rows_of('cuhk')
    damage(rows)
    write(tmp_path, 'cuhk', rows, images=False)
    with pytest.raises(UserError, match=message) as e: load_pedes('cuhk', tmp_path)
    assert '\n' not in str(e.value) and 'reid_raw.json' in str(e.value)


@pytest.mark.parametrize('content, message', [
    (b'[{"split": "train", ', 'not JSON'), (b'', 'not JSON'), (b'\x89PNG\r\n', 'not JSON'),
    (b'[' * 100_000, 'nested too deep'),
    (b'{"a": 1}', 'expected a list'), (b'[]', 'expected a list'), (b'null', 'expected a list'),
    (b'<html>not found</html>', 'not JSON')])
def test_bad_json(tmp_path, content, message):
    write(tmp_path, 'cuhk', images=False)
    (tmp_path / 'CUHK-PEDES/reid_raw.json').write_bytes(content)
    with pytest.raises(UserError, match=message) as e: load_pedes('cuhk', tmp_path)
    assert '\n' not in str(e.value)


def test_utf8_with_a_byte_order_mark_is_read(tmp_path):
    rows = write(tmp_path, 'rstp', images=False)
    (tmp_path / 'RSTPReid/data_captions.json').write_text(json.dumps(rows), encoding='utf-8-sig')
    assert len(load_pedes('rstp', tmp_path)) == 14


@pytest.mark.parametrize('name', TITLES)
def test_missing_dataset(tmp_path, name):
    with pytest.raises(UserError, match=TITLES[name]) as e: load_pedes(name, tmp_path / 'nowhere')
    assert '\n' not in str(e.value) and 'imgs/' in str(e.value)
    assert ('-p dataset synth' in str(e.value) and 'https://' in str(e.value)) == (name != 'synth')


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="unknown dataset 'cukh': choose one of cuhk, icfg"):
        load_pedes('cukh', tmp_path)
    write(tmp_path, 'rstp', rows_of('rstp', ('train', 'test')))
    with pytest.raises(UserError, match='too few to hold 10% out'): load_pedes('rstp', tmp_path, 'val')
    with pytest.raises(UserError, match="'val' is empty"): load_pedes('rstp', tmp_path, 'val', val_fraction=0)
    with pytest.raises(UserError, match="unknown split 'valid'"):
        load_pedes('rstp', tmp_path, 'valid', val_fraction=0)


def test_annotation_without_images_folder(tmp_path):
    write(tmp_path, 'rstp', images=False)
    (tmp_path / 'RSTPReid/imgs').rmdir()
    with pytest.raises(UserError, match='imgs/'): load_pedes('rstp', tmp_path)


odd_parts = st.sampled_from(['..', '.', '', '~', 'a', 'C:', '\0', '\u202e', '\ud800', ' ', '…'])
parts = st.one_of(odd_parts, st.text(max_size=6))
separators = st.sampled_from(['/', '\\', '//', '/../'])
paths = st.builds(lambda sep, p: sep.join(p), separators, st.lists(parts, max_size=8))


@given(paths)
def test_hostile_paths_stay_inside_or_are_refused(file):
    try: safe = safe_file(file, 'here row 5')
    except UserError as e:
        assert str(e).startswith('here row 5') and '\n' not in str(e)
        return
    root = os.path.normpath('/data/imgs')
    joined = Path(root) / safe
    assert Path(os.path.normpath(joined)).is_relative_to(root) and joined != Path(root)
    assert '..' not in joined.parts and '\\' not in safe
    os.fsencode(joined)                      # a name that a file can have
    os.path.isfile(joined)                     # asks the disk without raising


# --- captions -----------------------------------------------------------------------------------------------

@given(st.text(max_size=60))
def test_clean_caption_is_idempotent_on_plain_results(text):
    cleaned, kinds = clean_caption(text)
    assert cleaned == ' '.join(cleaned.split()) and (cleaned == text) == (not kinds)
    cleaned.encode('utf-8')
    words = [w for w in text.split() if w.isascii() and w.isalnum()]
    assert all(w in cleaned for w in words)


clean_words = st.sampled_from(['man', 'red', "coat's", 'well-worn,', '(blue)', 'T-shirt.', '2'])

@given(st.lists(clean_words, min_size=1, max_size=12))
def test_clean_captions_are_left_alone(words):
    assert clean_caption(' '.join(words)) == (' '.join(words), [])


@pytest.mark.parametrize('text, expected', [
    ('A man\\u3002', 'A man.'), ('red\\xa0top', 'red top'), ('a &amp; b', 'a & b'), ('one_x000D_', 'one'),
    ('x<br/>y</p>', 'x y'),
    ('zero\u200bwidth', 'zerowidth'), ('，ｆｕｌｌ！', ',full!'), ('tab\tnew\nline', 'tab new line'),
    ('\\ud83d\\ude00 ok', '\U0001f600 ok'),
    ('black\\new bag', 'black\\new bag'), ('白色 top', '白色 top'), ('end\\n', 'end')])
def test_dirty_captions(text, expected):
    assert clean_caption(text)[0] == expected


def test_what_was_touched_is_counted_and_what_looks_odd_listed(tmp_path):
    rows = rows_of('rstp')
    rows[0]['captions'] = ['Fine.', 'With\\u3000escape.']
    rows[1]['captions'] = ['print(x) = {1}', '白色']
    write(tmp_path, 'rstp', rows)
    ds = load_pedes('rstp', tmp_path)
    assert ds.notes == ['captions mended: 1 with escape codes, 1 with white space']
    assert ds.check().odd_captions == ['0001.jpg']
    rows[0]['captions'], rows[1]['captions'] = ['A man in a short=sleeved shirt.'], ['x = 1']  # no typo
    write(tmp_path, 'rstp', rows)
    assert load_pedes('rstp', tmp_path).check(images=False).odd_captions == ['0001.jpg']


def test_long_captions_are_counted_in_words_and_marks(tmp_path):
    rows = rows_of('rstp')
    rows[0]['captions'] = ['red, ' * 40]
    write(tmp_path, 'rstp', rows)
    ds = load_pedes('rstp', tmp_path)
    assert ds.check(images=False).long_captions == ['0000.jpg']                      # 80, in 40 words
    assert ds.check(images=False, max_length=80).long_captions == []


def test_descriptions_may_repeat_imgs_as_annotations_do(tmp_path):
    write(tmp_path, 'rstp')
    described(tmp_path, [line('imgs/0000.jpg', 'Old.'), line('0000.jpg', 'New.'), line('imgs/0001.jpg')])
    ds = load_pedes('rstp', tmp_path)
    assert ds.records.id_text.tolist()[:3] == ['New.', 'A tall man.', None]
    described(tmp_path, [line('imgs/none.jpg')])
    with pytest.raises(UserError, match=r"does not have, first 'none\.jpg'"): load_pedes('rstp', tmp_path)


# --- pictures -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode, ext', [
    ('L', 'png'), ('L', 'jpg'), ('CMYK', 'jpg'), ('P', 'png'), ('P', 'gif'), ('1', 'png'), ('LA', 'png'),
    ('RGBA', 'png'),
    ('RGB', 'bmp'), ('RGB', 'webp'), ('RGB', 'tif'), ('I;16', 'png')])
def test_every_mode_becomes_rgb(tmp_path, mode, ext, recwarn):
    path = tmp_path / f'x.{ext}'
    if mode == 'I;16': Image.fromarray(np.full((32, 16), 32_768, np.uint16)).save(path)
    else: picture(path, mode=mode)
    im = load_image(path)
    assert (im.mode, im.size) == ('RGB', (16, 32)) and not recwarn.list
    if mode == 'I;16': assert im.getpixel((0, 0)) == (128, 128, 128)
    if mode == 'RGB' and ext in ('bmp', 'tif'): assert im.tobytes() == Image.open(path).tobytes()


def test_exif_orientation(tmp_path):
    im = Image.new('RGB', (32, 16), 'black')
    im.paste('white', (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6                          # to be turned by 90 degrees clockwise
    im.save(tmp_path / 'x.png', exif=exif)
    upright = load_image(tmp_path / 'x.png')
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4)) == (255, 255, 255) and upright.getpixel((8, 28)) == (0, 0, 0)


def bomb(path: Path, w: int, h: int):
    "A PNG of a few bytes that claims w × h pixels."
    def chunk(kind, data):
        size, checksum = struct.pack('>I', len(data)), struct.pack('>I', zlib.crc32(kind + data))
        return size + kind + data + checksum
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(b'')))


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_broken_pictures(tmp_path):
    picture(tmp_path / 'good.jpg')
    picture(tmp_path / 'good.png', size=(64, 64))
    for ext in ('jpg', 'png'):
        whole = (tmp_path / f'good.{ext}').read_bytes()
        (tmp_path / f'cut.{ext}').write_bytes(whole[:len(whole) * 2 // 3])
    (tmp_path / 'text.jpg').write_text('<html>404</html>')
    (tmp_path / 'empty.jpg').write_bytes(b'')
    (tmp_path / 'program.jpg').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n')
    picture(tmp_path / 'other.pcx')           # Pillow knows it, but only the usual formats are tried
    picture(tmp_path / 'dot.png', size=(1, 1))
    for name, side in (('big', 8_000), ('bigger', 11_000), ('bomb', 60_000)):
        bomb(tmp_path / f'{name}.png', side, side)
    (tmp_path / 'folder.jpg').mkdir()
    os.mkfifo(tmp_path / 'pipe.jpg')
    broken = ('cut.jpg', 'cut.png', 'text.jpg', 'empty.jpg', 'program.jpg', 'other.pcx')
    kinds = dict.fromkeys(broken, 'unreadable')
    kinds |= {'dot.png': 'tiny', 'big.png': 'huge', 'bigger.png': 'huge', 'bomb.png': 'huge'}
    kinds |= dict.fromkeys(('folder.jpg', 'pipe.jpg', 'x' * 300 + '.png', 'nul\x00.png'), 'missing')
    for file, kind in kinds.items():
        with pytest.raises(ImageError) as e: load_image(tmp_path / file)
        assert e.value.kind == kind and file in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(UserError, match=r'dot\.png'): load_image(tmp_path / 'dot.png')
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)     # crosses from a loader's process


@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_damaged_bytes_give_a_picture_or_an_image_error(tmp_path_factory, at, noise):
    base = tmp_path_factory.getbasetemp()
    picture(base / 'fuzz.jpg', 3)
    content = bytearray((base / 'fuzz.jpg').read_bytes())
    content[at:at + len(noise)] = noise
    (base / 'fuzz.jpg').write_bytes(content)
    try: assert load_image(base / 'fuzz.jpg').mode == 'RGB'
    except ImageError as e: assert e.kind in ('unreadable', 'tiny', 'huge')


def test_links(tmp_path):
    write(tmp_path, 'rstp')
    folder = tmp_path / 'RSTPReid'
    picture(tmp_path / 'secret.jpg')
    (folder / 'imgs/0000.jpg').unlink()
    (folder / 'imgs/0000.jpg').symlink_to(tmp_path / 'secret.jpg')
    (folder / 'imgs/0001.jpg').unlink()
    (folder / 'imgs/0001.jpg').symlink_to(folder / 'imgs/0002.jpg')        # a link inside is fine
    (folder / 'imgs/0003.jpg').unlink()
    (folder / 'imgs/0003.jpg').symlink_to(folder / 'imgs/0003.jpg')        # a loop
    ds = load_pedes('rstp', tmp_path)
    with pytest.raises(ImageError, match='link that leaves'): ds.image(0)
    assert ds.image(1).tobytes() == ds.image(2).tobytes()
    report = ds.check()
    assert (report.outside, report.missing) == (['0000.jpg'], ['0003.jpg']) and not report.ok
    (folder / 'imgs').rename(tmp_path / 'disk')                     # imgs/ itself may live on another disk
    (folder / 'imgs').symlink_to(tmp_path / 'disk')
    assert load_pedes('rstp', tmp_path).image(2).mode == 'RGB'


# --- descriptions -------------------------------------------------------------------------------------------

def described(root: Path, lines: list, end='\n') -> Path:
    path = root / 'RSTPReid/descriptions.jsonl'
    path.write_text('\n'.join(x if isinstance(x, str) else json.dumps(x) for x in lines) + end)
    return path


def line(image, identity='A tall man.', clothing='A red coat.', **kw):
    return {'image': image, 'identity': identity, 'clothing': clothing, **kw}


def test_descriptions_of_training_images_without_captions(tmp_path):
    rows = rows_of('rstp')
    rows[1]['captions'] = []
    write(tmp_path, 'rstp', rows)
    described(tmp_path, [line('0000.jpg'), line('0001.jpg'), line('0002.jpg')])   # as servers do: of pictures
    ds = load_pedes('rstp', tmp_path)
    assert '0001.jpg' not in set(ds.records.file) and ds.records.id_text.notna().sum() == 2
    assert ds.notes == ['descriptions: 3 of 14 images have both',
                        'training images without a caption, left out: 1']
    for row in rows:
        if row['split'] == 'train': row['captions'] = []
    write(tmp_path, 'rstp', rows)
    with pytest.raises(UserError, match="'train' has pictures but no captions"):
        load_pedes('rstp', tmp_path).split('train')


def test_descriptions(tmp_path):
    write(tmp_path, 'rstp')
    path = described(tmp_path, [
        line('0000.jpg'), line('0001.jpg', status='failed'),
        line('0002.jpg', None, None, status='failed'), '',
        line('0003.jpg', 'Old.'), line('0003.jpg', 'New.'), line('0004.jpg', '  ')])
    ds = load_pedes('rstp', tmp_path)
    assert ds.records.id_text.tolist()[:6] == ['A tall man.', None, None, 'New.', None, None]
    assert ds.records.clo_text.tolist()[:6] == ['A red coat.', None, None, 'A red coat.', 'A red coat.', None]
    assert ds.notes == ['descriptions: 2 of 14 images have both']
    assert ds.split('train').records.id_text.notna().sum() == 2
    assert 'id_text' not in load_pedes('rstp', tmp_path, descriptions=None).records
    other = path.rename(tmp_path / 'other.jsonl')
    assert 'id_text' not in load_pedes('rstp', tmp_path).records
    again = attach_descriptions(load_pedes('rstp', tmp_path, descriptions=other), other)
    pd.testing.assert_frame_equal(again.records, ds.records)
    with pytest.raises(UserError, match='no such file of descriptions'):
        load_pedes('rstp', tmp_path, descriptions=tmp_path / 'none.jsonl')


def test_a_cut_last_line_is_left_out_and_said(tmp_path):
    write(tmp_path, 'rstp')
    whole = json.dumps(line('0001.jpg', 'Ein großer Mann.'), ensure_ascii=False).encode()
    path = described(tmp_path, [line('0000.jpg')])
    first = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(first + whole[:cut])
        table, notes = read_descriptions(path)
        assert table.image.tolist() == ['0000.jpg'] and 'last line was cut' in notes[0]
    path.write_bytes(first + whole)                                        # only the line's end is lost
    assert read_descriptions(path)[0].image.tolist() == ['0000.jpg', '0001.jpg']
    path.write_bytes(b'')
    assert len(read_descriptions(path)[0]) == 0 and load_pedes('rstp', tmp_path).records.id_text.isna().all()


@pytest.mark.parametrize('lines, message', [
    ([line('0000.jpg'), '{"image": "0001', line('0002.jpg')], 'line 2: not JSON'),
    ([line('0000.jpg'), '{"image": "0001'], 'line 2: not JSON'),
    ([line('9999.jpg')], "1 descriptions are of images that .* does not have, first '9999.jpg'"),
    ([line('../0000.jpg')], 'line 1: the image path .* leaves'),
    ([{'image': '0000.jpg', 'identity': 'x'}], 'line 1: .* clothing missing'),
    (['[1, 2]'], 'line 1: expected an object'),
    ([line(5)], "line 1: 'image' must be a string"),
    ([line('0000.jpg', 7)], "'identity' of 0000.jpg must be a string or null")])
def test_bad_descriptions(tmp_path, lines, message):
    write(tmp_path, 'rstp')
    described(tmp_path, lines)
    with pytest.raises(UserError, match=message) as e: load_pedes('rstp', tmp_path)
    assert '\n' not in str(e.value)


# --- the report ---------------------------------------------------------------------------------------------

def official_rows(name: str) -> list[dict]:
    "Rows with exactly the official counts of images, captions and identities."
    rows, pid = [], int(name == 'cuhk')
    for split, (images, captions, ids) in OFFICIAL[name].items():
        extra = captions - images * (captions // images)
        for i in range(images):
            n = captions // images + (i < extra)
            texts = [f'A person who is number {i} in text {k}.' for k in range(n)]
            path_key = 'img_path' if name == 'rstp' else 'file_path'
            file = f'cam_{i % 7}/{split}_{i:05d}.jpg'
            rows.append({'split': split, 'captions': texts, path_key: file, 'id': pid + i % ids})
        pid += ids
    return rows


@pytest.mark.parametrize('name', OFFICIAL)
def test_official_counts(tmp_path, name, capsys):
    rows = official_rows(name)
    write(tmp_path, name, rows, images=False)
    ds = load_pedes(name, tmp_path)
    report = ds.check(images=False)
    assert report.ok, report
    assert not report.images_checked and 'pictures not opened' in capsys.readouterr().out
    totals = {'cuhk': (40_206, 80_440, 13_003), 'icfg': (54_522, 54_522, 4_102),
              'rstp': (20_505, 41_010, 4_101)}
    total = totals[name]
    counted = report.counts.loc[['train+val', 'test']] if name == 'icfg' else report.counts
    assert tuple(counted[['images', 'captions', 'ids']].sum()) == total
    assert f'{OFFICIAL[name]["test"][0]:,}' in str(report)
    for split in ('train', 'val', 'test'):
        assert ds.split(split).check(images=False).ok, split
    rows.pop()
    write(tmp_path, name, rows, images=False)
    report = load_pedes(name, tmp_path).check(images=False)
    assert not report.ok and report.miscounted[0].startswith('test images')


def test_icfg_without_hold_out_counts_train_itself(tmp_path):
    write(tmp_path, 'icfg', official_rows('icfg'), images=False)
    assert load_pedes('icfg', tmp_path, val_fraction=0).check(images=False).ok


def test_report_finds_what_is_wrong(tmp_path, capsys):
    rows = rows_of('rstp')
    rows[13]['id'] = 0                                                      # an identity in train and in test
    rows[3]['img_path'] = rows[5]['img_path']                               # one file, two identities
    rows[6]['img_path'] = rows[7]['img_path']                               # one file twice
    rows[8]['captions'] = ['', 'x']
    rows[9]['captions'] = ['Same.', 'Same.']
    rows[10]['captions'] = []
    rows[11]['captions'] = ['Same.']                                        # said of two people
    rows[12]['captions'] = ['A man. ' + 'He walks. ' * 50]
    write(tmp_path, 'rstp', rows)
    imgs = tmp_path / 'RSTPReid/imgs'
    (imgs / '0000.jpg').unlink()
    (imgs / '0001.jpg').write_bytes(b'junk')
    picture(imgs / '0002.jpg', size=(1, 1))
    (imgs / '0011.jpg').write_bytes((imgs / '0004.jpg').read_bytes())
    report = load_pedes('rstp', tmp_path).check(hashes=True, workers=2)
    assert not report.ok
    assert report.shared_ids == [0]
    assert report.files_in_two_ids == ['0005.jpg']
    assert report.repeated_files == ['0007.jpg']
    assert report.empty_captions == ['0010.jpg']       # of 0008 the other caption is kept
    assert report.repeated_captions == ['0009.jpg'] and report.long_captions == ['0012.jpg']
    assert report.shared_captions == ['Same.']
    assert report.missing == ['0000.jpg'] and report.unreadable == ['0001.jpg']
    assert report.tiny == ['0002.jpg'] and report.huge == []
    assert [set(s) for s in report.same_bytes] == [{'0004.jpg', '0011.jpg'}]
    printed = capsys.readouterr().out
    assert printed.strip() == str(report) and len(printed.splitlines()) < 25
    for words in ('identities in more than one split: 1 (0)', 'missing files: 1 (0000.jpg)', '18,505'):
        assert words in printed
    assert not hasattr(report, 'nothing')


def test_report_of_a_dataset_that_lost_a_split(tmp_path):
    write(tmp_path, 'rstp', rows_of('rstp', ('train',) * 4 + ('val',) * 2))
    report = load_pedes('rstp', tmp_path).check(images=False)
    assert 'test has no images' in report.miscounted


def test_dataset_by_hand():
    row = {'split': 'train', 'pid': 3, 'image_id': 0, 'file': 'a.png', 'captions': ['x', 'y']}
    records = pd.DataFrame([row])
    ds = PedesDataset('rstp', Path('nowhere'), records)
    assert ds.captions.text.tolist() == ['x', 'y'] and len(ds) == 1
    with pytest.raises(ImageError, match=r'a\.png'): ds.image(0)
