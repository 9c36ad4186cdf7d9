"Equal texts and texts that say nothing, through a whole training: what counts, what leaks, what stays."
import dataclasses

import pytest
import torch

from bdam_repro.config import PRESETS, config_hash, make_config
from bdam_repro.objective import batch_losses, forward
from bdam_repro.run_data import load_data, run_tokenizer, says_more_than_gender
from bdam_repro.runs import finished, train
from bdam_repro.trainer import run_batches

NEW = PRESETS['paper']
OLD = dict(equal_texts='negatives', nothing_said='caption')


def test_kept_runs_keep_their_names():
    for preset in ('tiny', 'smoke', 'tiny-literal', 'literal'):
        c = make_config('synth', preset)
        assert {k: getattr(c, k) for k in OLD} == OLD
        assert config_hash(c) != config_hash(make_config('synth', preset, **NEW))
    assert config_hash(make_config('synth', 'tiny')) == '88722f86ddca'          # as in tables/runs.csv
    assert {k: getattr(make_config('cuhk'), k) for k in NEW} == NEW


@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('data')


@pytest.fixture(scope='module')
def dull(home):
    "A dataset in which two thirds of the identity texts say the gender alone, and one is missing."
    ds = load_data(make_config(preset='smoke', data_root=str(home)), progress=False)
    records = ds.records.copy()
    told = [f'A tall {text}' if i % 3 == 0 else 'The man.' for i, text in enumerate(records['id_text'])]
    told[1] = None
    return dataclasses.replace(ds, records=records.assign(id_text=told))


def batch_of(home, ds, tmp_path, **options):
    c = make_config(preset='smoke', data_root=str(home), **options)
    tokenizer = run_tokenizer(c, ds, tmp_path/'tokenizer')
    return c, tokenizer, run_batches(c, ds, tokenizer)


def test_numbers_are_those_of_the_texts(home, dull, tmp_path):
    _, tokenizer, loader = batch_of(home, dull, tmp_path, **NEW)
    assert 'not in Eq. 3' in loader.note and 'stands in' not in loader.note
    seen = 0
    for batch in loader:
        texts = [dull.records['id_text'].iloc[row] for row in batch.rows.tolist()]
        for text, number in zip(texts, batch.id_number.tolist()):
            assert (number == -1) == (not isinstance(text, str) or not says_more_than_gender(text))
        for name in ('caption', 'other'):
            words = [tokenizer.decode(ids[mask]) for ids, mask in zip(getattr(batch, f'{name}_ids'),
                                                                      getattr(batch, f'{name}_mask'))]
            numbers = getattr(batch, f'{name}_number')
            for i, j in torch.combinations(torch.arange(len(batch))).tolist():
                assert (words[i] == words[j]) == bool(numbers[i] == numbers[j])
        seen += int((batch.id_number == -1).sum())
    assert seen > 10


def test_what_says_nothing_changes_no_gradient(home, dull, tmp_path):
    "Another picture, another text: where the text says nothing, its description's term does not know it."
    from bdam_repro.model import build_model
    c, tokenizer, loader = batch_of(home, dull, tmp_path, **NEW, id_text='generated', variant='baseline')
    torch.manual_seed(0)
    model, batch = build_model(c, len(tokenizer), True), next(iter(loader))
    silent = batch.id_number == -1
    assert silent.any() and not silent.all()

    def gradient(batch, c):
        model.zero_grad()
        batch_losses(forward(model, batch, c), batch, c)['align'].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    usual = gradient(batch, c)
    images, words = batch.images.clone(), batch.id_ids.clone()
    images[silent] = 255 - images[silent]
    words[silent] = words[silent].roll(1, 1)
    changed = dataclasses.replace(batch, images=images, id_ids=words)
    torch.testing.assert_close(gradient(changed, c), usual, rtol=1e-4, atol=1e-6)
    before = c.model_copy(update=OLD)
    assert not torch.allclose(gradient(changed, before), gradient(batch, before), rtol=1e-4, atol=1e-6)


def test_equal_texts_are_no_negatives(home, dull, tmp_path):
    _, _, loader = batch_of(home, dull, tmp_path, equal_texts='same', id_text='generated')
    batch = next(iter(loader))
    same = batch.id_number[:, None] == batch.id_number[None]
    people = batch.pids[:, None] == batch.pids[None]
    assert (same & ~people).any()
    assert (batch.id_number >= 0).all()                     # 'caption': a stand-in is a text like others


@pytest.mark.parametrize('more', [{}, dict(accumulate=2), dict(id_text='generated'), dict(positives='mask')])
def test_a_whole_run(home, dull, tmp_path, more):
    c = make_config(preset='smoke', data_root=str(home), epochs=1, **NEW, **more)
    metrics = finished(train(c, tmp_path, progress=False, dataset=dull))
    assert 0 <= metrics['test']['dual']['R1'] <= 100 and metrics['config_hash'] == config_hash(c)


def test_texts_that_never_say_anything_are_one_line(home, dull, tmp_path):
    mute = dataclasses.replace(dull, records=dull.records.assign(id_text='The man.'))
    with pytest.raises(ValueError, match=r'none of .* identity descriptions says more than the gender'):
        batch_of(home, mute, tmp_path, **NEW)
