"""`describe` with the profiles of real servers (`server_profiles.py`), twelve pictures each, and what
they say when they refuse."""

import asyncio
from collections import Counter

import openai
import pytest
from mllm_server import description
from server_profiles import PROFILES
from test_describe import BATCH, QUICK, check_ledger, digests, pictures, serving

from bdam_repro.batchmode import describe_batch
from bdam_repro.config import UserError
from bdam_repro.describe import describe, describe_async
from bdam_repro.generalize import generalize_with
from bdam_repro.journal import read_journal
from bdam_repro.servers import RequestForm, Server, Transient, sort_problem

N = 12
IMPOSSIBLE = {  # the one line where no picture can be described
    'thinking': r'first 3 pictures all failed for one reason \(truncated: the answer reached max_tokens\);'
    r' a thinking model needs more room: -p max_tokens 4000\. Try these again with -p retry_failed True',
    'thinking-in-turns': r'first 3 pictures .* a thinking model needs more room: -p max_tokens 4000\.',
    'sglang': r'first 3 pictures all failed for one reason \(json: the model reasoned and wrote no answer\);'
    r' a thinking model needs more room: -p max_tokens 4000\.',
    'llama.cpp-text': r'refuses every request \(HTTP 500: image input is not supported.*\):'
    r' does the model "m" read images\?',
    'web-page': r'5 failures in a row without an answer, the last: the server sends a web page: Sign in'
    r' \(is it the right address',
}
NOTES = {  # what is left out, as the report says it
    'vllm': ['without system'],
    'ollama': ['json_object'],
    'lmstudio': ['json_object', 'text, max_tokens'],
    'llama.cpp': ['without system'],
    'azure': ['without seed', 'json_object, max_tokens, without seed'],
    'openai-reasoning': ['max_completion_tokens', 'without temperature'],
    'mistral': ['without seed'],
    'gemini': ['without seed', 'json_object, max_tokens, without seed'],
    'fastapi': ['without detail'],
    'cloudflare': ['without temperature'],
    'only-two-roles': ['without system'],
    'role-is-literal': ['without system'],
    'refuses-under-200': ['json_object'],
}


@pytest.mark.parametrize('profile', [p for p in PROFILES if p not in IMPOSSIBLE])
def test_twelve_pictures_at_every_server(tmp_path, profile):
    records = pictures(tmp_path / 'imgs', N)
    with serving(tmp_path / 'server', profile=profile) as server:
        go = dict(images_dir=tmp_path / 'imgs', prices=(1.0, 4.0), **QUICK)
        report = describe(records, server.client(), tmp_path / 'd.jsonl', **go)
        log = server.log()
    table = read_journal(tmp_path / 'd.jsonl')
    check_ledger(log, table, digests(tmp_path / 'imgs', records))  # the answer, and no draft
    filtered = profile in ('azure', 'moonshot')  # their filter refuses the first picture
    assert (report.ok, report.failed) == (N - filtered, filtered)
    assert dict(report.causes) == ({'refusal': 1} if filtered else {})
    assert [
        note for note, part in zip(report.notes, NOTES.get(profile, []), strict=True) if part not in note
    ] == []
    refusals = Counter(e['kind'] for e in log if e['kind'] not in ('good', 'status-429', 'status-503'))
    assert sum(refusals.values()) <= 3, 'what a server refuses is remembered'
    assert report.prompt_tokens > 0 and (table[table.status == 'ok'].cost > 0).all()


@pytest.mark.parametrize('profile', IMPOSSIBLE)
def test_one_clear_line_where_nothing_can_be_described(tmp_path, profile):
    records = pictures(tmp_path / 'imgs', N)
    with serving(tmp_path / 'server', profile=profile) as server:
        with pytest.raises(UserError, match=IMPOSSIBLE[profile]) as e:
            describe(records, server.client(), tmp_path / 'd.jsonl', images_dir=tmp_path / 'imgs', **QUICK)
        assert len(server.log()) <= 12
    assert '\n' not in str(e.value)


def test_a_thinking_model_with_room_to_think(tmp_path):
    records = pictures(tmp_path / 'imgs', N)
    go = dict(images_dir=tmp_path / 'imgs', **QUICK)
    with serving(tmp_path / 'server', profile='thinking') as server:
        with pytest.raises(UserError, match='retry_failed'):
            describe(records, server.client(), tmp_path / 'd.jsonl', **go)
        more = dict(max_tokens=4000, retry_failed=True)  # as the line says
        assert describe(records, server.client(), tmp_path / 'd.jsonl', **go, **more).ok == N
    of = digests(tmp_path / 'imgs', records)
    for row in read_journal(tmp_path / 'd.jsonl').itertuples():
        assert row.identity == description(of[row.image])['identity']  # and not its draft


def test_a_run_that_goes_on_is_not_ended_by_its_first_pictures(tmp_path):
    "The last pictures may be the difficult ones: the server is known to do well."
    records, go = pictures(tmp_path / 'imgs', N), dict(images_dir=tmp_path / 'imgs', retries=0, **QUICK)
    with serving(tmp_path / 'server', always='refusal', good_first=2) as server:
        assert describe(records, server.client(), tmp_path / 'd.jsonl', limit=2, **go).ok == 2
        report = describe(records, server.client(), tmp_path / 'd.jsonl', **go)
    assert (report.skipped, report.failed, report.stopped) == (2, N - 2, None)


@pytest.mark.parametrize(
    'profile', ['mistral', 'tool-call', 'odd-usage', 'answer-is-text', 'plain-text', 'tool-part', 'azure']
)
def test_batches_of_every_form(tmp_path, profile):
    records = pictures(tmp_path / 'imgs', N)
    with serving(tmp_path / 'server', profile=profile) as server:
        go = dict(images_dir=tmp_path / 'imgs', prices=(1.0, 4.0), **BATCH)
        report = describe_batch(records, server.client(), tmp_path / 'b.jsonl', **go)
    assert (report.ok, report.failed) == (N - (profile == 'azure'), profile == 'azure')


def test_a_guess_does_not_outlive_the_second_picture(tmp_path):
    "One request is refused without a reason: all others of the batch have their schema."
    records = pictures(tmp_path / 'imgs', N)
    with serving(tmp_path / 'server', profile='refuses-once') as server:
        go = dict(images_dir=tmp_path / 'imgs', **BATCH)
        report = describe_batch(records, server.client(), tmp_path / 'b.jsonl', **go)
    assert (report.ok, report.requests, report.notes) == (N, 3, [])  # the first twice, the second once


def test_bad_lines_never_block_a_batch_that_is_paid_for(tmp_path):
    "Each line of the output file is damaged in another way at first; every image has its line in the end."
    records = pictures(tmp_path / 'imgs', 9)
    damage = [
        lambda line: 'no JSON',
        lambda line: '[1, 2]',
        lambda line: line.replace('"custom_id"', '"other"'),
        lambda line: line[:50],
        lambda line: line.replace('"body": {', '"body": {"choices": 5, "x": {', 1) + '}',
        lambda line: '[' * 100_000,
        lambda line: line.replace('"response": {', '"response": null, "x": {', 1),
        lambda line: '{"custom_id": 5}',
    ]
    with serving(tmp_path / 'server') as server:
        client = server.client()
        content, seen = client.files.content, []

        async def damaged(name):
            lines = (await content(name)).text.split('\n')
            seen.append(name)
            if len(seen) > 1:
                return type('File', (), {'text': '\n'.join(lines)})
            return type(
                'File', (), {'text': '\n'.join(f(line) for f, line in zip(damage, lines, strict=True))}
            )

        client.files.content = damaged
        report = describe_batch(records, client, tmp_path / 'b.jsonl', images_dir=tmp_path / 'imgs', **BATCH)
    assert (report.ok, report.failed, len(seen)) == (9, 0, 2) and report.rejected['server'] == 8


WORDS = {
    'text': (b'{"error": "the words"}', 'application/json'),
    'detail': (b'{"detail": "the words"}', 'application/json'),
    'errors': (b'{"errors": [{"message": "the words"}]}', 'application/json'),
    'plain': (b'the words', 'text/plain'),
    'page': (b'<html><h1>the words</h1></html>', 'text/html'),
    'list': (b'[{"error": {"code": 400, "message": "the words"}}]', 'application/json'),
    'nested': (b'{"error": {"message": "{\\"detail\\": \\"the words\\"}"}}', 'application/json'),
}


def answering(status, body, kind):
    "A server that gives one answer to every request."

    async def serve(reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b'\r\n\r\n')).decode('latin1').lower()
                await reader.readexactly(int(head.split('content-length: ')[1].split('\r\n')[0]))
                head = f'HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n'
                writer.write(head.encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    return serve


def words_of(tmp_path, status, body, kind, usual):
    "What the user is told."
    records = pictures(tmp_path / 'imgs', 4)

    async def run():
        server = await asyncio.start_server(answering(status, body, kind), '127.0.0.1', 0)
        url = f'http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1'
        more = dict(http_client=openai.DefaultAioHttpClient()) if usual else {}
        async with server, openai.AsyncOpenAI(api_key='k', base_url=url, max_retries=0, **more) as client:
            with pytest.raises(UserError) as e:
                await describe_async(
                    records, client, tmp_path / 'd.jsonl', images_dir=tmp_path / 'imgs', **QUICK
                )
        return str(e.value)

    return asyncio.run(run())


CASES = [
    (200, True),
    (200, False),
    (400, True),
    (400, False),
    *((n, True) for n in (401, 402, 404, 422, 429, 500)),
]


@pytest.mark.parametrize('form', WORDS)
@pytest.mark.parametrize(
    'status,usual', CASES, ids=[f'{n}-{"aiohttp" if usual else "httpx"}' for n, usual in CASES]
)
def test_the_servers_own_words_reach_the_user(tmp_path, status, form, usual):
    said = words_of(tmp_path, status, *WORDS[form], usual)
    assert 'the words' in said and '\n' not in said and 'read images' not in said
    assert status == 200 or str(status) in said


def test_the_models_name_says_nothing_of_images(tmp_path):
    said = words_of(tmp_path, 400, b'{"error": "m-vision is closed today"}', 'application/json', True)
    assert 'refuses every request (HTTP 400: m-vision is closed today)' in said and 'read images' not in said


def test_generalizing_at_every_server(tmp_path):
    captions = ['A man in a red coat.', 'A woman with a bag.']
    for profile in ('vllm', 'gemini', 'tool-call', 'events'):
        with serving(tmp_path / profile, profile=profile, echo='PERSON, ITEM.') as server:
            cache = tmp_path / f'{profile}.jsonl'
            texts = generalize_with(server.client(), captions, model='m', cache=cache, progress=False)
        assert texts == ['PERSON, ITEM.'] * 2 and cache.read_text().count('\n') == 2


@pytest.mark.parametrize(
    'said, left_out',
    [
        ('`temperature` may not be set', {'temperature': None}),
        ('This response_format type is unavailable now', {'mode': 'json_object'}),
        ('the seed server is away', {}),  # an outage: asked again in the same way
        ('JSON service unavailable', {}),
        ('error: JSON parse error in worker', {}),
        ('Internal server error while running m-vision, cannot go on', {}),
        ('json_schema is not available: overloaded, try again later', {}),
        ('seed is not available', {'seed': False}),
        ('`seed` is no longer accepted', {'seed': False}),
        ('Only user and assistant roles are supported!', {'system': False}),
        ("'system' is not one of ['user', 'assistant'] - 'messages.0.role'", {'system': False}),
    ],
)
def test_a_refusal_that_is_called_an_error_of_the_server(said, left_out):
    server = Server(None, RequestForm('m', seed=1, temperature=0, schema={'type': 'object'}))
    sent = server.manner
    assert isinstance(sort_problem(server, sent, 500, said), Transient)
    assert server.manner == sent._replace(**left_out)


@pytest.mark.parametrize('status', [502, 503, 504, 529])
def test_an_outage_is_no_refusal_whatever_it_speaks_of(status):
    server = Server(None, RequestForm('m', seed=1, temperature=0, schema={'type': 'object'}))
    sent = server.manner
    said = 'Failed to load the image: seed, response_format and the system role are not supported'
    assert isinstance(sort_problem(server, sent, status, said), Transient) and server.manner == sent


def test_advice_where_few_pictures_were_asked_about(tmp_path):
    records = pictures(tmp_path / 'imgs', N)
    go = dict(images_dir=tmp_path / 'imgs', **QUICK)
    with serving(tmp_path / 'server', profile='thinking') as server:
        report = describe(records, server.client(), tmp_path / 'd.jsonl', limit=2, **go)
    note = 'all pictures failed for one reason (truncated: the answer reached max_tokens); a thinking model'
    assert report.failed == 2 and report.notes[-1].startswith(note) and report.stopped is None
