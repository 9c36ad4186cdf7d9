"""Captions dealt to other people: a model trained on them knows nothing, or something leaks."""
import pytest
import torch

from bdam_repro.batches import load_tokenizer
from bdam_repro.config import make_config
from bdam_repro.evaluate import evaluate
from bdam_repro.metrics import chance
from bdam_repro.pretrained import from_pretrained
from bdam_repro.run_data import load_data
from bdam_repro.runs import finished, train


def learn(home, shuffle: bool) -> tuple[dict, dict, dict]:
    "R-1 by score on unseen people, and on those of the training by true captions; chance on the latter."
    small = dict(folder='small', synth_train_ids=40, synth_val_ids=4, synth_test_ids=40, synth_images=2,
                 ids_per_batch=40, epochs=80, lr=3e-3, warmup=1, eval_every=80, balance='fixed',
                 text_pool='mean', bdam_depth=1, dropout=0.,
                 flip=0., pad=0, erase=0., c_clothing=0., c_triplet=0.)
    small |= dict(shuffle_captions=shuffle, tag=f'{shuffle}')
    c = make_config(preset='smoke', amp='off', data_root=str(home), **small)
    folder = train(c, home/'runs', progress=False)
    ds = load_data(c, False)
    e = evaluate(from_pretrained(folder/'best.safetensors'), ds, load_tokenizer(folder/'tokenizer'), 'train')
    pids = ds.records['pid'].to_numpy()
    r1 = lambda scores: {k: v['R1'] for k, v in scores.items()}
    known = {k: 100*r.R1.mean() for k, r in e['results'].items()}
    return r1(finished(folder)['test']), known, chance(pids[e['q_rows']], pids[e['g_rows']])


@pytest.mark.timeout(900)  # half a minute of work, on a busy machine more
def test_shuffled_captions_score_chance_and_true_ones_do_not(tmp_path):
    "Both scores. A few seconds suffice to learn forty people by heart, so the true captions ask for these."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (_, known, by_chance), (shuffled_test, shuffled_known, _) = learn(tmp_path, False), learn(tmp_path, True)
    torch.set_num_threads(threads)
    limit = 3*by_chance['R1']
    assert abs(by_chance['R1'] - 2.5) < .01 and set(known) == {'dual', 'fused'}
    assert all(x > limit for x in known.values()), known              # the same code, data and time can learn
    assert all(x <= limit for x in shuffled_known.values()), shuffled_known
    assert all(x <= limit for x in shuffled_test.values()), shuffled_test
