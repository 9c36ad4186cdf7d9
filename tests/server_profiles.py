"""How real OpenAI-compatible servers refuse and answer, for `mllm_server.py`. Each profile says where its
behavior is reported.

A profile changes two things: `refuse` returns `(status, body)` for a request that the server does not
take, and `reply` turns a documented chat completion into what this server sends, as `(body, content
type)`. `n` counts the requests.
"""

import json

JSON = 'application/json'


def sent_detail(request):
    parts = [p for m in request['messages'] if isinstance(m['content'], list) for p in m['content']]
    return any('detail' in p.get('image_url', {}) for p in parts)


def sent_system(request):
    return any(m['role'] == 'system' for m in request['messages'])


def mode(request):
    return request.get('response_format', {}).get('type', 'text')


def message_of(completion):
    return completion['choices'][0]['message']


DRAFT = '{"identity": "A draft that must not be kept, of a person.", "clothing": "A draft as well."}'


class Profile:
    "A server that takes everything and answers as documented."

    def refuse(self, request, n):
        return None

    def reply(self, completion, request):
        return completion, JSON


class Vllm(Profile):
    """vLLM with a model whose template has no system role (vllm-project/vllm#2964,
    huggingface/chat-ui#1386): HTTP 400, `{"object": "error", "message": ..., "code": 400}`.
    `reasoning_content` stands beside the answer."""

    def refuse(self, request, n):
        if sent_system(request):
            words = 'System role not supported'
            return 400, {
                'object': 'error',
                'message': words,
                'type': 'BadRequestError',
                'param': None,
                'code': 400,
            }
        return None

    def reply(self, completion, request):
        message_of(completion)['reasoning_content'] = f'They want JSON. {DRAFT}'
        return completion, JSON


class Thinking(Profile):
    """A thinking model on vLLM without a reasoning parser: the opening tag is a part of the prompt, so
    that the answer holds only the closing one (vllm-project/vllm#31045, QwenLM/Qwen3-VL#1504). It needs
    2,000 tokens to think."""

    def reply(self, completion, request):
        final, thought = message_of(completion)['content'], 'Let me see. {' * 21 + DRAFT
        short = request.get('max_tokens', 9999) < 2000
        message_of(completion)['content'] = thought if short else f'{thought}\n</think>\n\n{final}'
        if short:
            completion['choices'][0]['finish_reason'] = 'length'
        return completion, JSON


class ThinkingInTurns(Profile):
    "It has no room to think: of every other picture the end is missing, of the others the answer."

    def reply(self, completion, request):
        asked = json.dumps(request['messages'][:2])
        self.pictures = [*getattr(self, 'pictures', []), asked]
        turn = list(dict.fromkeys(self.pictures)).index(asked) % 2
        message_of(completion)['content'] = '<think>Let me see.'
        completion['choices'][0]['finish_reason'] = 'length' if turn else 'stop'
        return completion, JSON


class Ollama(Profile):
    """Ollama: thoughts in `reasoning` (ollama/ollama#15288), and HTTP 500 where it cannot make a grammar
    of the schema (bmachek/lrc-ai-assistant#37)."""

    def refuse(self, request, n):
        if mode(request) == 'json_schema':
            return 500, {'error': {'message': 'error parsing grammar', 'type': 'api_error', 'code': None}}
        return None

    def reply(self, completion, request):
        message_of(completion)['reasoning'] = f'The user wants JSON. {DRAFT}'
        return completion, JSON


class LmStudio(Profile):
    """LM Studio: `error` is a text (lmstudio-ai/lmstudio-bug-tracker#189), `json_object` is refused; here
    the schema is, too. The answer comes in a fence (#2403)."""

    def refuse(self, request, n):
        if mode(request) != 'text':
            return 400, {'error': "'response_format.type' must be 'text'"}
        return None

    def reply(self, completion, request):
        message = message_of(completion)
        message['content'] = f'Here it is:\n```json\n{message["content"]}\n```\nAnything else?'
        return completion, JSON


class LlamaCpp(Profile):
    """llama.cpp's server: 503 while it loads the model, and a template's exception is HTTP 500 with
    `code` and `type` (ggml-org/llama.cpp#13566 has the form)."""

    def refuse(self, request, n):
        if n <= 2:
            return 503, {'error': {'code': 503, 'message': 'Loading model', 'type': 'unavailable_error'}}
        if sent_system(request):
            words = 'Jinja Exception: System role not supported'
            return 500, {'error': {'code': 500, 'message': words, 'type': 'server_error'}}
        return None


class LlamaCppText(Profile):
    """llama.cpp's server without a projector: it reads no pictures, and says so with HTTP 500
    (ggml-org/llama.cpp#15377)."""

    def refuse(self, request, n):
        words = (
            'image input is not supported - hint: if this is unexpected, you may need to provide the mmproj'
        )
        return 500, {'error': {'code': 500, 'message': words, 'type': 'server_error'}}


class Sglang(Profile):
    """SGLang with a reasoning parser that takes all of the text for a thought: the schema's JSON stands in
    `reasoning_content`, `content` is null (sgl-project/sglang#14821). It may be a draft, so it is none."""

    def reply(self, completion, request):
        message = message_of(completion)
        message['reasoning_content'], message['content'] = message['content'], None
        return completion, JSON


class Azure(Profile):
    """Azure OpenAI: an older API version knows no `seed` (sinaptik-ai/pandas-ai#749) and no schema
    (danny-avila/LibreChat#8325), and the content filter refuses a picture with HTTP 400 and code
    `content_filter` (here: the first one)."""

    filtered = None

    def refuse(self, request, n):
        if 'seed' in request:
            return 400, {'error': {'message': 'Unrecognized request argument supplied: seed', 'code': None}}
        if mode(request) == 'json_schema':
            words = (
                'response_format value as json_schema is enabled only for api versions 2024-08-01 and later'
            )
            return 400, {'error': {'message': words, 'code': 'BadRequest'}}
        picture = json.dumps(request['messages'][:2])
        self.filtered = self.filtered or picture
        if picture == self.filtered:
            words = (
                "The response was filtered due to the prompt triggering Azure OpenAI's content management"
                ' policy. Please modify your prompt and retry.'
            )
            error = {
                'message': words,
                'type': None,
                'param': 'prompt',
                'code': 'content_filter',
                'status': 400,
            }
            return 400, {'error': error}
        return None


class OpenaiReasoning(Profile):
    """OpenAI's reasoning models: another name for the length, and no temperature but 1 (the error names
    the parameter)."""

    def refuse(self, request, n):
        if 'max_tokens' in request:
            words = (
                "Unsupported parameter: 'max_tokens' is not supported with this model."
                " Use 'max_completion_tokens' instead."
            )
            return 400, {'error': {'message': words, 'param': 'max_tokens', 'code': 'unsupported_parameter'}}
        if request.get('temperature', 1) != 1:
            words = 'Unsupported value: this model only supports the default (1) value.'
            return 400, {'error': {'message': words, 'param': 'temperature', 'code': 'unsupported_value'}}
        return None


class Mistral(Profile):
    """Mistral: an extra field is HTTP 422 with pydantic's list inside `message` (crewAIInc/crewAI#60,
    langchain-ai/langchain-azure#82 for `seed`); a reasoning model's content is a list of parts, thoughts
    among them."""

    def refuse(self, request, n):
        if 'seed' in request:
            extra = {
                'type': 'extra_forbidden',
                'loc': ['body', 'seed'],
                'msg': 'Extra inputs are not permitted',
            }
            return 422, {
                'object': 'error',
                'message': {'detail': [extra]},
                'type': 'invalid_request_error',
                'code': None,
            }
        return None

    def reply(self, completion, request):
        message = message_of(completion)
        thought = {'type': 'thinking', 'thinking': [{'type': 'text', 'text': DRAFT}]}
        message['content'] = [thought, {'type': 'text', 'text': message['content']}]
        return completion, JSON


class Gemini(Profile):
    """Gemini's compatible endpoint: the error is in a list, unknown names are all told at once
    (Vali-98/ChatterUI#227), schema keywords among them (zed-industries/zed#44875); a rate limit says in
    words how long to wait."""

    def refuse(self, request, n):
        unknown = ['seed'] * ('seed' in request)
        unknown += ['additionalProperties'] * (mode(request) == 'json_schema')
        if unknown:
            where = {'seed': '', 'additionalProperties': " at 'generation_config.response_schema'"}
            words = [
                f'Invalid JSON payload received. Unknown name "{u}"{where[u]}: Cannot find field.'
                for u in unknown
            ]
            return 400, [{'error': {'code': 400, 'message': '\n'.join(words), 'status': 'INVALID_ARGUMENT'}}]
        if n % 7 == 0:
            words = 'You exceeded your current quota, please check your plan. Please retry in 0.05s.'
            return 429, [{'error': {'code': 429, 'message': words, 'status': 'RESOURCE_EXHAUSTED'}}]
        return None


class FastApi(Profile):
    """A server on FastAPI that knows no `detail` of an image: HTTP 422, `{"detail": [{"loc": ..., "msg":
    ...}]}`."""

    def refuse(self, request, n):
        if sent_detail(request):
            place = ['body', 'messages', 1, 'content', 1, 'image_url', 'detail']
            return 422, {
                'detail': [{'loc': place, 'msg': 'extra fields not permitted', 'type': 'value_error.extra'}]
            }
        return None


class Cloudflare(Profile):
    """Errors in a list, `{"success": false, "errors": [{"code": ..., "message": ...}]}`, as HTTP 500;
    `temperature` is refused."""

    def refuse(self, request, n):
        if 'temperature' in request:
            return 500, {
                'success': False,
                'errors': [{'code': 5006, 'message': 'temperature is not supported'}],
            }
        return None


class OpenRouter(Profile):
    """A router: HTTP 200 with an `error` and no choices where its provider fails, here at the first two
    requests."""

    def refuse(self, request, n):
        if n <= 2:
            inner = {'raw': '{"error": "upstream is busy"}', 'provider_name': 'x'}
            return 200, {'error': {'message': 'Provider returned error', 'code': 502, 'metadata': inner}}
        return None


class OnlyTwoRoles(Profile):
    """MLC and LM Studio with Mistral's template (mlc-ai/mlc-llm#1681, Mintplex-Labs/anything-llm#2837): no
    system role, in words that do not name it."""

    def refuse(self, request, n):
        if sent_system(request):
            return 500, {'error': 'Only user and assistant roles are supported!'}
        return None


class RoleIsLiteral(Profile):
    """A proxy on FastAPI whose roles are a literal type: HTTP 422 with the place of the message
    (Alishahryar1/free-claude-code#1041 has the form)."""

    def refuse(self, request, n):
        if sent_system(request):
            words = "Input should be 'user' or 'assistant'"
            place = ['body', 'messages', 0, 'role']
            return 422, {'detail': [{'type': 'literal_error', 'loc': place, 'msg': words, 'input': 'system'}]}
        return None


class Moonshot(Profile):
    """Moonshot: a content filter whose name stands in the error's `type` alone (MoonshotAI/kimi-cli#1002);
    here it refuses the first request."""

    def refuse(self, request, n):
        words = 'The request was rejected because it was considered'
        error = {'code': 400, 'message': words, 'param': 'prompt', 'type': 'content_filter'}
        return (400, {'error': error}) if n == 1 else None


class Overloaded(Profile):
    """HTTP 503 that names the model (google-gemini/gemini-cli#7227), here one for images, every third
    time."""

    def refuse(self, request, n):
        words = f'Error: model {request["model"]}-vision is overloaded. Please try again later.'
        return (503, {'error': {'code': 503, 'message': words}}) if n % 3 == 1 else None


class RefusesUnder200(Profile):
    "A gateway that passes on its provider's refusal under HTTP 200, without a code."

    def refuse(self, request, n):
        if mode(request) == 'json_schema':
            return 200, {'error': {'message': 'response_format json_schema is not supported'}}
        return None


class RefusesOnce(Profile):
    "A gateway that refuses the first request and does not say why."

    def refuse(self, request, n):
        return (400, {'error': 'bad request'}) if n == 1 else None


class ToolCall(Profile):
    "A server that makes the schema a tool: `content` is null, the answer is the argument of a tool call."

    def reply(self, completion, request):
        message = message_of(completion)
        function = {'name': 'description', 'arguments': message['content']}
        message |= {'content': None, 'tool_calls': [{'id': '1', 'type': 'function', 'function': function}]}
        completion['choices'][0]['finish_reason'] = 'tool_calls'
        return completion, JSON


class ToolPart(Profile):
    "A proxy of Anthropic: the answer is the input of a tool, as a part of `content`."

    def reply(self, completion, request):
        message = message_of(completion)
        part = {'type': 'tool_use', 'id': '1', 'name': 'description', 'input': json.loads(message['content'])}
        message['content'] = [part]
        return completion, JSON


class Events(Profile):
    "A gateway that streams although nobody asked for it."

    def reply(self, completion, request):
        text = message_of(completion)['content']
        pieces = [text[i : i + 40] for i in range(0, len(text), 40)]
        chunks = [{'choices': [{'index': 0, 'delta': {'content': p}, 'finish_reason': None}]} for p in pieces]
        chunks.append(
            {'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}], 'usage': completion['usage']}
        )
        lines = [f'data: {json.dumps(c)}\n\n' for c in chunks]
        return ''.join([*lines, 'data: [DONE]\n\n']).encode(), 'text/event-stream'


class PlainText(Profile):
    "A gateway that calls its JSON text."

    def reply(self, completion, request):
        return json.dumps(completion).encode(), 'text/plain; charset=utf-8'


class OddUsage(Profile):
    "Tokens that are no numbers: a list, NaN, words."

    def reply(self, completion, request):
        odd = [
            [600, 100],
            {'prompt_tokens': float('nan')},
            {'prompt_tokens': 'many', 'completion_tokens': None},
            'none',
        ]
        completion['usage'] = odd[len(message_of(completion)['content']) % 4]
        return completion, JSON


class AnswerIsText(Profile):
    "`choices` is a list of texts."

    def reply(self, completion, request):
        completion['choices'] = [message_of(completion)['content']]
        return completion, JSON


class WebPage(Profile):
    "The address of a web site in front of the server: HTTP 200 and a page."

    def reply(self, completion, request):
        return b'<!doctype html><html><title>Sign in</title></html>', 'text/html'


PROFILES = {
    'vllm': Vllm,
    'thinking': Thinking,
    'thinking-in-turns': ThinkingInTurns,
    'ollama': Ollama,
    'lmstudio': LmStudio,
    'llama.cpp': LlamaCpp,
    'llama.cpp-text': LlamaCppText,
    'sglang': Sglang,
    'azure': Azure,
    'openai-reasoning': OpenaiReasoning,
    'mistral': Mistral,
    'gemini': Gemini,
    'fastapi': FastApi,
    'cloudflare': Cloudflare,
    'openrouter': OpenRouter,
    'only-two-roles': OnlyTwoRoles,
    'role-is-literal': RoleIsLiteral,
    'moonshot': Moonshot,
    'overloaded': Overloaded,
    'refuses-under-200': RefusesUnder200,
    'refuses-once': RefusesOnce,
    'tool-call': ToolCall,
    'tool-part': ToolPart,
    'events': Events,
    'plain-text': PlainText,
    'odd-usage': OddUsage,
    'answer-is-text': AnswerIsText,
    'web-page': WebPage,
}
