"Batches: sampler laws, determinism over processes, tokenizers, images that do not load."
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bdam_repro import batches
from bdam_repro.accumulate import parts_of
from bdam_repro.batches import (
    SPECIAL_TOKENS,
    Batch,
    PKSampler,
    encode_texts,
    image_batches,
    load_tokenizer,
    text_batches,
    train_batches,
    train_tokenizer,
    trim,
)
from bdam_repro.config import UserError
from bdam_repro.hub import hub_folder
from bdam_repro.images import ImageStore, augment, change_images, change_on_device, decode_image, draw_changes
from bdam_repro.pedes import PedesDataset

COLORS = ['red', 'green', 'blue', 'black', 'white', 'brown']


def make_dataset(root, n_ids=10, per_id=4, **columns):
    "Striped pictures, captions with the image's number in them."
    (root/'imgs').mkdir(parents=True)
    rng, records = np.random.default_rng(0), []
    for i in range(n_ids*per_id):
        Image.fromarray(rng.integers(0, 256, (40, 20, 3), dtype=np.uint8)).save(root/'imgs'/f'{i}.png')
        pid = i//per_id
        long = ' It is long.'*(i % 5)
        captions = [f'A {COLORS[pid % 6]} coat, picture {i}, caption {j}.{long}' for j in range(1 + i % 3)]
        split = ('train', 'train', 'train', 'val', 'test')[pid % 5]
        records.append({'split': split, 'pid': pid, 'image_id': i, 'file': f'{i}.png', 'captions': captions}
                       | {name: f(i) for name, f in columns.items()})
    return PedesDataset('toy', root, pd.DataFrame(records))


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp('toy')/'data', id_text=lambda i: f'A tall man {i}',
                        clo_text=lambda i: None if i % 7 == 0 else f'Red coat {i}')


@pytest.fixture(scope='module')
def tokenizer(dataset, tmp_path_factory):
    captions = [c for cs in dataset.records.captions for c in cs]
    return train_tokenizer(captions, tmp_path_factory.mktemp('tok')/'tok', vocab_size=200)


def make(dataset, tokenizer, **kw):
    return train_batches(dataset, tokenizer, **dict(size=(32, 16), p=3, k=2, seed=1, id_text='both') | kw)


def same(a: Batch, b: Batch):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()) if x is not None)


# ------------------------------------------------------------------ sampler

ids_lists = st.lists(st.integers(1, 9), min_size=1, max_size=12)  # images an identity


@settings(max_examples=60, deadline=None)
@given(counts=ids_lists, p=st.integers(1, 5), k=st.integers(1, 5), seed=st.integers(0, 9),
       epoch=st.integers(0, 20))
def test_sampler_laws(counts, p, k, seed, epoch):
    pids = np.repeat(np.arange(len(counts)) + 100, counts)
    if p > len(counts):
        with pytest.raises(UserError): PKSampler(pids, p, k)
        return
    sampler = PKSampler(pids, p, k, seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == -(-len(counts)//p)
    seen = Counter()
    for batch in batches:
        per_id = Counter(pids[i] for i in batch)
        assert len(per_id) == p and set(per_id.values()) == {k}
        seen.update(per_id.keys())
        for pid in per_id:  # distinct images first, the rest repeated evenly
            uses, n = Counter(i for i in batch if pids[i] == pid), counts[pid - 100]
            assert len(uses) == min(n, k) and max(uses.values()) <= -(-k//n)
    assert set(seen) == set(pids) and sum(seen.values()) - len(counts) < p
    assert batches == list(sampler)


@settings(max_examples=30, deadline=None)
@given(counts=ids_lists, k=st.integers(1, 4), seed=st.integers(0, 9), start=st.integers(0, 5))
def test_every_image_is_seen_within_one_round(counts, k, seed, start):
    pids = np.repeat(np.arange(len(counts)), counts)
    sampler, rounds = PKSampler(pids, 1, k, seed), -(-max(counts)//k)
    seen = set()
    for epoch in range(start*rounds, (start + 2)*rounds):
        sampler.set_epoch(epoch)
        seen |= {i for batch in sampler for i in batch}
    assert seen == set(range(len(pids)))


def test_sampler_depends_on_seed_and_epoch():
    pids = np.repeat(np.arange(20), 4)
    draws = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        s = PKSampler(pids, 4, 2, seed)
        s.set_epoch(epoch)
        draws.append(str(list(s)))
    assert len(set(draws)) == 3


def test_sampler_refuses_what_cannot_be():
    pids = [1, 1, 2, 2]
    with pytest.raises(UserError, match='has 2'): PKSampler(pids, p=3, k=2)
    with pytest.raises(UserError, match='p=0'): PKSampler(pids, p=0, k=2)
    with pytest.raises(UserError, match='3 processes'): PKSampler(pids, p=2, k=2, world=3)


# ------------------------------------------------------------------ batches

def test_union_over_ranks_is_the_single_process_batch(dataset, tokenizer):
    whole = list(make(dataset, tokenizer))
    parts = [list(make(dataset, tokenizer, rank=r, world=3)) for r in range(3)]
    for batch, *shares in zip(whole, *parts):
        assert torch.equal(torch.cat([s.rows for s in shares]), batch.rows)
        assert torch.equal(torch.cat([s.images for s in shares]), batch.images)  # mirrors, shifts, boxes
        captions = [ids[m].tolist() for b in shares for ids, m in zip(b.caption_ids, b.caption_mask)]
        assert captions == [ids[m].tolist() for ids, m in zip(batch.caption_ids, batch.caption_mask)]


def test_same_seed_same_batches_for_any_workers_and_cache(dataset, tokenizer):
    want = list(make(dataset, tokenizer))
    for kw in (dict(cache=False), dict(cache=False, workers=2), dict(workers=1)):
        for a, b in zip(want, make(dataset, tokenizer, **kw), strict=True): assert same(a, b)
    other = next(iter(make(dataset, tokenizer, seed=2)))
    assert not torch.equal(other.rows, want[0].rows)


def test_epochs_differ_and_can_be_repeated(dataset, tokenizer):
    loader = make(dataset, tokenizer)
    first = list(loader)
    loader.set_epoch(1)
    second = list(loader)
    loader.set_epoch(0)
    assert all(same(a, b) for a, b in zip(first, loader))
    assert not all(torch.equal(a.images, b.images) for a, b in zip(first, second))


def test_texts_belong_to_their_images(dataset, tokenizer):
    loader = make(dataset, tokenizer, k=4)
    for epoch in range(3):
        loader.set_epoch(epoch)
        for b in loader:
            decode = lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts = decode(b.caption_ids), decode(b.id_ids), decode(b.clo_ids)
            for row, pid, caption, id_text, clo in zip(b.rows.tolist(), b.pids.tolist(), *texts):
                record = dataset.records.iloc[row]
                assert record.pid == pid and record.split == 'train'
                flat = lambda t: ''.join(c for c in t.lower() if c.isalnum())
                assert flat(caption) in {flat(c) for c in record.captions}
                assert flat(id_text) == flat(record.id_text)
                there = isinstance(record.clo_text, str)
                assert flat(clo) == flat(record.clo_text if there else record.captions[0])


def test_all_captions_are_drawn(dataset, tokenizer):
    loader, seen = make(dataset, tokenizer), set()
    for epoch in range(40):
        loader.set_epoch(epoch)
        seen |= {tuple(ids[m].tolist()) for b in loader for ids, m in zip(b.caption_ids, b.caption_mask)}
    assert len(seen) == sum(len(c) for c in dataset.records[dataset.records.split == 'train'].captions)


def test_missing_descriptions_are_counted(dataset, tokenizer):
    train = dataset.records[dataset.records.split == 'train']
    n = train.clo_text.isna().sum()
    note = f'{n} of {len(train)} images have no clo_text: their first caption stands in.'
    assert make(dataset, tokenizer).note == note


def test_without_descriptions(tmp_path, tokenizer):
    plain = make_dataset(tmp_path/'plain')
    batch = next(iter(make(plain, tokenizer, id_text='caption')))
    assert batch.id_ids is batch.clo_ids is None
    assert batch.to('cpu').clo_mask is None
    with pytest.raises(UserError, match='needs descriptions'): make(plain, tokenizer)
    with pytest.raises(UserError, match='id_text'): make(plain, tokenizer, id_text='captions')


def test_id_text_caption_leaves_the_identity_description_out(dataset, tokenizer):
    batch = next(iter(make(dataset, tokenizer, id_text='caption')))
    assert batch.id_ids is None and batch.clo_ids is not None


def test_batches_are_cut_to_their_longest_text(dataset, tokenizer):
    for b in make(dataset, tokenizer, p=1, k=1): assert b.caption_mask.all() and b.clo_mask.all()


def test_images_without_captions_are_left_out_of_training_but_stay_in_the_gallery(tmp_path, tokenizer):
    d = make_dataset(tmp_path/'d')
    d.records.at[1, 'captions'] = []
    loader = make(d, tokenizer, id_text='caption', k=4)
    assert 1 not in {r for _ in range(3) for b in loader for r in b.rows.tolist()}
    assert 1 in {r for rows, _ in image_batches(d, (32, 16), split='train') for r in rows.tolist()}
    assert 1 not in {r for rows, *_ in text_batches(d, tokenizer, split='train') for r in rows.tolist()}


def test_an_empty_split_is_refused(dataset, tokenizer):
    with pytest.raises(UserError, match="split 'query'"): make(dataset, tokenizer, split='query')
    texts = text_batches(dataset, tokenizer, split='query')
    with pytest.raises(UserError, match="split 'query'"): next(texts)


def test_evaluation_sees_each_image_and_each_caption_once(dataset, tokenizer):
    test = np.flatnonzero(dataset.records.split == 'test')
    rows, images = (torch.cat(x) for x in zip(*image_batches(dataset, (32, 16), batch=3)))
    assert rows.tolist() == test.tolist() and images.shape == (len(test), 3, 32, 16)
    store = ImageStore(dataset, (32, 16), test, cache=True)
    from_store = [x for _, x in image_batches(dataset, (32, 16), batch=5, images=store)]
    assert torch.equal(torch.cat(from_store), images)
    owners = [r for rows, *_ in text_batches(dataset, tokenizer, batch=2) for r in rows.tolist()]
    assert owners == [r for r in test for _ in dataset.records.captions[r]]


@pytest.mark.parametrize('workers', [0, 1])
def test_a_corrupt_image_is_one_line_with_its_name(tmp_path, tokenizer, workers):
    d = make_dataset(tmp_path/'d', n_ids=5, per_id=2)
    (d.root/'imgs'/'3.png').write_bytes(b'\x89PNG nothing')
    loader = make(d, tokenizer, id_text='caption', cache=False, workers=workers)
    with pytest.raises(UserError) as e: list(loader)
    assert '3.png' in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(UserError, match=r'3\.png'): make(d, tokenizer, id_text='caption', cache=True)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    d = make_dataset(tmp_path/'d', n_ids=5, per_id=1)
    Image.new('RGB', (20, 40)).save(tmp_path/'secret.png')
    (d.root/'imgs'/'0.png').unlink()
    (d.root/'imgs'/'0.png').symlink_to(tmp_path/'secret.png')
    with pytest.raises(UserError, match=r'0\.png'): ImageStore(d, (32, 16))


def test_cache_follows_the_budget(dataset):
    n = len(dataset.records)*3*32*16
    assert ImageStore(dataset, (32, 16), budget=n).cached
    assert not ImageStore(dataset, (32, 16), budget=n - 1).cached
    a, b = ImageStore(dataset, (32, 16), cache=True), ImageStore(dataset, (32, 16), cache=False)
    assert torch.equal(a[[5, 0, 5]], b[[5, 0, 5]])
    with pytest.raises(UserError, match='cache'): ImageStore(dataset, (32, 16), cache='yes')


def test_wait_share_is_what_the_loop_waited(dataset, tokenizer):
    loader = make(dataset, tokenizer)
    assert loader.wait_share == 0
    for _ in loader: torch.randn(200, 200) @ torch.randn(200, 200)
    assert 0 < loader.wait_share <= 1


# ------------------------------------------------------------------ augmentation

def picture(b=4, h=24, w=16):
    "Values that tell where a pixel came from; never 0 (the frame) nor 127 (erased)."
    return (torch.arange(b*3*h*w).reshape(b, 3, h, w) % 100 + 1).to(torch.uint8)


def test_augment_off_is_the_identity():
    x = picture()
    assert torch.equal(augment(x, torch.Generator().manual_seed(0), flip=0, pad=0, erase=0), x)
    assert torch.equal(augment(x, torch.Generator().manual_seed(0), flip=1, pad=0, erase=0), x.flip(3))


def test_shift_moves_the_picture_and_fills_with_black():
    x = picture(64)
    out = augment(x, torch.Generator().manual_seed(0), flip=0, pad=3, erase=0)
    offsets = set()
    for a, b in zip(x, out):
        hits = [(dy, dx) for dy in range(7) for dx in range(7)
                if torch.equal(torch.nn.functional.pad(a, (3,)*4)[:, dy:dy + 24, dx:dx + 16], b)]
        assert hits
        offsets.add(hits[0])
    assert {dy for dy, _ in offsets} == {dx for _, dx in offsets} == set(range(7))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), h=st.integers(4, 40), w=st.integers(4, 40))
def test_erasing_is_one_rectangle_within_its_bounds(seed, h, w):
    x = picture(8, h, w)
    out = augment(x, torch.Generator().manual_seed(seed), flip=0, pad=0, erase=1, area=(.1, .3))
    for a, b in zip(x, out):
        hit = (b == 127).all(0)
        ys, xs = np.flatnonzero(hit.any(1)), np.flatnonzero(hit.any(0))
        assert hit[ys[0]:ys[-1] + 1, xs[0]:xs[-1] + 1].all() if len(ys) else True
        assert torch.equal(a[:, ~hit], b[:, ~hit]) and hit.float().mean() <= .3 + 1e-6


def test_augment_leaves_its_input_alone_and_repeats():
    x = picture()
    before = x.clone()
    a, b = (augment(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(x, before)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), h=st.integers(1, 40), w=st.integers(1, 40), pad=st.integers(0, 60),
       flip=st.sampled_from([0, .5, 1]), erase=st.sampled_from([0, .5, 1]))
def test_the_loop_and_the_gather_give_the_same_bytes(seed, h, w, pad, flip, erase):
    x, g = picture(8, h, w), torch.Generator().manual_seed(seed)
    drawn = draw_changes(8, (h, w), g, flip, pad, erase)
    before, table = x.clone(), torch.from_numpy(drawn.table())
    assert torch.equal(change_on_device(x, table), change_images(x, drawn)) and torch.equal(x, before)


@pytest.mark.parametrize('options', [{}, dict(workers=1), dict(epoch_of='pairs'), dict(two_captions=True)],
                         ids=str)
def test_images_changed_by_the_batch_are_those_of_the_loader(dataset, tokenizer, options):
    "Whole, in parts, and as the shares of two processes."
    ours = make(dataset, tokenizer, **options)
    shares = [make(dataset, tokenizer, **options, rank=rank, world=2) for rank in (0, 1)]
    for loader in shares: loader.device = torch.device('meta')
    for batch, *of_two in zip(ours, *shares, strict=True):
        parts = [part for share in of_two for part in parts_of(share, 3)]
        assert torch.equal(torch.cat([part.to('cpu').images for part in parts]), batch.images)
        assert batch.changes is None and not torch.equal(torch.cat([b.images for b in of_two]), batch.images)


def test_nothing_is_drawn_where_nothing_changes(dataset, tokenizer):
    loader = make(dataset, tokenizer, augmentation=dict(flip=0, pad=0, erase=0))
    loader.device = torch.device('meta')
    batch = next(iter(loader))
    assert batch.changes is None
    assert torch.equal(batch.images, next(iter(make(dataset, tokenizer, augmentation=False))).images)


# ------------------------------------------------------------------ tokenizers

TEXTS = [f'The {c} {w} of a {s} person, naïve café №'
         for c in COLORS for w in ('coat', 'dress') for s in ('tall', 'short')]


def test_trained_tokenizer_is_the_same_in_another_process(tmp_path):
    train_tokenizer(TEXTS, tmp_path/'a', vocab_size=150)
    code = ('from bdam_repro.batches import train_tokenizer\n'
            f'train_tokenizer({TEXTS!r}, {str(tmp_path/"b")!r}, vocab_size=150)')
    env = os.environ | {'PYTHONHASHSEED': '7', 'RAYON_NUM_THREADS': '3'}
    subprocess.run([sys.executable, '-c', code], check=True, env=env)
    assert (tmp_path/'a'/'tokenizer.json').read_bytes() == (tmp_path/'b'/'tokenizer.json').read_bytes()
    assert {f.name for f in tmp_path.iterdir()} == {'a', 'b'}


def test_trained_tokenizer_is_berts_kind(tmp_path):
    t = train_tokenizer(TEXTS, tmp_path/'t', vocab_size=200)
    ids = t('The RED café')['input_ids']
    assert t.convert_ids_to_tokens(ids) == ['[CLS]', 'the', 'red', 'cafe', '[SEP]']
    assert t.convert_ids_to_tokens(range(5)) == ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    assert '[UNK]' not in t.tokenize('Quilted jacket, size 42; zip-up?')  # letters the captions never had
    assert len(t) <= 200
    assert load_tokenizer(tmp_path/'t')('a red coat')['input_ids'] == t('a red coat')['input_ids']


def bert_folder(folder):
    (folder/'bert').mkdir()
    (folder/'bert'/'config.json').write_text('{"model_type": "bert"}')
    (folder/'bert'/'vocab.txt').write_text('\n'.join([*SPECIAL_TOKENS, 'red', 'coat', '##s']))
    return folder/'bert'


def clip_folder(folder):
    (folder/'clip').mkdir()
    (folder/'clip'/'config.json').write_text('{"model_type": "clip"}')
    pieces = ['r', 'e', 'd</w>', 're', 'red</w>', '<|startoftext|>', '<|endoftext|>']
    (folder/'clip'/'vocab.json').write_text(str({p: i for i, p in enumerate(pieces)}).replace("'", '"'))
    (folder/'clip'/'merges.txt').write_text('#version: 0.2\nr e\nre d</w>\n')
    return folder/'clip'


def test_bert_and_clip_tokenizers_by_folder(tmp_path):
    ids, mask = encode_texts(load_tokenizer(bert_folder(tmp_path)), ['Red coats', 'red'], max_length=8)
    assert ids.tolist() == [[2, 5, 6, 7, 3], [2, 5, 3, 0, 0]] and mask.sum(1).tolist() == [5, 3]
    ids, mask = encode_texts(load_tokenizer(clip_folder(tmp_path)), ['Red red', 'red'], max_length=8)
    assert ids.tolist() == [[5, 4, 4, 6], [5, 4, 6, 6]] and mask.sum(1).tolist() == [4, 3]


@pytest.mark.parametrize('kind', ['trained', 'bert', 'clip'])
@pytest.mark.parametrize('max_length', [4, 8, 60])
def test_tokens_are_those_of_the_library(tmp_path, kind, max_length):
    "`encode_texts` goes round `tokenizer(…)` to be quick."
    if kind == 'trained': t = train_tokenizer(TEXTS, tmp_path/kind, vocab_size=200)
    else: t = load_tokenizer(dict(bert=bert_folder, clip=clip_folder)[kind](tmp_path))
    texts = [*TEXTS, 'a red coat '*30, 'red', '']
    want = t(texts, truncation=True, max_length=max_length, padding='longest')
    ids, mask = encode_texts(t, texts, max_length)
    assert ids.tolist() == want['input_ids'] and mask.int().tolist() == want['attention_mask']
    made = set()
    for _ in range(2):                              # by a tokenizer that has been used, and by a fresh one
        again = encode_texts(t, texts, max_length, tmp_path/'kept.safetensors')
        assert torch.equal(ids, again[0]) and torch.equal(mask, again[1])
        made.add((tmp_path/'kept.safetensors').stat().st_mtime_ns)
        t = load_tokenizer(dict(trained=tmp_path/kind, bert=tmp_path/'bert', clip=tmp_path/'clip')[kind])
    assert len(made) == 1
    assert encode_texts(t, texts[:3], max_length, tmp_path/'kept.safetensors')[0].shape[0] == 3


def test_a_vocabulary_is_remembered_for_its_texts_alone(tmp_path, monkeypatch):
    a = train_tokenizer(TEXTS, tmp_path/'a', 200, tmp_path/'v.safetensors').get_vocab()
    other = train_tokenizer(TEXTS[:1], tmp_path/'b', 200, tmp_path/'v.safetensors').get_vocab()
    assert other != a and train_tokenizer(TEXTS, tmp_path/'c', 200, tmp_path/'v.safetensors').get_vocab() == a
    monkeypatch.setattr(batches, 'wordpiece_vocab', None)
    assert train_tokenizer(TEXTS, tmp_path/'d', 200, tmp_path/'v.safetensors').get_vocab() == a


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path/'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match='no tokenizer'): load_tokenizer(tmp_path)
    (tmp_path/'tokenizer.json').write_text('{"broken": ')
    with pytest.raises(UserError, match='does not load') as e: load_tokenizer(tmp_path)
    assert '\n' not in str(e.value)


def test_hub_out_of_reach_and_wrong_names(tmp_path):
    code = ("from bdam_repro.config import UserError\nfrom bdam_repro.batches import load_tokenizer\n"
            "for name in ('bert-base-uncased', 'a/b/c', './missing', 'not a name!'):\n"
            "    try: load_tokenizer(name)\n    except UserError as e: print(e)")
    env = os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)}
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    lines = out.stdout.splitlines()
    assert len(lines) == 4
    for words in ('google-bert/bert-base-uncased', 'HF_HUB_OFFLINE', 'folder'): assert words in lines[0]
    assert 'no folder' in lines[1] and 'no folder' in lines[2] and 'check the name' in lines[3]


def test_a_cached_name_works_offline(tmp_path):
    "The hub's own cache layout: refs/main names a snapshot."
    repo = tmp_path/'hub'/'models--google-bert--bert-base-uncased'
    snapshot = repo/'snapshots'/('0'*40)
    snapshot.mkdir(parents=True)
    (repo/'refs').mkdir()
    (repo/'refs'/'main').write_text('0'*40)
    (snapshot/'config.json').write_text('{"model_type": "bert"}')
    (snapshot/'vocab.txt').write_text('\n'.join([*SPECIAL_TOKENS, 'red']))
    code = ("from bdam_repro.batches import load_tokenizer\n"
            "print(load_tokenizer('bert-base-uncased')('red')['input_ids'])")
    env = os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)}
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == '[2, 5, 3]', out.stderr


def test_no_words_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match='empty'): train_tokenizer(['', '  '], tmp_path/'t')
    assert list(tmp_path.iterdir()) == []


def test_long_texts_keep_their_closing_token(tokenizer):
    ids, mask = encode_texts(tokenizer, ['a red coat '*50, 'red'], max_length=10)
    assert ids.shape == (2, 10) and ids[0, -1] == tokenizer.sep_token_id and mask[0].all()
    cut, cut_mask = trim(ids[1:], mask[1:])
    assert cut_mask.all() and cut.shape[1] == mask[1].sum()


def test_folder_is_taken_as_it_is(tmp_path): assert hub_folder(tmp_path) == tmp_path


# ------------------------------------------------------------------ a second caption

def test_a_second_caption_is_another_one_of_the_same_image(dataset, tokenizer):
    captions = dataset.records['captions']
    decode = lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True)
    norm = lambda t: decode(tokenizer([t])['input_ids'])[0]
    batches = list(make(dataset, tokenizer, two_captions=True))
    for b in batches:
        for row, first, other in zip(b.rows.tolist(), decode(b.caption_ids), decode(b.other_ids)):
            own = [norm(t) for t in captions[row]]
            assert {first, other} <= set(own) and (first != other or len(set(own)) == 1)
    alone = list(make(dataset, tokenizer))
    assert all(b.other_ids is None for b in alone)
    for a, b in zip(alone, batches, strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.caption_ids, b.caption_ids)


def test_a_window_in_the_middle_of_the_picture(tmp_path):
    a = np.zeros((20, 40, 3), np.uint8)
    a[:, 10:30] = 200
    Image.fromarray(a).save(tmp_path/'a.png')
    assert (decode_image(tmp_path/'a.png', (20, 20), columns=.5) == 200).all()
    whole = decode_image(tmp_path/'a.png', (20, 40))
    assert torch.equal(whole, torch.from_numpy(a).permute(2, 0, 1))
    assert torch.equal(whole, decode_image(tmp_path/'a.png', (20, 40), columns=1.))

@pytest.mark.parametrize('spec, asked', [
    ('vit-base-patch16-224', ('google/vit-base-patch16-224', None)),
    ('vit-base-patch16-224@abc', ('google/vit-base-patch16-224', 'abc')),
    ('someone/their-model@main', ('someone/their-model', 'main'))])
def test_a_short_name_may_pin_a_revision(monkeypatch, tmp_path, spec, asked):
    def download(name, revision, allow_patterns):
        seen.append((name, revision))
        return str(tmp_path)
    seen = []
    monkeypatch.setattr('bdam_repro.hub.snapshot_download', download)
    assert hub_folder(spec) == tmp_path and seen == [asked]
