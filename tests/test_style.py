"""Styles: what a caption loses and keeps, labels on degenerate data, memory, exemplars, files, rewriting."""
import json
import re
import subprocess
import sys
import time

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN, KMeans
from sklearn.datasets import make_blobs, make_moons
from sklearn.metrics import adjusted_rand_score

from bdam_repro import generalize as G
from bdam_repro.answers import Policy
from bdam_repro.config import VARIANTS, UserError
from bdam_repro.describe import SlidingWindow
from bdam_repro.generalize import (
    embed_styles,
    generalize,
    generalize_with,
    placeholder,
    plural_verb,
    synth_captions,
)
from bdam_repro.journal import read_journal
from bdam_repro.mllm import prompt_texts
from bdam_repro.pedes import load_pedes
from bdam_repro.style import (
    METHODS,
    cluster_styles,
    compare_methods,
    dbcv,
    eps_sweep,
    style_descriptions,
    style_prompts,
)
from bdam_repro.synth import make_synth

NAMES = {'PERSON', 'BODY', 'ITEM', 'COLOR', 'TRAIT'}

# ---- captions without content ------------------------------------------------------------------------------
who = st.sampled_from([
    'man', 'lady', 'boy', 'tall girl', 'young slim woman', 'gentleman', 'middle-aged male'])
colors = st.sampled_from(['red', 'dark blue', 'navy', 'light-gray', 'khaki', 'black'])
garments = st.sampled_from([
    'coat', 'striped t-shirt', 'denim jacket', 'hoodie', 'sweater', 'knee-length dress'])
frames = st.sampled_from([
    'There is {w} {who} who seems to be wearing a {c} {g}; one might say {he} hurries.',
    'the {who}, apparently, has got a {g} that is {c} on and then {he} walks away',
    'Look: a {who} - clad in a {c} {g} - whom {he} follows!'])


@given(frames, who, colors, garments, who, colors, garments)
@settings(max_examples=150, deadline=None)
def test_content_does_not_show(frame, w1, c1, g1, w2, c2, g2):
    first = generalize(frame.format(w='a', who=w1, c=c1, g=g1, he='he'))
    second = generalize(frame.format(w='a', who=w2, c=c2, g=g2, he='she'))
    assert first == second
    left = first.replace('-', ' ').split()
    for word in f'{w1} {c1} {g1}'.replace('-', ' ').split(): assert word not in left


@given(frames, who, colors, garments)
@settings(max_examples=50, deadline=None)
def test_manner_stays(frame, w, c, g):
    text = generalize(frame.format(w='a', who=w, c=c, g=g, he='he'))
    neutral = re.sub(r'{he} (\w+s)\b', lambda m: f'they {plural_verb(m[1])}', frame).replace('{he}', 'they')
    kept = [x for x in neutral.split() if '{' not in x]
    left = iter(text.split())
    assert all(any(x == y for y in left) for x in kept), text    # all other words, in order, with punctuation
    assert generalize(text) == text


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_is_taken_and_settles(text):
    once = generalize(text)
    assert generalize(once) == once


STAY = ('wears', 'wearing', 'dressed', 'one', 'notices', 'perhaps', 'which', 'while', 'pair', 'image')


@pytest.mark.parametrize('word', STAY)
def test_words_of_style_stay(word):
    assert placeholder(word) == word
    assert placeholder(word.capitalize()) == word.capitalize()


def test_case_and_article_of_what_is_replaced():
    said = 'He has an orange cap. On his head she sees it.'
    assert generalize(said) == 'They have a ITEM. On their BODY they see it.'


# ---- labels ------------------------------------------------------------------------------------------------
def on_sphere(n, k=5, d=6, seed=0):
    x, y = make_blobs(n, d, centers=k, cluster_std=.4, random_state=seed)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), y


DEGENERATE = {
    'one': np.ones((1, 4)),
    'two': np.eye(2),
    'fewer than min_samples': on_sphere(7)[0],
    'all identical': np.ones((40, 3)),
    'two points, often': np.repeat(np.eye(2), 30, axis=0),
    'all noise': np.eye(30),
    'one dimension': np.arange(20.)[:, None],
    'far scales': np.r_[np.zeros((20, 2)), np.full((1, 2), 1e6)],
    'zeros': np.zeros((5, 2)),
}


@pytest.mark.filterwarnings('ignore:The symmetric non-negative')        # scipy, of the identity matrix
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('case', DEGENERATE)
def test_labels_of_degenerate_data(method, case):
    x = DEGENERATE[case]
    labels, d = cluster_styles(x, method)
    assert labels.shape == (len(x),) and labels.dtype.kind == 'i'
    assert set(labels) == set(range(d.k)) and d.noise_after == 0 and 0 <= d.noise_before <= 1
    assert (np.diff(np.bincount(labels)) <= 0).all()                     # the largest first
    if case in ('one', 'all identical', 'zeros'): assert d.k == 1
    again, _ = cluster_styles(x, method)
    assert (labels == again).all()


@pytest.mark.parametrize('method', METHODS)
def test_order_and_duplicates(method):
    x, _ = on_sphere(160)
    x = np.r_[x, x[:40]]
    order = np.random.default_rng(1).permutation(len(x))
    labels, d = cluster_styles(x, method)
    moved, e = cluster_styles(x[order], method)
    assert (moved == labels[order]).all() and d.k == e.k
    assert (labels[:40] == labels[160:]).all()                           # equal captions, equal style


def test_dbscan_is_dbscan():
    x, _ = on_sphere(300, seed=3)
    x = np.r_[x, x[:100], x[:50]].round(6)
    theirs = DBSCAN(eps=.06, min_samples=9).fit_predict(x.astype(float))
    ours, d = cluster_styles(x, eps=.06, min_samples=9, reassign=False, min_size=0)
    assert adjusted_rand_score(theirs, ours) == 1 and ((ours < 0) == (theirs < 0)).all()
    assert d.noise_before == d.noise_after == (theirs < 0).mean() > 0


def test_min_size_and_reassignment():
    x, _ = on_sphere(400, k=4)
    x = np.r_[x, x[:6] + .9]
    labels, d = cluster_styles(x, eps=.15, min_samples=4, min_size=.05)
    assert np.bincount(labels).min() >= .05 * len(x) and d.noise_after == 0
    loose, e = cluster_styles(x, eps=.15, min_samples=4, min_size=0, reassign=False)
    assert e.k >= d.k and (loose[loose < 0].size > 0) == (e.noise_after > 0)


def test_centroid_methods_find_k_or_take_it():
    x, y = on_sphere(300, k=5, d=8, seed=1)
    for method in ('kmeans', 'gmm', 'agglomerative'):
        assert cluster_styles(x, method, truth=y)[1].ari > .95
        assert cluster_styles(x, method, k=3)[1].k == 3
        assert cluster_styles(x, method, k='dbscan')[1].k == cluster_styles(x)[1].k


def test_annotators_are_recovered():
    captions, truth = synth_captions(1200, seed=11)
    x = embed_styles([generalize(c) for c in captions])
    table = compare_methods(x, truth, ('dbscan', 'hdbscan', 'kmeans', 'random', 'none'))
    table = table.set_index(['method', 'k_from'])
    assert table.ari['dbscan', 'itself'] >= .8 and table.ari.max() >= .85
    assert abs(table.ari['random', 'dbscan']) < .05
    assert table.ari['none', 'itself'] == 0 and table.k['none', 'itself'] == 1
    assert table.k['kmeans', 'dbscan'] == table.k['dbscan', 'itself']


def test_sweep_is_sensitive():
    x, y = on_sphere(300, k=5, d=8, seed=1)
    s = eps_sweep(x, y, factors=(.2, 1, 20), reassign=False, min_size=0)
    assert s.noise_before.is_monotonic_decreasing and s.k.iloc[-1] == 1 and s.ari.iloc[1] > s.ari.iloc[2]


def test_dbcv_prefers_shape():
    x, y = make_moons(300, noise=.04, random_state=0)
    right, wrong = dbcv(x, y), dbcv(x, KMeans(2, n_init=3, random_state=0).fit_predict(x))
    assert right > .3 > 0 > wrong
    some = np.where(np.arange(300) < 60, -1, y)                      # noise counts as points without merit
    assert dbcv(x, some) == pytest.approx(dbcv(x[60:], y[60:]) * 240 / 300)
    assert np.isnan(dbcv(x, np.zeros(300, int)))
    assert dbcv(x * 1e-3, y) == pytest.approx(right)


GUARD = '''
import resource, sys
import numpy as np
from bdam_repro.style import cluster_styles
rng = np.random.default_rng(0)
center = rng.normal(size=(10, 8))
x = center[rng.integers(10, size=20_000)] + rng.normal(size=(20_000, 8)) * .05
cluster_styles(x[:300], sys.argv[1])                                     # whatever loads late is loaded
size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 1_100_000_000,) * 2)   # 20,000² floats: 1.6 or 3.2 GB
print(cluster_styles(x, sys.argv[1], **eval(sys.argv[2]))[1])
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('method, options', [
    ('dbscan', {}), ('dbscan', {'eps': 50.}), ('hdbscan', {}), ('agglomerative', {'k': 10})])
def test_memory_grows_with_the_captions_alone(method, options):
    command = [sys.executable, '-c', GUARD, method, repr(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert 'k=1,' in done.stdout if options.get('eps') else 'k=10,' in done.stdout


# ---- exemplars, description files --------------------------------------------------------------------------
def test_exemplars_belong_to_their_cluster():
    captions = [f'caption {i // 2}' for i in range(40)]                  # each twice
    labels = np.r_[np.zeros(20, int), np.ones(18, int), [-1, -1]]
    prompts = style_prompts(labels, captions, n=4, seed=3)
    assert list(prompts) == [0, 1] and prompts == style_prompts(labels, captions, n=4, seed=3)
    assert prompts != style_prompts(labels, captions, n=4, seed=4)
    for c, texts in prompts.items():
        assert len(set(texts)) == 4 and all(labels[captions.index(t)] == c for t in texts)
    assert style_prompts([0], ['only one'], n=3) == {0: ['only one']}
    assert 'caption' in prompt_texts(Policy(), prompts[0])[1]


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    make_synth(root, n_ids=50, images_per_id=2, size=(32, 16), workers=1, progress=False)
    return load_pedes('synth', root)


def test_seven_files_of_the_same_images(dataset):
    plain = read_journal(dataset.root/'descriptions.jsonl')
    told = lambda m: {'k': 4} if m in ('random', 'kmeans', 'gmm', 'agglomerative') else {}
    files = {m: style_descriptions(dataset, m, **told(m)) for m in reversed(METHODS)}
    for m, path in files.items():
        f = read_journal(path)
        assert path.name == VARIANTS.get(f'style_{m}', {}).get('descriptions', 'descriptions.jsonl')
        assert path.parent == dataset.root
        assert f.image.tolist() == plain.image.tolist() and f.attributes.tolist() == plain.attributes.tolist()
        assert f.prompt_hash.str.endswith(m).all() and (f.status == 'ok').all()
        if m == 'none': assert f['style'].isna().all() and f.identity.tolist() == plain.identity.tolist()
        else: assert f['style'].between(0, 12).all() and f.clothing.tolist() != plain.clothing.tolist()
    assert read_journal(files['random'])['style'].nunique() == 4
    before = files['kmeans'].read_bytes()
    assert style_descriptions(dataset, 'kmeans', k=4).read_bytes() == before
    assert style_descriptions(dataset, 'kmeans', k=4, seed=1).read_bytes() != before


def test_styles_come_from_training_captions(dataset, tmp_path):
    import dataclasses
    records = dataset.records.copy()
    held_out = records.split != 'train'
    other_words = records[held_out].captions.map(lambda c: ['Something else entirely.'] * len(c))
    records.loc[held_out, 'captions'] = other_words
    other = dataclasses.replace(dataset, records=records)
    a, b = (style_descriptions(x, 'dbscan', tmp_path/f'{i}.jsonl') for i, x in enumerate((dataset, other)))
    assert a.read_bytes() == b.read_bytes()


# ---- the MLLM rewrites -------------------------------------------------------------------------------------
def served(answer):
    "A client whose server is the function `answer(caption, n-th time asked)`."
    asked = []
    def handle(request):
        caption = json.loads(request.content)['messages'][1]['content']
        asked.append(caption)
        said = answer(caption, asked.count(caption))
        if isinstance(said, int):
            error = {'error': {'message': 'key sk-planted-secret-123 is wrong'}}
            return httpx.Response(said, json=error, headers={'Retry-After': '0.4'})
        choice = dict(index=0, finish_reason='stop', message=dict(role='assistant', content=said))
        chat = dict(id='1', object='chat.completion', created=0, model='m', choices=[choice])
        return httpx.Response(200, json=chat)
    http = httpx.AsyncClient(transport=httpx.MockTransport(handle))
    client = openai.AsyncOpenAI(api_key='sk-planted-secret-123', base_url='http://server.invalid/v1',
                                max_retries=0, http_client=http)
    return client, asked


def test_rewriting_resumes_and_never_asks_twice(tmp_path):
    captions = [f'A man in {c}.' for c in ('red', 'blue', 'red', 'green', 'gray')]
    client, asked = served(lambda c, n: f'Said of {c[-5:]}')
    rewrite = lambda some: generalize_with(client, some, model='m', cache=tmp_path/'c.jsonl', progress=False)
    assert rewrite(captions[:3]) == [f'Said of {c[-5:]}' for c in captions[:3]] and len(asked) == 2
    with open(tmp_path/'c.jsonl', 'a') as f: f.write('{"key": "abc", "te')   # the plug is pulled here
    assert len(rewrite(captions)) == 5 and len(asked) == 4
    assert rewrite(captions)[4] == 'Said of gray.' and len(asked) == 4


def test_rewriting_checks_its_answers_and_tries_again(tmp_path, monkeypatch):
    monkeypatch.setattr(G, 'wait_random_exponential', lambda **_: lambda state: 0)
    answers = {'a man': '', 'a boy': 'two\nlines', 'a lady': 'x' * 500, 'a girl': 'a PERSON!'}
    client, asked = served(lambda c, n: 429 if n == 1 else 502 if n == 2 else answers[c])
    texts = generalize_with(client, list(answers), model='m', cache=tmp_path/'c.jsonl', progress=False)
    assert texts == ['a PERSON'] * 3 + ['a PERSON!']
    by = [json.loads(line)['by'] for line in (tmp_path/'c.jsonl').read_text().splitlines()]
    assert sorted(by) == ['lexicon'] * 2 + ['m'] and len(asked) == 12   # an empty answer is not kept


def test_rewriting_keeps_to_the_limit_and_to_retry_after(tmp_path, monkeypatch):
    monkeypatch.setattr(G, 'wait_random_exponential', lambda **_: lambda state: 0)
    times = []

    def answer(caption, n):
        times.append((caption, time.monotonic()))
        return 429 if caption == 'a man 0' and n == 1 else 'a PERSON'

    client, _ = served(answer)
    monkeypatch.setattr(G, 'SlidingWindow', lambda rpm: SlidingWindow(rpm, window=.5))
    men = [f'a man {i}' for i in range(25)]
    generalize_with(client, men, model='m', cache=tmp_path/'c.jsonl', rpm=10, progress=False)
    first, second = (t for c, t in times if c == 'a man 0')
    assert second - first >= .4
    assert len(times) == 26 and max(sum(t <= u < t + .5 for _, u in times) for _, t in times) <= 10


def test_a_server_that_refuses_ends_the_work_in_one_line(tmp_path):
    client, _ = served(lambda c, n: 'fine' if 'red' in c else 401)
    cache = tmp_path/'c.jsonl'
    with pytest.raises(UserError) as e:
        generalize_with(client, ['in red', 'in blue'], model='m', cache=cache, concurrency=1, progress=False)
    assert '1 answers are kept' in str(e.value) and 'planted' not in str(e.value) and '\n' not in str(e.value)


# ---- CLIP --------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def clip_folder(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp('clip')
    words = ['[pad]', '[unk]', '[bos]', '[eos]']
    words += ['a', 'man', 'in', 'red', 'coat', 'and', 'blue', 'jeans', 'wears', 'the']
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='[unk]'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [('[bos]', 2), ('[eos]', 3)]
    t.post_processor = processors.TemplateProcessing(single='[bos] $A [eos]', special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=t, pad_token='[pad]', unk_token='[unk]').save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                 projection_dim=24)
    config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=12, bos_token_id=2, eos_token_id=3,
                            pad_token_id=0, **sizes)
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


def test_clip_from_a_folder(clip_folder):
    too_long = 'jeans in red and red and red and red and red and red'
    captions = ['a man in red', 'the man wears a coat and blue jeans', 'blue coat', too_long] * 3
    x = embed_styles(captions, 'clip', model=str(clip_folder), dim=3)
    assert x.shape == (12, 3) and np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    assert (x[:4] == x[4:8]).all()
    assert cluster_styles(x, 'kmeans', k=4)[1].k == 4


# ---- mistakes of the user ----------------------------------------------------------------------------------
X = on_sphere(30)[0]
MISTAKES = {
    'unknown method': (lambda d: cluster_styles(X, 'optics'), 'optics'),
    'no rows': (lambda d: cluster_styles(np.zeros((0, 3))), 'at least one row'),
    'one vector': (lambda d: cluster_styles(np.zeros(3)), 'shape'),
    'not finite': (lambda d: cluster_styles(np.r_[X, X[:1] * np.nan]), 'row 30'),
    'k of zero': (lambda d: cluster_styles(X, 'kmeans', k=0), 'k is'),
    'k beyond N': (lambda d: cluster_styles(X, 'gmm', k=31), '1 to 30'),
    'k by a word': (lambda d: cluster_styles(X, 'kmeans', k='elbow'), 'elbow'),
    'k for dbscan': (lambda d: cluster_styles(X, k=3), 'leave k out'),
    'random by silhouette': (lambda d: cluster_styles(X, 'random', k='silhouette'), 'means nothing'),
    'eps': (lambda d: cluster_styles(X, eps=0), 'eps'),
    'min_samples': (lambda d: cluster_styles(X, min_samples=2.5), '2.5'),
    'min_size': (lambda d: cluster_styles(X, min_size=3), 'share'),
    'truth of another length': (lambda d: cluster_styles(X, truth=[1, 2]), '2 true styles'),
    'embedding': (lambda d: embed_styles(['a'], 'bert'), 'bert'),
    'no captions': (lambda d: embed_styles([]), 'at least one'),
    'a string': (lambda d: embed_styles('a man'), 'list of texts'),
    'an empty caption': (lambda d: embed_styles(['a', ' ']), 'captions[1]'),
    'no CLIP': (lambda d: embed_styles(['a', 'b', 'c'], 'clip', model='/no/such/folder'), "method='tfidf'"),
    'labels of others': (lambda d: style_prompts([0, 1], ['a']), '2 labels'),
    'n of zero': (lambda d: style_prompts([0], ['a'], n=0), 'exemplars'),
    'style of a typo': (lambda d: style_descriptions(d, 'dbscam'), 'dbscam'),
    'error rate': (lambda d: style_descriptions(d, error_rate=2), 'probability'),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_mistakes_are_one_clear_line(case, dataset):
    act, word = MISTAKES[case]
    with pytest.raises(UserError) as e: act(dataset)
    assert word in str(e.value) and '\n' not in str(e.value)


def test_real_data_need_a_model(dataset, tmp_path):
    import dataclasses
    elsewhere = dataclasses.replace(dataset, root=tmp_path)
    with pytest.raises(UserError, match='no SynthPEDES'): style_descriptions(elsewhere)
    assert not list(tmp_path.iterdir())
