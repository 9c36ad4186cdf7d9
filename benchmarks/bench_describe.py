"""Throughput, rate limit and memory of `describe` against a local server.

    python benchmarks/bench_describe.py throughput   # 1,000 images of 100 ms; the loop measured on 50
    python benchmarks/bench_describe.py rate         # 600 requests per minute, by the server's clock
    python benchmarks/bench_describe.py memory       # peak RSS after 1,000 and 8,000 images

The sequential loop is a script without this module: openai's plain client, one request after another,
answers parsed and checked, nothing written. The server is a process of its own; the CPU time is that of the
describing process, which is what bounds the speed where other work keeps the cores busy.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import openai

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / 'tests')]

from test_describe import QUICK, SPAWN, _peak, busiest, pictures, serving  # noqa: E402

from bdam_repro.answers import Policy, read_reply  # noqa: E402
from bdam_repro.describe import describe  # noqa: E402
from bdam_repro.mllm import first_messages, image_url, judge_answer  # noqa: E402


def sequential(server, files, imgs):
    with openai.OpenAI(api_key='k', base_url=server.url, max_retries=0) as client:
        start = time.perf_counter()
        for f in files:
            answer = client.chat.completions.create(
                model='m',
                messages=first_messages(Policy(), (), image_url(imgs / f)),
                response_format={'type': 'json_object'},
            )
            judge_answer(read_reply(answer.model_dump()), Policy())
        return (time.perf_counter() - start) / len(files)


def throughput(tmp, n=1000, some=50, rounds=5):
    "Both in each round, one after the other: a busy machine slows both. All settings are the defaults."
    records, ratios = pictures(tmp / 'imgs', n, size=32), []
    for k in range(rounds):
        with serving(tmp / f'server{k}', latency=0.1) as server:
            one = sequential(server, records['file'][:some], tmp / 'imgs')
        with serving(tmp / f'server{k}b', latency=0.1) as server:
            start, cpu = time.perf_counter(), time.process_time()
            report = describe(records, server.client(), tmp / f'{k}.jsonl', images_dir=tmp / 'imgs', **QUICK)
            took, cpu = time.perf_counter() - start, time.process_time() - cpu
        assert report.ok == n
        ratios.append(one * n / took)
        print(
            f'an image: {1000 * one:.1f} ms sequential ({some} measured), '
            f'{1000 * took / n:.2f} ms with describe ({n} measured), '
            f'{1000 * cpu / n:.2f} ms of them CPU: {ratios[-1]:.1f} x',
            flush=True,
        )
    print(
        f'median {sorted(ratios)[rounds // 2]:.1f} x a sequential loop (bar: 40); '
        f'load of the machine {os.getloadavg()[0]:.1f}'
    )


def rate(tmp, n=1300):
    records = pictures(tmp / 'imgs', n)
    with serving(tmp / 'server', latency=0.2, faults=0.05, kinds=['429', '500']) as server:
        report = describe(
            records, server.client(), tmp / 'd.jsonl', images_dir=tmp / 'imgs', rpm=600, **QUICK
        )
        times = [e['t'] for e in server.log()]
    print(
        f'{len(times)} requests in {report.seconds:.0f} s; '
        f'busiest sliding minute at the server: {busiest(times, 60)} (limit 600)'
    )


def memory(tmp, sizes=(1000, 8000)):
    "Each size in a process of its own. 100 images before let it import and connect; the rest is growth."
    pictures(tmp / 'imgs', sizes[-1], size=64)
    with serving(tmp / 'server') as server:
        for n in sizes:
            here, there = SPAWN.Pipe()
            child = SPAWN.Process(target=_peak, args=(server.url, tmp / 'imgs', tmp / f'{n}.jsonl', n, there))
            child.start()
            before, after = here.recv()
            print(
                f'{n} images: peak RSS {before / 1024:.1f} MB warm, {after / 1024:.1f} MB at the end',
                flush=True,
            )
            child.join()


if __name__ == '__main__':
    chosen = {'throughput': throughput, 'rate': rate, 'memory': memory}
    for name in sys.argv[1:] or chosen:
        with tempfile.TemporaryDirectory() as folder:
            chosen[name](Path(folder))
