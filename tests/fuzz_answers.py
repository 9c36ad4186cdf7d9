"""Whatever a server sends, and whatever stands in a JSONL or an annotation file: a result, or one of our own
errors. Nothing else.

`test_fuzz.py` runs each check a few hundred times, `soak/test_soak_answers.py` for minutes (`make soak`).
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import openai
from hypothesis import strategies as st
from mllm_server import description

from bdam_repro.answers import (
    Description,
    NoAnswer,
    Policy,
    Rejected,
    completion_of,
    error_words,
    parse_answer,
    read_reply,
    whole_objects,
    without_reasoning,
)
from bdam_repro.batchmode import BatchRun, BatchSettings, BatchState, judge_result, load_state, state_path
from bdam_repro.config import UserError
from bdam_repro.describe import estimate_cost, start_run
from bdam_repro.describers import (
    coverage_table,
    failures_by_cause,
    lengths_by_style,
    money_table,
    purity_table,
)
from bdam_repro.generalize import generalize_with
from bdam_repro.journal import Journal, JournalLine, read_journal
from bdam_repro.mllm import History
from bdam_repro.pedes import DATASETS, load_pedes
from bdam_repro.servers import (
    Answer,
    Hopeless,
    Manner,
    Refused,
    RequestForm,
    Server,
    Transient,
    empty_problem,
    request_body,
    retry_after,
    sort_problem,
)

GOOD = json.dumps(description('0'))
COMPLETION = {
    'choices': [{'index': 0, 'finish_reason': 'stop', 'message': {'role': 'assistant', 'content': GOOD}}],
    'usage': {'prompt_tokens': 600, 'completion_tokens': 100},
}
LINE = vars(
    JournalLine(
        '0.png',
        **{k: description('0')[k] for k in ('identity', 'clothing')},
        style=0,
        model='m',
        seed=0,
        prompt_hash='abc',
        tries=1,
        tokens={'prompt': 600, 'completion': 100},
        cost=0.1,
        latency=1.0,
        status='ok',
    )
)
MESSAGES = [
    {'role': 'system', 'content': 'Be brief.'},
    {
        'role': 'user',
        'content': [{'type': 'text', 'text': 'Who?'}, {'type': 'image_url', 'image_url': {'detail': 'low'}}],
    },
]

# ---- what may come --------------------------------------------------------------------------------

NAMES = [
    *(
        'choices',
        'message',
        'content',
        'finish_reason',
        'usage',
        'prompt_tokens',
        'completion_tokens',
        'error',
    ),
    *(
        'errors',
        'detail',
        'code',
        'text',
        'delta',
        'reasoning_content',
        'tool_calls',
        'function',
        'arguments',
    ),
    *('refusal', 'type', 'identity', 'clothing', 'image', 'status', 'tokens', 'cost', 'prompt', 'completion'),
    *('style', 'seed', 'tries', 'custom_id', 'response', 'body', 'status_code', 'key', 'by'),
]
WORDS = [
    *(GOOD, GOOD[:-9], '{', '}', '[', ']', '"', ':', ',', '\\', '\n', '\x00', '\u2028', '\ud800', '\ufeff'),
    *('<think>', '</think>', '[THINK]', '```json', 'data: ', '[DONE]', '<html>', 'NaN', '1e999', '9' * 5000),
    *('null', "I'm sorry, I can't", 'HTTP 400', 'seed', 'system role', 'response_format', 'image', 'length'),
    *('not supported', 'try again in 1m2.5s', 'sk-abcdefgh', '://', 'ok', 'failed', 'a.png', 'b.png'),
    *('{"a":' * 2000, '[' * 5000, '{"', '{"identity": 1, "identity": 2}'),
]
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=8).map(''.join)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.sampled_from([10**400, -1, float('nan'), float('inf'), 'ok', 'stop', 'length'])
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | texts, inner, max_size=5)
    ),
    max_leaves=12,
)


@st.composite
def damaged(draw, original):
    "A JSON value of which up to three parts are something else, are missing, or stand there too much."
    value = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(list(keys)))
            go_on = isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans())
            if not go_on:
                break
            place = place[key]
        if not isinstance(place, (dict, list)) or not place:
            continue
        what = draw(st.sampled_from(['replace', 'remove', 'add']))
        if what == 'replace':
            place[key] = draw(values)
        elif what == 'remove':
            del place[key]
        elif isinstance(place, dict):
            place[draw(st.sampled_from(NAMES))] = draw(values)
        else:
            place.append(draw(values))
    return value


@st.composite
def damaged_bytes(draw, original):
    "Bytes of which some are cut, changed, doubled or put in."
    raw = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        i, j = sorted(draw(st.lists(st.integers(0, len(raw)), min_size=2, max_size=2)))
        what = draw(st.sampled_from(['cut', 'double', 'insert', 'end']))
        if what == 'cut':
            del raw[i : min(j, i + 40)]
        elif what == 'double':
            raw[i:i] = raw[i:j]
        elif what == 'insert':
            raw[i:i] = draw(st.binary(max_size=4) | texts.map(lambda t: t.encode('utf-8', 'surrogatepass')))
        else:
            del raw[i:]
    return bytes(raw[:200_000])


as_text = st.one_of(values, damaged(COMPLETION)).map(lambda v: json.dumps(v))
events = st.lists(damaged({'choices': [{'delta': {'content': 'x'}}]}), max_size=4).map(
    lambda chunks: '\n\n'.join(f'data: {json.dumps(c)}' for c in chunks)
)
answers = st.one_of(values, damaged(COMPLETION), as_text, events, texts)
lines = st.one_of(
    damaged(LINE).map(lambda v: json.dumps(v).encode()),
    damaged(LINE).map(lambda v: json.dumps(v, ensure_ascii=False).encode('utf-8', 'surrogatepass')),
    values.map(lambda v: json.dumps(v).encode()),
    damaged_bytes(json.dumps(LINE).encode()),
    st.sampled_from([json.dumps(LINE | {'image': f'{n}.png'}).encode() for n in 'abc']),
)
journals = st.builds(
    lambda parts, end: b'\n'.join(parts) + end, st.lists(lines, max_size=4), st.sampled_from([b'', b'\n'])
)
batch_results = st.one_of(
    st.none(),
    damaged({'custom_id': '0.png', 'response': {'status_code': 200, 'body': COMPLETION}, 'error': None}),
).filter(lambda r: r is None or isinstance(r, dict))

# ---- what must hold -------------------------------------------------------------------------------


def check_reason(reason):
    assert isinstance(reason, str) and ':' in reason and len(reason) <= 200


def check_answer(said):
    "Any answer: described, rejected with a reason, or `NoAnswer` with one line."
    words = error_words(said)
    assert isinstance(words, str) and '\n' not in words
    try:
        reply = read_reply(completion_of(said))
    except NoAnswer as e:
        assert '\n' not in str(e)
        server = Server(None, RequestForm('m', schema={}))
        server.client = SimpleNamespace(api_key='a-long-key')
        problem = empty_problem(server, server.manner, e)
        assert isinstance(problem, (Transient, Refused, Hopeless)) and '\n' not in str(problem)
        return
    for count in (reply.prompt_tokens, reply.completion_tokens):
        assert count is None or (isinstance(count, int) and count >= 0)
    history = History()
    found = history.judge(Answer(reply, 1, 1), Policy(), 'a-long-key')
    assert isinstance(found, Description) or check_reason(history.reason) is None
    assert (
        History.model_validate_json(history.model_dump_json()).tries == 1
    )  # it can be kept in a batch's state


def check_text(text):
    "Any text of a model."
    assert '<think>' not in without_reasoning(text)
    assert all(isinstance(o, dict) for o in whole_objects(text).whole)
    try:
        assert isinstance(parse_answer(text), Description)
    except Rejected as e:
        assert ':' in str(e)


def check_refusal(code, said):
    """Any words of any status: sorted into three, and however a server refuses, there is an end to asking
    differently."""
    server = Server(SimpleNamespace(api_key='a-long-key'), RequestForm('m', 100, 0, 0.7, {}))
    assert 0 <= retry_after({}, said) < 1e7
    for _ in range(12):
        sent = server.manner
        body = request_body(server.form, sent, MESSAGES)
        json.dumps(body)
        problem = sort_problem(server, sent, code, said)
        assert isinstance(problem, (Transient, Refused, Hopeless))
        if server.manner == sent:
            return
    raise AssertionError(f'asked in twelve ways: {said!r}')


def check_journal(raw):
    "Any file: it is gone on with, or `UserError` and it stands there as it was."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'd.jsonl'
        path.write_bytes(raw)
        try:
            table = read_journal(path)
            for make in (failures_by_cause, coverage_table, purity_table, lengths_by_style, money_table):
                make(table)
            estimate_cost(['0.png', 'x.png'], path, prices=(1, 1), images_dir=Path(folder), model='m')
        except UserError as e:
            assert '\n' not in str(e)
        for retry_failed in (False, True):
            before = path.read_bytes()
            try:
                with Journal(
                    path, ['0.png', 'a.png', 'b.png', 'c.png', 'x.png'], retry_failed=retry_failed
                ) as journal:
                    assert journal.cost >= 0 and journal.largest_prompt >= 0
                    if 'x.png' not in journal.done:
                        journal.append(JournalLine('x.png', status='failed', reason='a: b'))
            except UserError as e:
                assert '\n' not in str(e) and path.read_bytes() == before
            else:
                assert 'x.png' in set(read_journal(path).image)


def check_batch(results):
    "Any lines of a batch that is paid for: an image is described, failed, or goes into the next round."
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(Path(folder) / 'd.jsonl', map(str, range(9))) as journal,
    ):
        s = BatchSettings(model='m', images_dir=Path(folder), retries=1, prices=(1, 1), progress=False)
        run = start_run(SimpleNamespace(api_key='a-long-key'), journal, s.online())
        b = BatchRun(run, s, Path(folder) / 'd.jsonl', BatchState())
        for i, result in enumerate(results):
            judge_result(b, str(i), result)
            assert (str(i) in journal.done) != (str(i) in b.state.history)
        b.save()


def check_state(raw):
    "Any state file of batches."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'd.jsonl'
        state_path(out).write_bytes(raw)
        try:
            state = load_state(out, ['m', '0'])
            assert state.manner == () or isinstance(state.manner, Manner)
        except UserError as e:
            assert '\n' not in str(e)


STATE = json.dumps(
    {
        'asked': ['m', '0'],
        'manner': ['text', 'max_tokens', 0.7],
        'parts': [{'name': 'a', 'images': ['0.png']}],
        'history': {'0.png': [1, 2, 3, '{}', 'json: no']},
        'created': 1,
        'started': 'x',
    }
).encode()
CLIENT = openai.AsyncOpenAI(api_key='a-long-key')
KEPT = json.dumps({'key': 'abc', 'by': 'm', 'text': 'A PERSON.'}).encode()


def check_kept(raw):
    """Any file of rewritten captions: what is no answer is asked again (here: nothing is, for want of
    captions)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'kept.jsonl'
        path.write_bytes(raw)
        assert generalize_with(CLIENT, [], model='m', cache=path, progress=False) == []
        assert path.read_bytes().startswith(raw)


SPLITS = 'train', 'train', 'train', 'val', 'test'
FILES = [f'a/{n}.jpg' for n in range(len(SPLITS))]
ROWS = [
    {'id': n, 'split': split, 'file_path': file, 'img_path': file, 'captions': ['A man.', f'Bag {n}.']}
    for n, (split, file) in enumerate(zip(SPLITS, FILES, strict=True))
]
NOTED = {'image': 'a/1.jpg', 'identity': 'A man.', 'clothing': 'A coat.'}


def as_files(original):
    "A JSON file damaged in its values or in its bytes."
    text = json.dumps(original).encode()
    return st.just(text) | damaged(original).map(lambda v: json.dumps(v).encode()) | damaged_bytes(text)


def is_read(name, raw, noted):
    "Whether an annotation file, and descriptions beside it, make a dataset with its report; else one line."
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / DATASETS[name]['title']
        (base / 'imgs').mkdir(parents=True)
        (base / DATASETS[name]['files'][0]).write_bytes(raw)
        if noted is not None:
            (base / 'descriptions.jsonl').write_bytes(noted)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                load_pedes(name, folder).check(images=False)
        except UserError as e:
            assert '\n' not in str(e) and len(str(e)) > 20
            return False
    return True


def check_annotations(name, raw, noted):
    "Any annotation file."
    is_read(name, raw, noted)



CHECKS = {
    'annotations': (
        check_annotations,
        (st.sampled_from(sorted(DATASETS)), as_files(ROWS), st.none() | as_files(NOTED)),
    ),
    'answer': (check_answer, (answers,)),
    'text': (check_text, (texts,)),
    'refusal': (check_refusal, (st.integers(100, 599), texts)),
    'journal': (check_journal, (journals,)),
    'batch': (check_batch, (st.lists(batch_results, max_size=4),)),
    'state': (
        check_state,
        (damaged_bytes(STATE) | damaged(json.loads(STATE)).map(lambda v: json.dumps(v).encode()),),
    ),
    'kept': (
        check_kept,
        (damaged_bytes(KEPT + b'\n' + KEPT) | values.map(lambda v: json.dumps(v).encode()),),
    ),
}
