"""Datasets as their authors ship them, checkpoints as the hub has them, and runs of the `paper` preset's
shape on both."""
import json
import os
import re

import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
)

from bdam_repro.batches import load_tokenizer
from bdam_repro.config import UserError, make_config, run_dir
from bdam_repro.files import read_tensors
from bdam_repro.pedes import load_pedes
from bdam_repro.pretrained import from_pretrained
from bdam_repro.runs import finished, prepare, train
from bdam_repro.synth import make_synth

OFFICIAL = {'cuhk': ('CUHK-PEDES', 'reid_raw.json'), 'icfg': ('ICFG-PEDES', 'ICFG-PEDES.json'),
            'rstp': ('RSTPReid', 'data_captions.json')}
WIDTHS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Each dataset in its official folder, with what is odd about it in real life."
    root = tmp_path_factory.mktemp('data')
    for layout, (folder, file) in OFFICIAL.items():
        base = make_synth(root, layout, n_ids=18, images_per_id=3, val_ids=4, test_ids=4, folder=folder,
                          progress=False)
        for extra in ('synth.json', 'factors.jsonl', 'descriptions.jsonl'):
            (base/extra).unlink()  # the real ones have none
        rows = json.loads((base/file).read_text())
        key = 'img_path' if layout == 'rstp' else 'file_path'
        path = lambda i, rows=rows, base=base, key=key: base/'imgs'/rows[i][key]
        # 1, 4 and 10 captions, a bare string, gray, CMYK and palette pictures
        if layout == 'cuhk':
            text = rows[0]['captions']
            for row, captions in zip(rows, (text[:1], text*2, text*5, text[0])): row['captions'] = captions
            for i, mode in ((4, 'L'), (5, 'CMYK')): Image.open(path(i)).convert(mode).save(path(i))
            Image.open(path(6)).convert('P').save(path(6), 'PNG')
        if layout == 'icfg':
            os.replace(base/file, base/(file := 'ICFG_PEDES.json'))                   # the misspelled release
        if layout == 'rstp':
            rows[0]['captions'][0] = 'A man\\u3002 wearing 白色 top\\xa0'              # CJK and stray escapes
        (base/file).write_text(json.dumps(rows))
    return root


def checkpoint(net, folder):
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def hub(data, tmp_path_factory):
    """A ViT with its classifier, a BERT with its language head and vocab.txt, a CLIP: small, but in the
    hub's files."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp('hub')
    checkpoint(ViTForImageClassification(ViTConfig(**WIDTHS, image_size=32, patch_size=16)), root/'vit')
    stats = {'image_mean': [.5]*3, 'image_std': [.5]*3, 'size': {'height': 32, 'width': 32}}
    (root/'vit'/'preprocessor_config.json').write_text(json.dumps(stats))
    letters = [chr(c) for c in range(97, 123)] + list('0123456789.,;:-!?\'"()/')
    words = re.findall(r'\w+', 'the man woman person wearing is with and in of shirt pants shoes bag black '
                       'white red blue gray')
    vocab = ['[PAD]', *(f'[unused{i}]' for i in range(5)), '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters,
             *(f'##{c}' for c in letters)] + words
    checkpoint(BertForMaskedLM(BertConfig(**WIDTHS, vocab_size=len(vocab))), root/'bert')
    (root/'bert'/'vocab.txt').write_text('\n'.join(vocab) + '\n')
    (root/'bert'/'tokenizer_config.json').write_text('{"do_lower_case": true, "model_max_length": 512}')
    text, vision = dict(WIDTHS, vocab_size=len(vocab), bos_token_id=7, eos_token_id=8), dict(
        WIDTHS, image_size=32, patch_size=16)
    checkpoint(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)), root/'clip')
    BertTokenizer(vocab={w: i for i, w in enumerate(vocab)}).save_pretrained(root/'clip')
    return root


def paper(dataset, data, hub, **kw):
    "The preset for real data, its checkpoints by folder, narrow where a checkpoint does not decide."
    small = dict(image_height=64, image_width=48, dim=32, bdam_heads=4, fusion_dim=32, ids_per_batch=6,
                 epochs=1, warmup=.5,
                 workers=0, amp='off')
    places = dict(data_root=str(data), vision=str(hub/'vit'), text=str(hub/'bert'))
    return make_config(dataset, **places | small | kw)


# --- the official layouts -----------------------------------------------------------------------------------

@pytest.mark.parametrize('layout', OFFICIAL)
def test_official_layouts_are_read_with_their_quirks(data, layout):
    ds = load_pedes(layout, data, val_fraction=.25)
    r = ds.records
    assert ds.name == layout and 'clo_text' not in r and len(r) == 54 and r['pid'].min() == (layout == 'cuhk')
    ids = r.groupby('split')['pid'].nunique()
    assert ids.to_dict() == {'train': 10, 'val': 4, 'test': 4}
    assert r.groupby('pid')['split'].nunique().max() == 1
    assert all(ds.image(i).mode == 'RGB' for i in range(8))
    counts = r['captions'].str.len().tolist()
    if layout == 'cuhk': assert counts[:5] == [1, 4, 10, 1, 2]
    if layout == 'icfg': assert set(counts) == {1} and any('held out' in n for n in ds.notes)
    if layout == 'rstp':
        assert r['captions'][0][0].startswith('A man. wearing 白色 top') and '\\' not in r['captions'][0][0]


# --- paper-shaped runs --------------------------------------------------------------------------------------

@pytest.mark.parametrize('dataset', OFFICIAL)
def test_the_paper_preset_trains_from_official_files_and_hub_folders(data, hub, tmp_path, capsys, dataset):
    c = paper(dataset, data, hub, val_fraction=.25)
    assert c.preset == 'paper' and c.variant == 'full' and c.optimizer == 'adam'
    folder = train(c, tmp_path)
    assert 'no descriptions: training on captions alone' in capsys.readouterr().out
    m, h = finished(folder), pd.read_csv(folder/'history.csv')
    assert folder == run_dir(c, tmp_path) and m['dataset'] == dataset
    assert m['gallery'] == 12 and m['gallery_ids'] == 4
    assert {k for k in h if k.startswith('loss_')} == {
        f'loss_{k}' for k in ('align', 'triplet', 'decouple', 'gate', 'fusion')}
    assert h.notna().all().all()
    # needs neither hub nor checkpoint
    model = from_pretrained(folder/'best.safetensors')
    assert model.vision.grid == (4, 3) and model.proj_clo is None
    assert load_tokenizer(folder/'tokenizer').get_vocab() == load_tokenizer(hub/'bert').get_vocab()
    start = prepare(c, folder, False).trainer.model.state_dict()
    end = model.state_dict()
    moved = {k.split('.')[0] for k in end if not torch.equal(start[k], end[k])}
    assert moved == {'vision', 'text', 'bdam', 'proj_t', 'fusion'}


def test_the_run_starts_from_the_weights_of_the_checkpoint(data, hub, tmp_path):
    model = prepare(paper('cuhk', data, hub), tmp_path, False).trainer.model
    vit = ViTForImageClassification.from_pretrained(hub/'vit').vit.state_dict()
    bert = BertForMaskedLM.from_pretrained(hub/'bert').bert.state_dict()
    state = model.state_dict()
    for name, ref in (('vision.net.', vit), ('text.net.', bert)):
        shared = [k for k in ref if name + k in state and 'position' not in k]
        assert len(shared) > 30 and all(torch.equal(state[name + k], ref[k]) for k in shared)


READINGS = [dict(fusion_input='tokens'), dict(grad_checkpoint=True, variant='fusion_transformer2')]

@pytest.mark.parametrize('kw', READINGS, ids=str)
def test_other_readings_at_the_papers_shape(data, hub, tmp_path, kw):
    m = finished(train(paper('rstp', data, hub, **kw), tmp_path, progress=False))
    assert all(0 <= x <= 100 for scores in m['test'].values() for x in scores.values())


def test_clip_comes_through_the_same_door(data, hub, tmp_path):
    c = paper('rstp', data, hub, vision=str(hub/'clip'), text=str(hub/'clip'))
    folder = train(c, tmp_path, progress=False)
    model = from_pretrained(folder/'best.safetensors')
    assert model.vision.clip and model.text.clip and model.vision.dim == model.text.dim == 24


def test_real_data_with_descriptions_beside_the_images(data, hub, tmp_path):
    rows = load_pedes('rstp', data).records
    rest = {'attributes': None, 'style': 0, 'model': 'm', 'prompt_hash': 'x', 'seed': 0, 'tries': 1,
            'tokens': 1, 'cost': 0.,
            'latency': 0., 'status': 'ok', 'reason': None}
    lines = [{'image': f, 'identity': f'a tall man number {i}', 'clothing': f'clothes number {i}'} | rest
             for i, f in enumerate(rows['file'])]
    file = data/'RSTPReid'/'described.jsonl'
    file.write_text('\n'.join(map(json.dumps, lines)) + '\n')
    folder = train(paper('rstp', data, hub, descriptions=file.name, id_text='both'), tmp_path, progress=False)
    assert 'loss_clothing' in pd.read_csv(folder/'history.csv')
    assert 'proj_clo.weight' in read_tensors(folder/'best.safetensors')[0]


@pytest.mark.parametrize('kw, words', [
    (lambda hub: dict(text=str(hub/'vit')), "vit"), (lambda hub: dict(vision=str(hub/'bert')), "'bert'"),
    (lambda hub: dict(max_length=512, text=str(hub/'clip')), 'positions'),
    (lambda hub: dict(image_height=72), 'not tiled'),
    (lambda hub: dict(dim=33), 'multiple of bdam_heads'),
    (lambda hub: dict(vision=str(hub/'gone')), 'no folder'),
])
def test_what_does_not_fit_is_one_line(data, hub, tmp_path, kw, words):
    with pytest.raises(UserError, match=words) as e:
        train(paper('rstp', data, hub, **kw(hub)), tmp_path, progress=False)
    assert '\n' not in str(e.value)


# --- the true shapes ----------------------------------------------------------------------------------------

@pytest.mark.skipif(not os.environ.get('BDAM_SLOW'),
                    reason='BDAM_SLOW=1 runs ViT-B/16 and BERT-base themselves: 6 GB, a minute')
def test_vit_base_and_bert_base_take_two_steps(data, hub, tmp_path):
    torch.manual_seed(0)
    checkpoint(ViTForImageClassification(ViTConfig()), tmp_path/'vit')
    checkpoint(BertForMaskedLM(BertConfig()), tmp_path/'bert')
    (tmp_path/'bert'/'vocab.txt').write_bytes((hub/'bert'/'vocab.txt').read_bytes())
    c = make_config('cuhk', data_root=str(data), vision=str(tmp_path/'vit'), text=str(tmp_path/'bert'),
                    ids_per_batch=2)
    assert (c.image_height, c.dim, c.fusion_dim, c.bdam_depth, c.lr) == (224, 768, 256, 6, 1e-4)
    trainer = prepare(c, tmp_path/'run', False).trainer
    assert trainer.model.vision.grid == (14, 14) and sum(
        p.numel() for p in trainer.model.parameters()) > 200e6
    watched = ('proj_t.', 'bdam.gate.', 'bdam.branches.proj_id.', 'fusion.out.')
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if n.startswith(watched)}
    for _, batch in zip(range(2), trainer.loader):
        assert len(batch) == 4 and all(x == x and abs(x) < 1e4 for x in trainer.train_step(batch).values())
    assert before and all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters()
                          if n in before)
