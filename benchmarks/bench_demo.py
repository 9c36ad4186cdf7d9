"""Visitors of the search page, all at once: errors, and how long they wait.

    python benchmarks/bench_demo.py --model runs/synth/tiny/full/seed0 [--users 50] [--seconds 120]

Each visitor asks, waits for the answer, looks at it for `--think` seconds in the mean, and asks again. One
search in three lets the fusion order the answer. The server is `make demo` in a process of its own."""
import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np

from bdam_repro.search import EXAMPLES


async def ask(client, url, text, score):
    "One search through the page's own interface: its seconds. Raises where the answer is none."
    start = time.perf_counter()
    r = await client.post(f'{url}/gradio_api/call/search', json={'data': [text, 10, score, 'all']})
    r.raise_for_status()
    async with client.stream('GET', f'{url}/gradio_api/call/search/{r.json()["event_id"]}') as events:
        answer = (await events.aread()).decode()
    assert 'event: complete' in answer and answer.count('<figure') >= 10, answer[:300]
    return time.perf_counter() - start


async def visitor(client, url, until, think, seed, waits, errors):
    rng = random.Random(seed)
    await asyncio.sleep(rng.random()*think)
    while time.perf_counter() < until:
        score = rng.choice(['dual', 'dual', 'fused'])
        try: waits.append(await ask(client, url, rng.choice(EXAMPLES), score))
        except Exception as e: errors.append(f'{type(e).__name__}: {e}')       # counted, and shown at the end
        await asyncio.sleep(rng.expovariate(1/think) if think else 0)


async def crowd(url, users, seconds, think):
    waits, errors, until = [], [], time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=2*users)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        await ask(client, url, EXAMPLES[0], 'dual')                            # the first one warms up
        await asyncio.gather(*(visitor(client, url, until, think, i, waits, errors) for i in range(users)))
    return waits, errors


def serve(*arguments):
    "The page in a process of its own, and its address."
    code = 'from bdam_repro.demo import demo_main; demo_main()'
    p = subprocess.Popen([sys.executable, '-c', code, '--port', '0', *arguments], text=True,
                         stdout=subprocess.PIPE, env=os.environ | {'OMP_NUM_THREADS': '1'})
    return p, p.stdout.readline().split()[0]


def measure(arguments, users=50, seconds=120., think=1.):
    p, url = serve(*arguments)
    try:
        asyncio.run(crowd(url, 2, 2, think))                       # warm
        before, started = os.times(), server_seconds(p.pid)
        waits, errors = asyncio.run(crowd(url, users, seconds, think))
        cpu = round(server_seconds(p.pid) - started, 1)
        own = os.times().user - before.user
    finally:
        p.terminate()
        p.wait(30)
    at = lambda q: round(float(np.percentile(waits, q)), 3)
    return dict(users=users, seconds=seconds, think=think, searches=len(waits), errors=len(errors),
                first_errors=errors[:3], p50_s=at(50), p95_s=at(95), max_s=at(100), server_cpu_s=cpu,
                client_cpu_s=round(own, 1))


def server_seconds(pid):
    "Processor time of a process so far."
    fields = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
    return round((int(fields[11]) + int(fields[12]))/os.sysconf('SC_CLK_TCK'), 1)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', required=True)
    p.add_argument('--users', type=int, default=50)
    p.add_argument('--seconds', type=float, default=120)
    p.add_argument('--think', type=float, default=1)
    args = p.parse_args()
    print(json.dumps(measure(['--model', args.model], args.users, args.seconds, args.think)))
