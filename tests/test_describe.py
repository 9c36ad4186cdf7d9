"""`describe` against a real server with faults, kills, limits and planted secrets.

`DESCRIBE_FULL=1` runs the sizes of the bars: 10,000 images with faults, 8,000 for memory.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from hashlib import sha1
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import openai
import pandas as pd
import pytest
from mllm_server import CONTENT, TRANSPORT, description
from PIL import Image

from bdam_repro.answers import Policy
from bdam_repro.batchmode import describe_batch, describe_batch_async
from bdam_repro.config import UserError
from bdam_repro.describe import OnlineSettings, SlidingWindow, describe, describe_async, estimate_cost
from bdam_repro.describers import DescribeParameters, describe_dataset
from bdam_repro.journal import FIELDS, Journal, read_journal
from bdam_repro.mllm import draw_style, image_url
from bdam_repro.offline import describe_split
from bdam_repro.servers import make_client

FULL = bool(os.environ.get('DESCRIBE_FULL'))
KEY = 'planted-key-4711-do-not-print'
HERE = Path(__file__).parent
SPAWN = multiprocessing.get_context('forkserver')
SPAWN.set_forkserver_preload(['bdam_repro.describe'])


class Running:
    def __init__(self, port, log):
        self.url, self.log_path = f'http://127.0.0.1:{port}/v1', log

    def client(self, key=KEY):
        with patch.dict(os.environ, OPENAI_API_KEY=key, OPENAI_BASE_URL=self.url):
            return make_client()

    def log(self):
        with urllib.request.urlopen(f'{self.url}/log', timeout=60):  # its line comes after the last byte
            return self.lines()

    def lines(self):
        "What it has logged so far, requests under way or not."
        return [json.loads(line) for line in self.log_path.read_text().split('\n')[:-1]]

    def wait_for(self, n, child):
        "Until the log has `n` lines. A child that ends before that is a mistake of the test."
        while len(self.lines()) < n:
            assert child.is_alive(), 'finished before it was killed: the test has too few images'
            time.sleep(0.005)


@contextlib.contextmanager
def serving(folder, **settings):
    "The server in a process of its own."
    folder.mkdir(exist_ok=True)
    (folder / 'settings.json').write_text(json.dumps(settings))
    process = subprocess.Popen(
        [sys.executable, HERE / 'mllm_server.py', folder / 'settings.json', folder / 'log.jsonl'],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Running(int(process.stdout.readline()), folder / 'log.jsonl')
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def pictures(folder, n, size=2):
    "`n` small pictures, each with bytes of its own, as records."
    folder.mkdir(exist_ok=True)
    for i in range(n):
        Image.frombytes('RGB', (size, size), random.Random(i).randbytes(3 * size * size)).save(
            folder / f'{i:05}.png', compress_level=1
        )
    return pd.DataFrame({'file': [f'{i:05}.png' for i in range(n)]})


def digests(folder, records):
    return {f: sha1(image_url(folder / f).encode()).hexdigest() for f in records['file']}


QUICK = dict(model='m', backoff=0.01, progress=False, timeout=20.0)


def check_ledger(log, table, of):
    "What was served against what is written: nothing lost, paid twice, thrown away, or false."
    good = Counter(e['image'] for e in log if e['kind'] == 'good')
    assert table.image.is_unique
    assert max(good.values(), default=0) <= 1, 'a described image was asked again'
    written = set(table[table.status == 'ok'].image)
    assert {of[f] for f in written} == set(good), 'a good answer was thrown away, or a line has no answer'
    for row in table.itertuples():
        assert (row.identity, row.clothing) == (
            (lambda d: (d['identity'], d['clothing']))(description(of[row.image]))
            if row.status == 'ok'
            else (row.identity, row.clothing)
        )
        if row.status == 'failed':
            assert isinstance(row.reason, str) and ':' in row.reason


# ---- faults ---------------------------------------------------------------------------------------


def test_one_in_five_answers_is_bad(tmp_path):
    n = 10_000 if FULL else 1200
    records = pictures(tmp_path / 'imgs', n)
    of = digests(tmp_path / 'imgs', records)
    with serving(tmp_path / 'server', faults=0.2, hang=60) as server:
        report = describe(
            records,
            server.client(),
            tmp_path / 'd.jsonl',
            images_dir=tmp_path / 'imgs',
            **QUICK | {'timeout': 8.0},
            grace=30,
        )
        log = server.log()
    table = read_journal(tmp_path / 'd.jsonl')
    assert set(table.image) == set(records['file']) and (report.ok + report.failed) == n
    check_ledger(log, table, of)
    seen = Counter(e['kind'] for e in log)
    assert all(seen[k] for k in TRANSPORT + CONTENT), seen
    assert sum(report.rejected.values()) == sum(seen[k] for k in CONTENT)  # every bad answer is explained
    assert report.causes == Counter(r.split(':')[0] for r in table[table.status == 'failed'].reason)
    assert report.requests == len(log)
    print(
        f'\n{n} images, {len(log)} requests, {report.ok} ok, {report.failed} failed,'
        f' {report.seconds:.1f} s; {dict(seen)}'
    )


@pytest.mark.parametrize(
    'kind,cause',
    [
        ('cut-json', 'json'),
        ('invalid-json', 'json'),
        ('schema', 'schema'),
        ('refusal', 'refusal'),
        ('refusal-field', 'refusal'),
        ('impure', 'purity'),
        ('duplicate', 'duplicate key'),
        ('truncated', 'truncated'),
        ('empty', 'json'),
    ],
)
def test_an_answer_that_stays_bad_is_recorded_with_its_cause(tmp_path, kind, cause):
    records = pictures(tmp_path / 'imgs', 3)
    with serving(tmp_path / 'server', always=kind) as server:
        report = describe(
            records, server.client(), tmp_path / 'd.jsonl', images_dir=tmp_path / 'imgs', retries=2, **QUICK
        )
        assert Counter(e['image'] for e in server.log()) == dict.fromkeys(
            digests(tmp_path / 'imgs', records).values(), 3
        )
    table = read_journal(tmp_path / 'd.jsonl')
    assert dict(report.causes) == {cause: 3} and report.ok == 0
    assert (
        table.identity.isna().all() and table.reason.str.startswith(cause).all() and (table.tries == 3).all()
    )


def test_a_rejected_answer_is_asked_again_with_the_reason(tmp_path):
    records, conversations = pictures(tmp_path / 'imgs', 1), []
    with serving(tmp_path / 'server', always='impure') as server:
        client = server.client()
        post = client.post

        async def listen(*args, **kw):
            conversations.append(kw['body']['messages'])
            return await post(*args, **kw)

        client.post = listen
        describe(records, client, tmp_path / 'd.jsonl', images_dir=tmp_path / 'imgs', retries=1, **QUICK)
    assert len(conversations) == 2 and conversations[1][:2] == conversations[0]
    assert (
        conversations[1][2]['role'] == 'assistant'
        and 'purity: identity text says "coat"' in conversations[1][3]['content']
    )


def test_retry_after_is_kept(tmp_path):
    records, sent, told = pictures(tmp_path / 'imgs', 40), [], []
    with serving(tmp_path / 'server', faults=0.3, kinds=['429-after'], retry_after='0.5') as server:
        client = server.client()
        post = client.post

        async def clocked(*args, **kw):
            sent.append(time.monotonic())
            try:
                return await post(*args, **kw)
            except openai.RateLimitError:
                told.append(time.monotonic())
                raise

        client.post = clocked
        report = describe(
            records, client, tmp_path / 'd.jsonl', images_dir=tmp_path / 'imgs', concurrency=4, **QUICK
        )
    assert report.ok == 40 and len(told) > 3
    # of four that work at once, the other three may have passed the gate before the server said so
    for t in told: assert sum(t < x < t + 0.5 for x in sent) <= 3, 'Retry-After was not kept'
    kept = [min(x - t for x in sent if x > t + .4) for t in told if any(x > t + .4 for x in sent)]
    assert kept and min(kept) >= 0.5                      # and nobody comes back early


def test_failed_images_are_tried_again_only_when_asked(tmp_path):
    records = pictures(tmp_path / 'imgs', 6)
    common = dict(images_dir=tmp_path / 'imgs', retries=0, **QUICK)
    with serving(tmp_path / 'bad', always='refusal') as server:
        assert describe(records, server.client(), tmp_path / 'd.jsonl', limit=3, **common).failed == 3
    with serving(tmp_path / 'good') as server:
        assert describe(records, server.client(), tmp_path / 'd.jsonl', **common).skipped == 3
        report = describe(records, server.client(), tmp_path / 'd.jsonl', retry_failed=True, **common)
        assert (report.ok, report.skipped) == (3, 3)
    table = read_journal(tmp_path / 'd.jsonl')
    assert table.image.is_unique and (table.status == 'ok').all() and len(table) == 6


@pytest.mark.parametrize('formats', [('json_object', 'text'), ('text',)])
def test_a_server_without_structured_output_is_found_out_once(tmp_path, formats):
    records = pictures(tmp_path / 'imgs', 30)
    with serving(tmp_path / 'server', formats=formats) as server:
        report = describe(
            records, server.client(), tmp_path / 'd.jsonl', images_dir=tmp_path / 'imgs', **QUICK
        )
        refused = [e for e in server.log() if e['kind'] == 'status-400']
    assert report.ok == 30 and len(refused) == 3 - len(formats) == len(report.notes)


def test_any_client_of_openai_will_do(tmp_path):
    records = pictures(tmp_path / 'imgs', 60)
    with serving(
        tmp_path / 'server', faults=0.3, kinds=['429', 'cut', 'not-http', 'bad-envelope', 'impure']
    ) as server:
        client = openai.AsyncOpenAI(
            api_key=KEY, base_url=server.url, max_retries=0
        )  # with httpx's connections
        assert describe(records, client, tmp_path / 'd.jsonl', images_dir=tmp_path / 'imgs', **QUICK).ok == 60
        check_ledger(server.log(), read_journal(tmp_path / 'd.jsonl'), digests(tmp_path / 'imgs', records))


@pytest.mark.parametrize('usual', [True, False], ids=['aiohttp', 'httpx'])
@pytest.mark.parametrize(
    'kind,says', [('hang', 'no answer in time'), ('not-http', 'no connection to the server')]
)
def test_silence_is_told_from_absence(tmp_path, usual, kind, says):
    records = pictures(tmp_path / 'imgs', 5)
    with serving(tmp_path / 'server', always=kind) as server:
        client = (
            server.client() if usual else openai.AsyncOpenAI(api_key=KEY, base_url=server.url, max_retries=0)
        )
        with pytest.raises(UserError, match=says):
            describe(
                records,
                client,
                tmp_path / 'd.jsonl',
                images_dir=tmp_path / 'imgs',
                **QUICK | {'timeout': 0.5 if kind == 'hang' else 20.0},
            )


def test_a_server_that_counts_no_tokens(tmp_path):
    records = pictures(tmp_path / 'imgs', 5)
    with serving(tmp_path / 'server', usage=False) as server:
        report = describe(
            records,
            server.client(),
            tmp_path / 'd.jsonl',
            images_dir=tmp_path / 'imgs',
            prices=(1, 1),
            **QUICK,
        )
    assert report.ok == 5 and report.prompt_tokens > 0 and report.cost > 0


def test_lines_say_how_they_came_about(tmp_path):
    records = pictures(tmp_path / 'imgs', 12)
    styles = {3: ['One sees a man.'], 7: ['woman, long hair', 'man, short hair']}
    with serving(tmp_path / 'server') as server:
        describe(
            records,
            server.client(),
            tmp_path / 'd.jsonl',
            images_dir=tmp_path / 'imgs',
            styles=styles,
            prices=(2.0, 10.0),
            seed=5,
            **QUICK,
        )
    rows = [json.loads(line) for line in (tmp_path / 'd.jsonl').read_text().splitlines()]
    assert all(tuple(r) == FIELDS for r in rows)
    assert {r['image']: r['style'] for r in rows} == {f: draw_style(f, 2, 5) for f in records['file']} and {
        r['style'] for r in rows
    } == {0, 1}
    assert len({(r['style'], r['prompt_hash']) for r in rows}) == 2 == len({r['prompt_hash'] for r in rows})
    for r in rows:
        assert r['cost'] == pytest.approx((600 * 2 + 100 * 10) / 1e6) and r['tokens'] == {
            'prompt': 600,
            'completion': 100,
        }
        assert r['attributes']['identity']['hair'] and r['seed'] == 5 and r['tries'] == 1 and r['latency'] > 0


# ---- kills and stops ------------------------------------------------------------------------------


def _describe_in_child(url, folder, out, n, settings):
    records = pd.DataFrame({'file': [f'{i:05}.png' for i in range(n)]})

    async def run():
        async with openai.AsyncOpenAI(api_key=KEY, base_url=url, max_retries=0) as client:
            await describe_async(records, client, out, images_dir=folder, **QUICK | settings)

    asyncio.run(run())


@pytest.mark.timeout(1800)  # 21 starts of Python, and a busy machine takes a quarter of a minute for each
def test_kill_at_twenty_moments_then_resume(tmp_path):
    n, rng = 500, random.Random(0)
    records = pictures(tmp_path / 'imgs', n)
    of = digests(tmp_path / 'imgs', records)
    # a life ends after at most 15 requests, and six are under way: 20 lives together do not ask for all 500
    faults = dict(
        faults=0.2, kinds=['429', '500', '502', 'cut', 'bad-envelope', 'slow'], latency=0.05, slow=0.2
    )
    settings, out, snapshots = (
        dict(concurrency=6, styles=[['a man'], ['a woman walks']]),
        tmp_path / 'killed.jsonl',
        [],
    )
    with serving(tmp_path / 'server', **faults) as server:
        for k in range(20):
            child = SPAWN.Process(
                target=_describe_in_child, args=(server.url, tmp_path / 'imgs', out, n, settings)
            )
            child.start()
            server.wait_for(len(server.lines()) + rng.randint(1, 15), child)
            time.sleep(rng.uniform(0, 0.05))  # anywhere between two requests
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            assert child.exitcode == -signal.SIGKILL
            snapshots.append((time.time(), set(read_journal(out).image)))
            if k % 3 == 0 and out.exists():
                with open(out, 'a') as f:
                    f.write('{"image": "00499.png", "identity": "Cut in ha')
        killed_before = len(snapshots[-1][1])
        report = describe(records, server.client(), out, images_dir=tmp_path / 'imgs', **QUICK | settings)
        log = server.log()
    with serving(tmp_path / 'calm', **faults) as server:
        describe(
            records,
            server.client(),
            tmp_path / 'calm.jsonl',
            images_dir=tmp_path / 'imgs',
            **QUICK | settings,
        )
    assert 0 < killed_before < n and report.skipped == killed_before

    def content(path):
        return {
            tuple(sorted((k, str(v)) for k, v in json.loads(x).items() if k not in ('latency', 'tries')))
            for x in path.read_text().splitlines()
        }

    assert content(out) == content(tmp_path / 'calm.jsonl') and len(out.read_text().splitlines()) == n
    asked = defaultdict(list)
    for e in log:
        asked[e['image']].append(e['t'])
    for when, there in snapshots:
        for f in there:
            assert max(asked[of[f]]) <= when, f'{f} was asked again though its line was there'


def test_interrupt_keeps_what_was_served(tmp_path):
    records = pictures(
        tmp_path / 'imgs', 900
    )  # 27 s of work: a busy machine does not end it before the signal
    code = (
        'import signal, sys, openai, pandas as pd; from bdam_repro.describe import describe\n'
        'url, imgs, out = sys.argv[1:]\n'
        'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # a shell's background jobs ignore it
        "describe(pd.DataFrame({'file': [f'{i:05}.png' for i in range(900)]}), "
        "openai.AsyncOpenAI(api_key='k', base_url=url, max_retries=0), out, images_dir=imgs,"
        " model='m', concurrency=10, progress=False)"
    )
    with serving(tmp_path / 'server', latency=0.3) as server:
        child = subprocess.Popen(
            [sys.executable, '-c', code, server.url, tmp_path / 'imgs', tmp_path / 'd.jsonl'],
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (tmp_path / 'd.jsonl').exists() or (tmp_path / 'd.jsonl').read_bytes().count(b'\n') < 25:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        assert 'KeyboardInterrupt' in child.communicate(timeout=300)[1] and child.returncode != 0
        log = server.log()
    table = read_journal(tmp_path / 'd.jsonl')
    assert 25 < len(table) < 900  # those under way were waited for
    check_ledger(log, table, digests(tmp_path / 'imgs', records))


def test_a_server_that_dies_ends_the_run_and_keeps_the_work(tmp_path):
    records = pictures(tmp_path / 'imgs', 100)
    settings = dict(images_dir=tmp_path / 'imgs', concurrency=4, **QUICK)
    with serving(tmp_path / 'server', die_after=40) as server:
        with pytest.raises(
            UserError, match=r'stopped after 4\d images: 16 failures in a row .* run again to go on'
        ):
            describe(records, server.client(), tmp_path / 'd.jsonl', **settings)
        log = server.log()
    table = read_journal(tmp_path / 'd.jsonl')
    assert (table.status == 'ok').all()
    check_ledger(log, table, digests(tmp_path / 'imgs', records))
    with serving(tmp_path / 'again') as server:
        assert describe(records, server.client(), tmp_path / 'd.jsonl', **settings).ok == 100 - len(table)


@pytest.mark.parametrize(
    'status,message,says',
    [
        (401, f'Incorrect API key provided: {KEY}', 'refuses the key'),
        (403, 'no', 'refuses the key'),
        (404, 'no such model', 'knows no such model'),
        (429, 'insufficient_quota: buy more', 'quota is exhausted'),
    ],
)
def test_hopeless_answers_end_the_run_at_once(tmp_path, status, message, says):
    records = pictures(tmp_path / 'imgs', 50)
    with serving(tmp_path / 'server', status=status, message=message) as server:
        with pytest.raises(UserError, match=says) as e:
            describe(records, server.client(), tmp_path / 'd.jsonl', images_dir=tmp_path / 'imgs', **QUICK)
        assert len(server.log()) == 1
    assert (
        KEY not in str(e.value) and '\n' not in str(e.value) and len(read_journal(tmp_path / 'd.jsonl')) == 0
    )


def test_the_budget_is_never_exceeded_and_nothing_paid_is_lost(tmp_path):
    records = pictures(tmp_path / 'imgs', 200)
    settings = dict(
        images_dir=tmp_path / 'imgs', prices=(1.0, 4.0), max_tokens=100, **QUICK
    )  # an answer costs 0.001
    with serving(tmp_path / 'server', latency=0.02) as server:
        report = describe(records, server.client(), tmp_path / 'd.jsonl', budget=0.05, **settings)
        table = read_journal(tmp_path / 'd.jsonl')
        assert (
            'budget' in report.stopped
            and 0.03 <= table.cost.sum() <= 0.05
            and report.cost == pytest.approx(table.cost.sum())
        )
        check_ledger(server.log(), table, digests(tmp_path / 'imgs', records))
        assert (
            describe(records, server.client(), tmp_path / 'd.jsonl', budget=0.05, **settings).ok <= 1
        )  # earlier runs count
        assert (
            describe(records, server.client(), tmp_path / 'd.jsonl', budget=1.0, **settings).stopped is None
        )
    assert len(read_journal(tmp_path / 'd.jsonl')) == 200


def test_money_without_a_line_counts_against_the_budget(tmp_path):
    records = pictures(tmp_path / 'imgs', 1)
    go = dict(images_dir=tmp_path / 'imgs', retries=12, prices=(1.0, 4.0), **QUICK)
    with serving(tmp_path / 'server', always='impure') as server:
        for _ in range(3):
            report = describe(records, server.client(), tmp_path / 'd.jsonl', budget=0.01, **go)
            assert report.stopped and len(read_journal(tmp_path / 'd.jsonl')) == 0
            assert 5 < len(server.log()) <= 10
        assert describe(records, server.client(), tmp_path / 'd.jsonl', **go).failed == 1
        asked = len(server.log())
        # what the failed line cost is not forgotten when it is dropped
        report = describe(
            records, server.client(), tmp_path / 'd.jsonl', budget=0.001 * asked, retry_failed=True, **go
        )
        assert report.stopped and len(server.log()) == asked
        report = describe(records, server.client(), tmp_path / 'd.jsonl', budget=0.001 * asked, **go)
        assert report.stopped and len(server.log()) == asked


# ---- limits, concurrency, memory ------------------------------------------------------------------


def busiest(times, window):
    times = sorted(times)
    return max(sum(1 for x in times[i : i + 2000] if x < t + window) for i, t in enumerate(times))


@pytest.mark.parametrize('limit', [dict(rpm=60), dict(tpm=60 * 700)])
def test_the_rate_limit_holds_over_any_sliding_window(tmp_path, limit, monkeypatch):
    counts = []

    class Watched(SlidingWindow):
        async def acquire(self, tokens):
            await super().acquire(tokens)
            counts.append(self.count)

    monkeypatch.setattr('bdam_repro.describe.SlidingWindow', Watched)
    records = pictures(tmp_path / 'imgs', 250)
    with serving(
        tmp_path / 'server', latency=0.03, faults=0.2, kinds=['429', '500', 'slow', 'impure']
    ) as server:
        report = describe(
            records,
            server.client(),
            tmp_path / 'd.jsonl',
            images_dir=tmp_path / 'imgs',
            window=0.6,
            max_tokens=100,
            **limit,
            **QUICK,
        )
        times = [e['t'] for e in server.log()]
    assert report.ok + report.failed == 250 and len(times) > 250
    assert busiest(times, 0.6) <= 60
    assert 50 < max(counts) <= 60  # and it is used: 100 workers ask before the first answer comes


def test_requests_overlap_up_to_the_concurrency(tmp_path):
    records = pictures(tmp_path / 'imgs', 100)
    with serving(tmp_path / 'server', together=32) as server:  # it answers none before 32 are waiting
        describe(
            records,
            server.client(),
            tmp_path / 'd.jsonl',
            images_dir=tmp_path / 'imgs',
            concurrency=32,
            **QUICK | {'timeout': 120.0},
        )
        log = server.log()
    assert max(sum(x['t'] <= e['t'] < x['end'] for x in log) for e in log) == 32


def _peak(url, folder, out, n, pipe):
    _describe_in_child(url, folder, out, 100, {})  # everything imported, pools filled
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _describe_in_child(url, folder, Path(out).with_suffix('.more'), n, {})
    pipe.send((before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


@pytest.mark.timeout(1200 if FULL else 300)
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    peaks, sizes = {}, (1000, 8000) if FULL else (200, 1000)
    pictures(tmp_path / 'imgs', sizes[1], size=130)  # 50 kB each: 800 more would be 40 MB, 54 MB as base64
    with serving(tmp_path / 'server') as server:
        for n in sizes:
            here, there = SPAWN.Pipe()
            child = SPAWN.Process(
                target=_peak, args=(server.url, tmp_path / 'imgs', tmp_path / f'{n}.jsonl', n, there)
            )
            child.start()
            there.close()
            peaks[n] = here.recv()
            child.join()
    print(f'\npeak RSS in kB, warm and after n images: {peaks}')
    assert peaks[sizes[1]][1] - peaks[sizes[0]][1] < 25_000, peaks


# ---- the provider's batch mode --------------------------------------------------------------------

BATCH = dict(model='m', progress=False, poll=0.05)


def test_batches_end_in_the_same_file(tmp_path):
    records = pictures(tmp_path / 'imgs', 120)
    with serving(tmp_path / 'server', faults=0.3, batch_polls=2, hang=0.1) as server:
        report = describe_batch(
            records,
            server.client(),
            tmp_path / 'b.jsonl',
            images_dir=tmp_path / 'imgs',
            max_requests=50,
            prices=(1.0, 4.0),
            **BATCH,
        )
        log = server.log()
    table = read_journal(tmp_path / 'b.jsonl')
    check_ledger(log, table, digests(tmp_path / 'imgs', records))
    assert report.ok + report.failed == len(table) == 120 and report.ok > 100
    batches = [e['n'] for e in log if e['kind'] == 'batch']
    assert (
        batches[:3] == [50, 50, 19] and len(batches) > 3
    )  # one alone, then split at the limit; rejects go to further rounds
    kept = Counter(e['kind'] for e in log)
    assert 2 * kept['batch'] <= kept['deleted'] <= 3 * kept['batch']  # no picture is left at the provider
    assert not (tmp_path / '.b.jsonl.batches.json').exists() and report.cost == pytest.approx(
        table.cost.sum()
    )


def test_a_batch_file_is_split_by_size(tmp_path):
    records = pictures(tmp_path / 'imgs', 12)
    with serving(tmp_path / 'server') as server:
        describe_batch(
            records,
            server.client(),
            tmp_path / 'b.jsonl',
            images_dir=tmp_path / 'imgs',
            max_bytes=20_000,
            **BATCH,
        )
        sizes = [e['n'] for e in server.log() if e['kind'] == 'batch']
    assert sum(sizes) == 11 and len(sizes) > 2


def _batch_in_child(url, folder, out, n):
    records = pd.DataFrame({'file': [f'{i:05}.png' for i in range(n)]})

    async def run():
        async with openai.AsyncOpenAI(api_key=KEY, base_url=url, max_retries=0) as client:
            await describe_batch_async(records, client, out, images_dir=folder, max_requests=8, **BATCH)

    asyncio.run(run())


def test_batches_survive_kills_without_being_paid_twice(tmp_path):
    n, rng = 160, random.Random(1)
    records, lines_at = pictures(tmp_path / 'imgs', n), []
    with serving(tmp_path / 'server', batch_polls=12, faults=0.2, kinds=['impure']) as server:
        for _ in range(8):
            child = SPAWN.Process(
                target=_batch_in_child, args=(server.url, tmp_path / 'imgs', tmp_path / 'b.jsonl', n)
            )
            child.start()
            server.wait_for(len(server.lines()) + rng.randint(1, 8), child)
            time.sleep(rng.uniform(0, 0.05))
            child.kill()
            child.join()
            lines_at.append((time.time(), set(read_journal(tmp_path / 'b.jsonl').image)))
        report = describe_batch(
            records,
            server.client(),
            tmp_path / 'b.jsonl',
            images_dir=tmp_path / 'imgs',
            max_requests=8,
            **BATCH,
        )
        log = server.log()
    table, of = read_journal(tmp_path / 'b.jsonl'), digests(tmp_path / 'imgs', records)
    assert len(table) == n and report.skipped + report.ok + report.failed == n
    # the first image goes alone: a kill between its answer and its line costs one answer, as in `describe`
    first = next(i for i, e in enumerate(log) if e['kind'] == 'batch')
    alone = [e for e in log[:first] if e['image'] == of['00000.png'] and e['kind'] == 'good']
    kills = [when for when, there in lines_at if '00000.png' not in there]
    assert len(alone) <= 1 + len(kills) and all(
        any(a['t'] <= k <= b['t'] for k in kills) for a, b in pairwise(alone)
    )
    check_ledger([e for e in log if e not in alone[1:]], table, of)


# an answer costs 0.0006 + 0.0004 dollars, and 0.0012 more if it were as long as it may be
PRICED = dict(prices=(1.0, 4.0))


def spent(log):
    return 0.001 * sum(e['kind'] in ('good', *CONTENT) for e in log)


def test_batches_keep_to_the_budget(tmp_path):
    records = pictures(tmp_path / 'imgs', 100)
    go = dict(images_dir=tmp_path / 'imgs', **PRICED, **BATCH)
    with serving(tmp_path / 'server') as server:
        report = describe_batch(records, server.client(), tmp_path / 'b.jsonl', budget=0.05, **go)
        table, log = read_journal(tmp_path / 'b.jsonl'), server.log()
        assert 'the budget of $0.05 is used up' in report.stopped and 'room for 22 images' in report.notes[0]
        assert 0.045 < spent(log) <= 0.05 and report.cost == pytest.approx(table.cost.sum()) == pytest.approx(
            spent(log)
        )
        sizes = [
            e['n'] for e in log if e['kind'] == 'batch'
        ]  # each fits what is left, at the price of the longest answer
        assert len(sizes) > 2 and all(
            0.0022 * n <= 0.05 - 0.001 * (1 + sum(sizes[:i])) + 1e-9 for i, n in enumerate(sizes)
        )
        again = describe_batch(records, server.client(), tmp_path / 'b.jsonl', budget=0.05, **go)
        assert again.ok == 0 and again.stopped and len(server.log()) == len(log)  # earlier runs count
        assert (
            describe_batch(records, server.client(), tmp_path / 'b.jsonl', budget=1.0, **go).stopped is None
        )
        check_ledger(server.log(), read_journal(tmp_path / 'b.jsonl'), digests(tmp_path / 'imgs', records))
    assert len(read_journal(tmp_path / 'b.jsonl')) == 100


def test_a_batch_that_no_budget_holds_is_not_sent(tmp_path):
    records = pictures(tmp_path / 'imgs', 3)
    with serving(tmp_path / 'server') as server:
        report = describe_batch(
            records,
            server.client(),
            tmp_path / 'b.jsonl',
            images_dir=tmp_path / 'imgs',
            budget=0.001,
            **PRICED,
            **BATCH,
        )
        assert server.log() == []
    assert report.ok == 0 and 'the next answer may cost $0.002' in report.stopped


def test_rejected_answers_of_batches_count_against_the_budget(tmp_path):
    records = pictures(tmp_path / 'imgs', 8)
    go = dict(images_dir=tmp_path / 'imgs', retries=5, **PRICED, **BATCH)
    with serving(tmp_path / 'server', always='impure', good_first=1) as server:
        for _ in range(3):  # what a rejected answer has cost is known to the next process too
            report = describe_batch(records, server.client(), tmp_path / 'b.jsonl', budget=0.02, **go)
            assert report.stopped and 0.016 < spent(server.log()) <= 0.02
        assert len(read_journal(tmp_path / 'b.jsonl')) == 1  # the one that went alone
        describe_batch(records, server.client(), tmp_path / 'b.jsonl', budget=9.0, **go)
        table = read_journal(tmp_path / 'b.jsonl')
        assert (table[table.status == 'failed'].tries == 6).all()
        assert table.cost.sum() == pytest.approx(spent(server.log()))


def test_a_provider_that_is_away_for_a_while(tmp_path):
    records = pictures(tmp_path / 'imgs', 30)
    go = dict(images_dir=tmp_path / 'imgs', max_requests=10, **BATCH)
    with serving(tmp_path / 'a', away=(8, 20)) as server:
        assert describe_batch(records, server.client(), tmp_path / 'a.jsonl', **go).ok == 30
        check_ledger(server.log(), read_journal(tmp_path / 'a.jsonl'), digests(tmp_path / 'imgs', records))
    stays = pytest.raises(UserError, match=r'HTTP 503.*run again to go on')
    with serving(tmp_path / 'b', away=(7, 10**9), batch_polls=1) as server, stays:
        describe_batch(records, server.client(), tmp_path / 'b.jsonl', breaker=3, **go)
    with (
        serving(tmp_path / 'c', away=(0, 10**9)) as server,
        pytest.raises(UserError, match='HTTP 503'),
    ):  # never seen: no waiting
        describe_batch(records, server.client(), tmp_path / 'c.jsonl', **go | {'poll': 60})


def test_open_batches_are_not_taken_for_those_of_another_model(tmp_path):
    records = pictures(tmp_path / 'imgs', 4)
    go = dict(images_dir=tmp_path / 'imgs', **BATCH)
    with serving(tmp_path / 'server', batch_polls=10**9) as server:
        child = SPAWN.Process(
            target=_batch_in_child, args=(server.url, tmp_path / 'imgs', tmp_path / 'b.jsonl', 4)
        )
        child.start()
        while not any(e['kind'] == 'batch' for e in server.log()):
            pass
        child.kill()
        child.join()
        (tmp_path / 'b.jsonl').unlink()  # else its first line tells
        with pytest.raises(UserError, match='batches of another model, prompt or seed are open'):
            describe_batch(records, server.client(), tmp_path / 'b.jsonl', **go | {'model': 'other'})


def test_a_state_file_of_lists_is_gone_on_with(tmp_path):
    "On disk a history and a manner are lists, as they always were."
    records = pictures(tmp_path / 'imgs', 3)
    old = dict(
        asked=['m', '0', *OnlineSettings(model='m', images_dir=tmp_path / 'imgs').hashes()],
        manner=['text', 'max_tokens', 0.7],
        parts=[],
        history={'00001.png': [3, 1800, 300, '{}', 'schema: no identity']},
        created=1,
        started='x',
    )
    (tmp_path / '.b.jsonl.batches.json').write_text(json.dumps(old))
    with serving(tmp_path / 'server', formats=('text',)) as server:
        go = dict(images_dir=tmp_path / 'imgs', prices=(1.0, 4.0), **BATCH)
        report = describe_batch(records, server.client(), tmp_path / 'b.jsonl', **go)
        assert not [e for e in server.log() if e['kind'].startswith('status')]  # it is known how to ask
    table = read_journal(tmp_path / 'b.jsonl').set_index('image')
    assert report.ok == 3 and table.tries.to_dict() == {'00000.png': 1, '00001.png': 4, '00002.png': 1}
    assert table.tokens['00001.png'] == {'prompt': 2400, 'completion': 400}


def test_a_dry_run_of_batches_sends_nothing(tmp_path, capsys):
    records = pictures(tmp_path / 'imgs', 4)
    with serving(tmp_path / 'server') as server:
        e = describe_batch(
            records,
            server.client(),
            tmp_path / 'b.jsonl',
            images_dir=tmp_path / 'imgs',
            dry_run=True,
            **PRICED,
            **BATCH,
        )
        assert server.log() == []
    assert (e.images, e.hours) == (4, 24) and '4 images to describe' in capsys.readouterr().out


@pytest.mark.parametrize(
    'settings,says',
    [
        (dict(key='another'), 'refuses the key'),
        (dict(batches=False), 'refuses batches'),
        (dict(vision=False), 'read images'),
    ],
)
def test_a_provider_without_batches(tmp_path, settings, says):
    records = pictures(tmp_path / 'imgs', 5)
    with serving(tmp_path / 'server', **settings) as server, pytest.raises(UserError, match=says) as e:
        describe_batch(records, server.client(), tmp_path / 'b.jsonl', images_dir=tmp_path / 'imgs', **BATCH)
    assert KEY not in str(e.value) and '\n' not in str(e.value)
    assert not re.search(r'[.?!]\.', str(e.value))


def test_the_first_image_finds_out_how_a_batch_is_asked(tmp_path):
    records = pictures(tmp_path / 'imgs', 20)
    with serving(tmp_path / 'server', formats=('text',)) as server:
        report = describe_batch(
            records, server.client(), tmp_path / 'b.jsonl', images_dir=tmp_path / 'imgs', **BATCH
        )
        kinds = Counter(e['kind'] for e in server.log())
    assert report.ok == 20 and kinds['status-400'] == 2 and kinds['good'] == 20


# ---- secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'settings',
    [
        dict(status=401, message=f'Incorrect API key provided: {KEY}'),
        dict(status=400, message=f'bad request, key {KEY}'),
        dict(status=500, message=f'trace: Authorization: Bearer {KEY}'),
        dict(status=400, message='x ' * 140 + KEY),  # a message is cut to 300 letters: not through the key
        dict(always='echo', message=KEY),
        dict(),
    ],
)
def test_a_planted_key_is_in_no_output(tmp_path, settings):
    pictures(tmp_path / 'imgs', 3)
    code = (
        'import logging, sys, pandas as pd; logging.basicConfig(level=logging.DEBUG)\n'
        'from bdam_repro.describe import describe\n'
        'from bdam_repro.servers import make_client\n'
        "records = pd.DataFrame({'file': [f'{i:05}.png' for i in range(3)]})\n"
        "describe(records, make_client(), sys.argv[2] + '/d.jsonl',"
        " images_dir=sys.argv[1], model='m', concurrency=2,"
        ' retries=1, backoff=.01, breaker=5)'
    )
    with serving(tmp_path / 'server', **settings) as server:
        done = subprocess.run(
            [sys.executable, '-X', 'dev', '-c', code, tmp_path / 'imgs', tmp_path],
            capture_output=True,
            text=True,
            env=os.environ | {'OPENAI_API_KEY': KEY, 'OPENAI_BASE_URL': server.url, 'OPENAI_LOG': 'debug'},
        )
    assert (done.returncode == 0) == (not settings.get('status')), done.stderr[-2000:]
    written = (tmp_path / 'd.jsonl').read_text()
    assert KEY[:20] not in done.stdout + done.stderr + written
    assert 'Unclosed' not in done.stderr
    if settings.get('always'):
        assert 'failed' in written


def papermill(tmp_path, url, *parameters):
    "Run the notebook; what it printed, its exit code, the executed notebook's text."
    env = os.environ | {
        'OPENAI_API_KEY': KEY,
        'OPENAI_BASE_URL': url,
        'IN_TEST': '1',
        'BDAM_ROOT': str(tmp_path),
    }
    notebook = HERE.parent / 'nbs' / 'describe.ipynb'
    command = [Path(sys.executable).parent / 'papermill', notebook, tmp_path / 'out.ipynb', *parameters]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    return done.stdout + done.stderr, done.returncode, (tmp_path / 'out.ipynb').read_text()


def test_the_notebook_asks_the_server_and_keeps_the_key_to_itself(tmp_path):
    with serving(tmp_path / 'server', key=KEY) as server:
        said, code, notebook = papermill(
            tmp_path,
            server.url,
            '-p',
            'model',
            'm',
            '-p',
            'limit',
            '6',
            '-p',
            'price_in',
            '1',
            '-p',
            'price_out',
            '2',
        )
    assert code == 0, said
    assert 'ok=6' in notebook and KEY not in said + notebook and server.url not in said + notebook


def test_the_notebook_ends_with_one_line_when_the_key_is_refused(tmp_path):
    with serving(tmp_path / 'server', status=401, message=f'Incorrect API key provided: {KEY}') as server:
        said, code, notebook = papermill(tmp_path, server.url, '-p', 'model', 'm')
    assert code == 1 and 'the server refuses the key (401' in said
    assert KEY not in said + notebook and server.url not in said + notebook


# ---- what a user can get wrong --------------------------------------------------------------------

BAD = {
    'no model': (dict(model=''), 'model is empty'),
    'no concurrency': (dict(concurrency=0), 'concurrency is 0'),
    'negative concurrency': (dict(concurrency=-3), 'concurrency is -3'),
    'too many workers': (dict(concurrency=5000), 'from 1 to 1000'),
    'half a worker': (dict(concurrency=1.5), 'concurrency is 1.5'),
    'budget of nothing': (dict(budget=0, prices=(1, 1)), 'budget is 0'),
    'budget without prices': (dict(budget=3), 'budget needs prices'),
    'negative prices': (dict(prices=(-1, 1)), 'prices is'),
    'rate limit of nothing': (dict(rpm=0), 'rpm is 0'),
    'fewer tokens than a request': (dict(tpm=50), 'tpm=50 is less than'),
    'negative retries': (dict(retries=-1), 'retries is -1'),
    'no time': (dict(timeout=0), 'timeout is 0'),
    'limit of nothing': (dict(limit=0), 'limit is 0'),
    'no such images': (dict(images_dir='/nowhere'), 'no such folder'),
    'a style without captions': (dict(styles=[['a'], []]), r'styles\[1\]'),
    'a style that is a caption': (dict(styles=['a man']), r'styles\[0\]'),
}


@pytest.mark.parametrize('settings,says', BAD.values(), ids=BAD.keys())
def test_wrong_settings_cost_one_line_and_no_request(tmp_path, settings, says):
    records = pictures(tmp_path / 'imgs', 2)
    with serving(tmp_path / 'server') as server:
        with pytest.raises(UserError, match=says) as e:
            describe(
                records,
                server.client(),
                tmp_path / 'd.jsonl',
                **{'images_dir': tmp_path / 'imgs'} | QUICK | settings,
            )
        assert server.log() == []
    assert '\n' not in str(e.value)


def test_options_are_known_by_name(tmp_path):
    "An option of the one call is none of the other, and every default stands once."
    records, client = pictures(tmp_path / 'imgs', 1), openai.AsyncOpenAI(api_key='k')
    go = dict(model='m', images_dir=tmp_path / 'imgs', dry_run=True)
    for call, stranger in ((describe, 'poll'), (describe_batch, 'rpm'), (describe, 'concurency')):
        with pytest.raises(TypeError, match=stranger):
            call(records, client, tmp_path / 'd.jsonl', **go, **{stranger: 1})
    with pytest.raises(TypeError, match='images_dir'):
        describe(records, client, tmp_path / 'd.jsonl', model='m')
    shared = set(DescribeParameters.model_fields) & set(OnlineSettings.model_fields) - {'model'}
    assert len(shared) == 12
    for name in shared:
        assert DescribeParameters.model_fields[name].default == OnlineSettings.model_fields[name].default


def test_wrong_tables_files_and_folders(tmp_path):
    records, client = (
        pictures(tmp_path / 'imgs', 3),
        openai.AsyncOpenAI(api_key='k', base_url='http://127.0.0.1:9/v1', max_retries=0),
    )

    def refused(says, records=records, out=tmp_path / 'd.jsonl'):
        with pytest.raises(UserError, match=says) as e:
            describe(records, client, out, images_dir=tmp_path / 'imgs', **QUICK)
        assert '\n' not in str(e.value)

    refused('records is empty', records.head(0))
    refused('no column "file"', records.rename(columns={'file': 'f'}))
    refused('no such folder', out=tmp_path / 'missing' / 'd.jsonl')
    refused('a folder', out=tmp_path / 'imgs')
    (tmp_path / 'other.jsonl').write_text(json.dumps({'image': 'elsewhere/1.jpg', 'status': 'failed'}) + '\n')
    refused('belongs to another one', out=tmp_path / 'other.jsonl')
    (tmp_path / 'split.jsonl').write_text(
        json.dumps({'image': '00000.png', 'status': 'failed', 'model': 'split'}) + '\n'
    )
    refused('holds lines of model split', out=tmp_path / 'split.jsonl')
    line = json.dumps({'image': '00000.png', 'status': 'failed', 'model': 'm'})
    (tmp_path / 'broken.jsonl').write_text('not json\n' + line + '\n')
    refused('line 1: not a description', out=tmp_path / 'broken.jsonl')
    (tmp_path / 'twice.jsonl').write_text((line + '\n') * 2)
    with pytest.raises(UserError, match='is in lines 1 and 2'):
        read_journal(tmp_path / 'twice.jsonl')
    with Journal(tmp_path / 'locked.jsonl', records['file']):
        refused('another process is writing', out=tmp_path / 'locked.jsonl')


def test_wrong_servers(tmp_path, monkeypatch):
    records = pictures(tmp_path / 'imgs', 5)

    def refused(client, says):
        with pytest.raises(UserError, match=says) as e:
            describe(
                records, client, tmp_path / 'd.jsonl', images_dir=tmp_path / 'imgs', concurrency=2, **QUICK
            )
        assert '\n' not in str(e.value) and len(read_journal(tmp_path / 'd.jsonl')) == 0

    refused(
        openai.AsyncOpenAI(api_key='k', base_url='http://127.0.0.1:9/v1', max_retries=0),
        'no connection to the server',
    )
    with serving(tmp_path / 'a') as server:
        refused(openai.AsyncOpenAI(api_key='k', base_url=server.url + '/nonsense', max_retries=0), '404')
    with serving(tmp_path / 'b', vision=False) as server:
        refused(server.client(), 'does the model "m" read images')
    with serving(tmp_path / 'c', always='bad-envelope') as server:
        refused(server.client(), 'not a chat completion')


def test_without_a_key_or_an_address(monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    with pytest.raises(UserError, match='OPENAI_API_KEY is not set'):
        make_client()
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    monkeypatch.setenv('OPENAI_BASE_URL', 'localhost:8000')
    with pytest.raises(UserError, match='not an address'):
        make_client()


def test_pictures_that_cannot_be_read_cost_nothing(tmp_path):
    records = pictures(tmp_path / 'imgs', 6)
    (tmp_path / 'imgs' / '00000.png').write_bytes(b'')
    (tmp_path / 'imgs' / '00002.png').write_bytes((tmp_path / 'imgs' / '00002.png').read_bytes()[:45])
    (tmp_path / 'imgs' / '00004.png').unlink()
    with serving(tmp_path / 'server') as server:
        report = describe(
            records, server.client(), tmp_path / 'd.jsonl', images_dir=tmp_path / 'imgs', **QUICK
        )
        assert len(server.log()) == 3
    assert (report.ok, report.failed, dict(report.causes)) == (3, 3, {'image': 3})


def test_a_dry_run_sends_nothing_and_learns_from_the_file(tmp_path, capsys):
    records = pictures(tmp_path / 'imgs', 50)
    settings = dict(images_dir=tmp_path / 'imgs', prices=(1.0, 4.0), **QUICK)
    with serving(tmp_path / 'server') as server:
        first = describe(records, server.client(), tmp_path / 'd.jsonl', dry_run=True, **settings)
        assert server.log() == [] and not (tmp_path / 'd.jsonl').exists() and first.images == 50
        describe(records, server.client(), tmp_path / 'd.jsonl', limit=10, **settings)
        later = describe(records, server.client(), tmp_path / 'd.jsonl', dry_run=True, **settings)
    assert (later.images, later.prompt_tokens, later.completion_tokens) == (
        40,
        24_000,
        4_000,
    ) and later.cost == pytest.approx(0.04)
    assert '40 images to describe' in capsys.readouterr().out


@pytest.mark.parametrize('batch', [False, True])
def test_a_dry_run_needs_no_key(tmp_path, monkeypatch, batch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    records = pictures(tmp_path / 'imgs', 8).assign(split='train', pid=range(8))
    ds = SimpleNamespace(name='cuhk', root=tmp_path, images_dir=tmp_path / 'imgs', records=records)
    p = DescribeParameters(
        dataset='cuhk', describer='mllm', model='m', batch=batch, out=str(tmp_path / 'd.jsonl')
    )
    estimate_cost, out = describe_dataset(ds, p.model_copy(update=dict(dry_run=True)))
    assert estimate_cost.images == 8 and not out.exists()
    with pytest.raises(UserError, match='OPENAI_API_KEY is not set'):
        describe_dataset(ds, p)


def test_it_works_where_an_event_loop_runs(tmp_path):
    records = pictures(tmp_path / 'imgs', 8)

    async def cell():
        return describe(records, server.client(), tmp_path / 'd.jsonl', images_dir=tmp_path / 'imgs', **QUICK)

    with serving(tmp_path / 'server') as server:
        assert asyncio.run(cell()).ok == 8


def test_split_survives_whatever_people_write(tmp_path):
    odd = [
        '',
        '.',
        'man',
        '\U0001f600',
        'A' * 5000,
        'he ' * 400,
        'wearing',
        '<b>man</b> in {red} coat',
        "The man's shirt\nis red.",
        'and and and',
        'MAN IN RED SHIRT AND BLUE JEANS',
    ]
    captions = [[c] for c in odd] + [[]]
    records = pd.DataFrame({'file': [f'{i}.jpg' for i in range(len(captions))], 'captions': captions})
    report = describe_split(records, tmp_path / 'd.jsonl')
    table = read_journal(tmp_path / 'd.jsonl')
    assert report.ok + report.failed == len(records) == len(table) and report.ok >= 2
    assert table[table.status == 'failed'].reason.str.contains(':').all()


def test_estimates_of_nothing(tmp_path):
    assert estimate_cost([], tmp_path / 'none.jsonl', policy=Policy()).hours == 0


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    "Not even one of a single line, which an annotation file may be."
    records = pictures(tmp_path / 'imgs', 2, size=16)
    other = tmp_path / 'reid_raw.json'
    broken_twice = b'{"image": "0.jpg"\n{"image": "1.jpg"}x\n'
    for content in (b'[{"split": "train", "id": 1}]', b'[1]\n', b'some words', broken_twice):
        other.write_bytes(content)
        with pytest.raises(UserError, match=r'reid_raw\.json'):
            describe_split(records.assign(captions=[['A man in red.']] * 2), other)
        assert other.read_bytes() == content
