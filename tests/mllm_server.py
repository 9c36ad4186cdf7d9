"""A chat-completions server with a chosen share of faults, for the tests of `describe`. Listens on 127.0.0.1.

    python mllm_server.py settings.json log.jsonl

It prints its port, answers `/v1/chat/completions`, `/v1/files`, `/v1/batches`, and writes one line to the log
per request it has finished with:
`{"t": arrival, "end": ..., "image": sha1 of the data URL, "kind": "good" or the fault, "n": times asked}`.
What it says about an image depends on the image alone. Which fault comes depends on the image and on `n`.
`profile` makes it refuse and answer as a real server does (`server_profiles.py`).
"""

import asyncio
import hashlib
import json
import random
import sys
import time
from pathlib import Path

from server_profiles import PROFILES, Profile

DEFAULTS = dict(
    profile=None,
    good_first=0,
    echo=None,
    faults=0.0,
    kinds=None,
    latency=0.0,
    together=0,
    hang=30.0,
    retry_after='0.02',
    status=None,
    message='',
    key=None,
    formats=('json_schema', 'json_object', 'text'),
    usage=True,
    vision=True,
    always=None,
    batch_polls=2,
    away=(0, 0),
    batches=True,
    slow=0.3,
    die_after=None,
)
TRANSPORT = ('429', '429-after', '500', '502', 'cut', 'bad-envelope', 'not-http', 'hang')
CONTENT = (
    'cut-json',
    'invalid-json',
    'schema',
    'refusal',
    'refusal-field',
    'impure',
    'duplicate',
    'truncated',
    'empty',
)
SLOW = ('slow',)  # a good answer, byte by byte

PEOPLE = ('young', 'elderly', 'middle-aged')
NOUNS = ('man', 'woman')
HAIR = ('short black', 'long brown', 'curly gray', 'straight blond')
COLORS = ('red', 'blue', 'green', 'black', 'white')
GARMENTS = (('coat', 'jeans'), ('shirt', 'trousers'), ('jacket', 'shorts'))


def description(digest: str) -> dict:
    "The one right answer for an image."
    r = random.Random(digest)
    age, noun, hair, a, b, (upper, lower) = (
        r.choice(x) for x in (PEOPLE, NOUNS, HAIR, COLORS, COLORS, GARMENTS)
    )
    return {
        'identity_attributes': dict(
            gender=noun, age_group=age, build=None, height=None, skin=None, hair=hair
        ),
        'clothing_attributes': dict(
            upper=upper,
            lower=lower,
            shoes=None,
            color=f'{a}, {b}',
            pattern=None,
            material=None,
            accessories=None,
        ),
        'identity': f'There is an adult, {age} {noun} with {hair} hair.',
        'clothing': f'The person wears a {a} {upper} and {b} {lower}.',
    }


def content(kind: str, d: dict, message: str) -> tuple[str | None, str, str | None]:
    "(content, finish_reason, refusal) of an answer of this kind."
    good = json.dumps(d)
    if kind == 'cut-json':
        return good[: len(good) // 2], 'stop', None
    if kind == 'truncated':
        return good[:-20], 'length', None
    if kind == 'invalid-json':
        return good.replace(':', ' ='), 'stop', None
    if kind == 'schema':
        return json.dumps({'identity': d['identity'], 'clothing': ['coat']}), 'stop', None
    if kind == 'refusal':
        return "I'm sorry, but I can't help with identifying people.", 'stop', None
    if kind == 'refusal-field':
        return None, 'stop', 'I cannot describe this person.'
    if kind == 'impure':
        return json.dumps(d | {'identity': d['identity'][:-1] + ' in a red coat.'}), 'stop', None
    if kind == 'duplicate':
        return good[:-1] + ', "identity": "A different person with other hair."}', 'stop', None
    if kind == 'echo':
        return (
            json.dumps(d | {'identity': f'There is a young man, {message}, with short hair.'}),
            'stop',
            None,
        )
    if kind == 'empty':
        return '', 'stop', None
    return good, 'stop', None


class Server:
    def __init__(self, settings: dict, log_path: str):
        self.s = DEFAULTS | settings
        self.log = open(log_path, 'a', buffering=1)  # noqa: SIM115
        self.asked, self.files, self.batches = {}, {}, {}
        self.unlogged = 0  # requests that have arrived and have no line in the log yet
        self.good = self.calls = self.uploads = self.chats = 0
        self.here, self.all_here = 0, asyncio.Event()
        self.profile = PROFILES.get(self.s['profile'], Profile)()

    # ---- HTTP -------------------------------------------------------------------------------------
    async def serve(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b'\r\n\r\n')).decode('latin1')
                method, path, _ = head.split('\r\n', 1)[0].split(' ')
                headers = {
                    k.lower(): v.strip()
                    for k, _, v in (line.partition(':') for line in head.split('\r\n')[1:])
                }
                body = await self.read_body(reader, headers)
                await self.route(method, path.split('?')[0], headers, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def read_body(self, reader, headers):
        if headers.get('transfer-encoding', '').lower() != 'chunked':
            return await reader.readexactly(int(headers.get('content-length', 0)))
        parts = []
        while size := int((await reader.readline()).strip() or b'0', 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readexactly(2)
        return b''.join(parts)

    async def send(self, writer, status, body, headers=(), drip=False, kind='application/json'):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        extra = ''.join(f'{k}: {v}\r\n' for k, v in headers)
        writer.write(
            f'HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\n{extra}'
            f'content-length: {len(raw)}\r\n\r\n'.encode()
        )
        pieces = (
            [raw[i : i + len(raw) // 8 + 1] for i in range(0, len(raw), len(raw) // 8 + 1)] if drip else [raw]
        )
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if drip:
                await asyncio.sleep(self.s['slow'] / 8)

    async def route(self, method, path, headers, body, writer):
        if path == '/v1/log':  # answered when every request so far has its line
            while self.unlogged:
                await asyncio.sleep(0.01)
            return await self.send(writer, 200, {})
        if self.s['key'] and headers.get('authorization') != f'Bearer {self.s["key"]}':
            return await self.send(
                writer,
                401,
                {
                    'error': {
                        'message': f'Incorrect API key provided: {headers.get("authorization")}',
                        'code': 'invalid_api_key',
                    }
                },
            )
        if path == '/v1/chat/completions':
            return await self.chat(json.loads(body), writer)
        self.calls += (
            1  # of the files and batches endpoints: from the first number of `away` to the second it is away
        )
        if self.s['away'][0] < self.calls <= self.s['away'][1]:
            return await self.send(writer, 503, {'error': {'message': 'be back soon'}})
        if self.s['batches'] and path.startswith('/v1/files'):
            return await self.file(method, path, headers, body, writer)
        if self.s['batches'] and path.startswith('/v1/batches'):
            return await self.batch(method, path, body, writer)
        await self.send(writer, 404, {'error': {'message': f'unknown path {path}'}})

    # ---- chat completions -------------------------------------------------------------------------
    def image_of(self, request):
        parts = [p for m in request['messages'] if isinstance(m['content'], list) for p in m['content']]
        urls = [p['image_url']['url'] for p in parts if p['type'] == 'image_url']
        url = urls[0] if urls else str(request['messages'])
        return hashlib.sha1(url.encode()).hexdigest()

    def choose(self, digest):
        "(kind, n): the fault for this image at its n-th asking, or 'good'."
        n = self.asked[digest] = self.asked.get(digest, 0) + 1
        r = random.Random(f'{digest}{n}')
        if self.s['always']:
            return ('good' if self.good < self.s['good_first'] else self.s['always']), n
        return (
            r.choice(self.s['kinds'] or TRANSPORT + CONTENT + SLOW)
            if r.random() < self.s['faults']
            else 'good'
        ), n

    def completion(self, kind, digest, request):
        text, finish, refusal = content(kind, description(digest), self.s['message'])
        text = self.s['echo'] or text
        usage = {'prompt_tokens': 600, 'completion_tokens': 100, 'total_tokens': 700}
        return {
            'id': 'c',
            'object': 'chat.completion',
            'created': 0,
            'model': request['model'],
            **({'usage': usage} if self.s['usage'] else {}),
            'choices': [
                {
                    'index': 0,
                    'finish_reason': finish,
                    'message': {
                        'role': 'assistant',
                        'content': text,
                        **({'refusal': refusal} if refusal else {}),
                    },
                }
            ],
        }

    def body_of_batch(self, kind, digest, request):
        "The answer in a batch's output file: JSON where it is JSON, else text."
        body, _ = self.profile.reply(self.completion(kind, digest, request), request)
        return body.decode() if isinstance(body, bytes) else body

    def refused(self, request):
        "(status, message) for a request that this server does not take at all."
        form = request.get('response_format', {}).get('type', 'text')
        if self.s['status']:
            return self.s['status'], self.s['message']
        if not self.s['vision']:
            return 400, 'image_url is not supported: this model reads text only'
        if form not in self.s['formats']:
            return 400, f'response_format {form} is not supported'
        if not 0 <= request.get('temperature', 1) <= 2:
            return 400, 'temperature must be from 0 to 2'
        return None

    async def chat(self, request, writer):
        self.unlogged += 1
        told = []

        def tell():
            if not told:
                self.unlogged -= 1
            told.append(True)

        try:
            await self.chat_and_tell(request, writer, tell)
        finally:  # a client that was killed: its request has no line
            tell()

    async def chat_and_tell(self, request, writer, tell):
        t, digest = time.time(), self.image_of(request)

        def log(kind, n=0):
            tell()
            self.log.write(
                json.dumps({'t': t, 'end': time.time(), 'image': digest, 'kind': kind, 'n': n}) + '\n'
            )

        self.chats += 1
        if problem := self.profile.refuse(request, self.chats):
            log(f'status-{problem[0]}')
            return await self.send(writer, *problem)
        if problem := self.refused(request):
            log(f'status-{problem[0]}')
            code = 'insufficient_quota' if 'quota' in problem[1] else None
            return await self.send(
                writer, problem[0], {'error': {'message': problem[1], 'code': code, 'type': code}}
            )
        kind, n = self.choose(digest)
        if self.s['die_after'] is not None and self.good >= self.s['die_after']:
            log('dead', n)
            raise ConnectionError
        if self.s['together'] and self.chats > 1:  # after the first: none is answered before so many are here
            self.here += 1
            if self.here >= self.s['together']:
                self.all_here.set()
            await self.all_here.wait()
        if self.s['latency']:
            await asyncio.sleep(self.s['latency'])
        await self.answer(kind, n, digest, request, writer, log)

    async def answer(self, kind, n, digest, request, writer, log):
        if kind in ('429', '429-after'):
            log(kind, n)
            return await self.send(
                writer,
                429,
                {'error': {'message': 'slow down'}},
                [('Retry-After', self.s['retry_after'])] if kind == '429-after' else (),
            )
        if kind in ('500', '502'):
            log(kind, n)
            return await self.send(
                writer, int(kind), b'<html>oops</html>' if kind == '502' else {'error': {'message': 'oops'}}
            )
        if kind == 'hang':
            log(kind, n)
            await asyncio.sleep(self.s['hang'])
            raise ConnectionError
        body, media_type = self.profile.reply(self.completion(kind, digest, request), request)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        if kind == 'cut':
            log(kind, n)
            writer.write(
                f'HTTP/1.1 200 X\r\ncontent-type: application/json\r\n'
                f'content-length: {len(raw)}\r\n\r\n'.encode()
                + raw[: len(raw) // 2]
            )
            await writer.drain()
            raise ConnectionError
        if kind == 'not-http':
            log(kind, n)
            writer.write(b'\x00\xff nobody speaks like this\r\n\r\n')
            await writer.drain()
            raise ConnectionError
        if kind == 'bad-envelope':
            log(kind, n)
            return await self.send(writer, 200, raw[: len(raw) // 2])
        await self.send(writer, 200, raw, drip=kind == 'slow', kind=media_type)
        self.good += kind in ('good', 'slow')
        log('good' if kind == 'slow' else kind, n)  # after the last byte: the answer has been served

    # ---- files and batches ------------------------------------------------------------------------
    async def file(self, method, path, headers, body, writer):
        if method == 'POST':
            boundary = headers['content-type'].split('boundary=')[1].encode()
            parts = [p.partition(b'\r\n\r\n') for p in body.split(b'--' + boundary)]
            data = next(rest[:-2] for head, _, rest in parts if b'filename=' in head)
            self.uploads += 1  # a number of its own: files are deleted, their names stay used
            name = f'file-{self.uploads}'
            self.files[name] = data
            return await self.send(
                writer,
                200,
                {
                    'id': name,
                    'object': 'file',
                    'bytes': len(data),
                    'created_at': 0,
                    'filename': 'x',
                    'purpose': 'batch',
                    'status': 'processed',
                },
            )
        name = path.split('/')[3]
        if path.endswith('/content'):
            return await self.send(writer, 200, self.files[name])
        self.log.write(json.dumps({'t': time.time(), 'kind': 'deleted', 'file': name}) + '\n')
        del self.files[name]
        await self.send(writer, 200, {'id': name, 'object': 'file', 'deleted': True})

    async def batch(self, method, path, body, writer):
        if method == 'POST':
            request = json.loads(body)
            name = f'batch-{len(self.batches)}'
            self.batches[name] = {
                'id': name,
                'object': 'batch',
                'endpoint': '/v1/chat/completions',
                'completion_window': '24h',
                'created_at': 0,
                'status': 'in_progress',
                'input_file_id': request['input_file_id'],
                'metadata': request.get('metadata'),
                'polls': 0,
            }
            self.log.write(
                json.dumps(
                    {
                        't': time.time(),
                        'kind': 'batch',
                        'n': self.files[request['input_file_id']].count(b'\n'),
                    }
                )
                + '\n'
            )
            return await self.send(writer, 200, self.batches[name])
        if path == '/v1/batches':
            return await self.send(
                writer, 200, {'object': 'list', 'data': list(self.batches.values())[::-1], 'has_more': False}
            )
        batch = self.batches[path.split('/')[3]]
        batch['polls'] += 1
        if batch['polls'] >= self.s['batch_polls'] and batch['status'] == 'in_progress':
            self.finish(batch)
        await self.send(writer, 200, batch)

    def finish(self, batch):
        "Answer every request of the batch; HTTP faults become lines of the error file."
        lines, errors = [], []
        for raw in self.files[batch['input_file_id']].splitlines():
            r = json.loads(raw)
            digest = self.image_of(r['body'])
            if problem := self.refused(r['body']):
                answer = {'status_code': problem[0], 'body': {'error': {'message': problem[1]}}}
                errors.append(
                    json.dumps({'id': 'x', 'custom_id': r['custom_id'], 'response': answer, 'error': None})
                )
                continue
            kind, n = self.choose(digest)
            bad = kind in TRANSPORT
            answer = (
                {'status_code': 500, 'body': {'error': {'message': 'oops'}}}
                if bad
                else {'status_code': 200, 'body': self.body_of_batch(kind, digest, r['body'])}
            )
            (errors if bad else lines).append(
                json.dumps({'id': 'x', 'custom_id': r['custom_id'], 'response': answer, 'error': None})
            )
            self.log.write(
                json.dumps(
                    {'t': time.time(), 'image': digest, 'kind': 'good' if kind == 'slow' else kind, 'n': n}
                )
                + '\n'
            )
        self.files[batch['id'] + '-out'] = '\n'.join(lines).encode()
        batch |= {'status': 'completed', 'output_file_id': batch['id'] + '-out'}
        if errors:
            self.files[batch['id'] + '-err'] = '\n'.join(errors).encode()
            batch['error_file_id'] = batch['id'] + '-err'


async def main():
    server = Server(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
    listening = await asyncio.start_server(server.serve, '127.0.0.1', 0, limit=2**26, backlog=1024)
    print(listening.sockets[0].getsockname()[1], flush=True)
    async with listening:
        await listening.serve_forever()


if __name__ == '__main__':
    asyncio.run(main())
