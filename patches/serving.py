"""The server of LMDeploy keeps its promises: seeds, stop words, log-probabilities and tool fields
work without an option, every wrong request gets a reason, and nothing that a client sends can stop
the engine. One function for each symbol; what they do is in serving_app.py (HTTP),
serving_checks.py (requests) and stop_text.py (stop words).
"""
import asyncio
import copy
import json
import logging
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager

import numpy as np
import torch

from . import serving_app, serving_checks
from .cpu_threads import release_team
from .stop_text import StopText
from .upstream import Patch, exchange, look_at, refuse

ARGUMENTS = "lmdeploy.cli.utils.ArgumentHelper"
OPENAI = "lmdeploy.serve.openai"
SERVER = f"{OPENAI}.api_server"
ENGINE = "lmdeploy.serve.core.async_engine.AsyncEngine"
ENGINE_PROCESS = "lmdeploy.pytorch.engine.mp_engine.zmq_engine.ZMQMPEngine"
MAX_GRAMMAR_SECONDS = 10
MAX_GRAMMAR_CACHE = 64 * 2**20  # bytes
TURNS = 20  # of the event loop, in which a first token reaches its reader
# Seconds that nobody minds to wait. In the thread a step is slower, so that a limit close to usual
# steps would keep them there.
SHORT_STEP = 0.025
PRIME = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64


def patches() -> list[Patch]:
    """All of this file, checked and not applied."""
    with quiet_import():
        import lmdeploy.serve.parsers  # noqa: F401
    return [
        model_folder(), server_command(), chat_command(), chat_input(), chat_pipeline(),
        logprobs_option(), tool_option(), operator_option(),
        parser_tags(),
        page(), exits(), routes(), errors_of_the_app(), keys(), error_body(),
        session(), chat_request(), completion_request(), any_request(), perplexity(), scores(),
        grammar(), stop_words(), generation(), token_probabilities(), sampler(), forward(),
        engine_process(),
    ]


@contextmanager
def quiet_import():
    """LMDeploy warns of a package that only another model's answers need."""
    logger = logging.getLogger("lmdeploy")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---- Command line --------------------------------------------------------------------------------

def model_folder() -> Patch:
    """`get_model` asks the hub for every path that is not there, and fails with its stack trace."""
    symbol = "lmdeploy.utils.get_model"
    original = look_at(symbol, parameters=[
        "pretrained_model_name_or_path", "download_dir", "revision", "token"])

    def get_model(pretrained_model_name_or_path: str, *args, **kwargs):
        from huggingface_hub.errors import HfHubHTTPError

        path = pretrained_model_name_or_path
        if path.count("/") != 1 or path.startswith((".", "/", "~")) or path.endswith("/"):
            sys.exit(f"no model in {path}: `python convert_to_transformers.py` makes one in "
                     "Yuanmeng_Models/")
        try:
            return original(path, *args, **kwargs)
        except (OSError, ValueError, HfHubHTTPError):
            sys.exit(f"no folder {path} here, and no hub that has it can be reached: "
                     "`python convert_to_transformers.py` makes one in Yuanmeng_Models/")

    return exchange(symbol, "answers a wrong path with a stack trace", get_model)


def server_command() -> Patch:
    """`serve api_server` loads the model before it looks whether the port is free."""
    symbol = "lmdeploy.cli.serve.SubCliServe.api_server"
    original = look_at(symbol, parameters=["args"],
                       contains=["args.server_port if args.server_port is not None else 23333"])

    def api_server(args):
        serving_checks.check_model(args.model_path)
        serving_checks.check_template(args.chat_template)
        port = 23333 if args.server_port is None else args.server_port
        serving_checks.check_port(args.server_name, port)
        return original.__func__(args)

    return exchange(symbol, "finds out late that it cannot start", staticmethod(api_server))


def chat_command() -> Patch:
    """`chat` shows a stack trace for a wrong model or template."""
    symbol = "lmdeploy.cli.cli.CLI.chat"
    original = look_at(symbol, parameters=["args"])

    def chat(args):
        serving_checks.check_model(args.model_path)
        serving_checks.check_template(args.chat_template)
        return original.__func__(args)

    return exchange(symbol, "answers a wrong path with a stack trace", staticmethod(chat))


def chat_input() -> Patch:
    """`chat` ends with a stack trace at the end of its input (Ctrl-D)."""
    symbol = "lmdeploy.cli.chat.input_prompt"
    original = look_at(symbol, parameters=[], contains=["iter(input, sentinel)"])

    def input_prompt() -> str:
        try:
            return original()
        except EOFError:
            print()
            return "exit"

    return exchange(symbol, "does not know Ctrl-D", input_prompt)


def chat_pipeline() -> Patch:
    """`chat` says nothing once the conversation is longer than the model's context."""
    symbol = "lmdeploy.cli.chat.build_pipe"
    original = look_at(symbol, parameters=["model_path", "backend", "trust_remote_code", "kwargs"])

    def build_pipe(*args, **kwargs):
        pipe = original(*args, **kwargs)
        stream_infer = pipe.stream_infer

        def stream(*args, **kwargs):
            for response in stream_infer(*args, **kwargs):
                if response.error_message:
                    print(f"{response.error_message}\nType end to begin a new conversation.")
                yield response

        pipe.stream_infer = stream
        return pipe

    return exchange(symbol, "is silent where a conversation grew too long", build_pipe)


def logprobs_option() -> Patch:
    """`--logprobs-mode`: without it, a request for log-probabilities is refused."""
    return default_of("logprobs_mode", "raw_logprobs", "answers no request for log-probabilities",
                      "log-probabilities that a client may ask for: of the softmax, or logits")


def tool_option() -> Patch:
    """`--tool-call-parser`: without it, a request with tools is refused."""
    return default_of("tool_call_parser", "qwen3", "refuses requests with tools",
                      "how the model writes its calls of tools; qwen3 is JSON in <tool_call>")


def operator_option() -> Patch:
    """`--allow-terminate-by-client` opens one of a dozen endpoints that are no less dangerous."""
    return default_of("allow_terminate_by_client", False, "stands for a single endpoint",
                      "let every client stop, suspend and alter the server: /terminate, /sleep, "
                      "/wakeup, /update_weights and the like")


def parser_tags() -> Patch:
    """`set_parsers` takes each tag for one token. Of a vocabulary that spells <think> it refuses
    the parser of thoughts, and of one that spells </tool_call> it streams only the first call."""
    symbol = "lmdeploy.serve.parsers.response_parser.BaseResponseParser.set_parsers"
    original = look_at(
        symbol, parameters=["cls", "reasoning_parser_name", "tool_parser_name", "tokenizer"],
        contains=["cls.tokenizer = tokenizer", "cls.tool_parser_cls = ToolParserManager.get("],
    ).__func__
    look_at("lmdeploy.serve.parsers.tool_parser.tool_parser.ToolParser.feed_tool_block",
            contains=["self._stable_prefix_end(text, self.tool_close_prefixes, consumed)"])

    def set_parsers(cls, reasoning_parser_name=None, tool_parser_name=None, tokenizer=None):
        names = (reasoning_parser_name, tool_parser_name)
        original(cls, *names)  # without a tokenizer: what it checks and counts is tokens of tags
        vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
        thoughts, tools = cls.reasoning_parser_cls, cls.tool_parser_cls
        if tokenizer is not None and (thoughts is None or {
                thoughts.get_reasoning_open_tag(), thoughts.get_reasoning_close_tag(),
        } <= vocabulary.keys()):
            original(cls, *names, tokenizer)
        tag = tools and tools.get_tool_close_tag()
        if tag and tag not in vocabulary and not cls.tool_parser_cls.tool_close_prefixes:
            prefixes = tuple(tag[:end] for end in range(len(tag) - 1, 0, -1))
            cls.tool_parser_cls = type(tools.__name__, (tools,), {"tool_close_prefixes": prefixes})

    return exchange(symbol, "takes the tags of tools and thoughts for single tokens",
                    classmethod(set_parsers))


def default_of(option: str, value, reason: str, text: str) -> Patch:
    """An option of the command line with another default and another help."""
    symbol = f"{ARGUMENTS}.{option}"
    original = look_at(symbol, parameters=["parser"], contains=["default="]).__func__

    def add(parser):
        action = original(parser)
        action.default, action.help = value, text
        return action

    return exchange(symbol, reason, staticmethod(add))


# ---- HTTP ----------------------------------------------------------------------------------------

def page() -> Patch:
    """The docs page fetches its script from another continent: without a network it is empty."""
    symbol = f"{SERVER}.FastAPI"
    import fastapi

    if look_at(symbol) is not fastapi.FastAPI:
        raise refuse(symbol, "is not fastapi.FastAPI")
    return exchange(symbol, "serves a docs page that needs the internet", serving_app.make_app)


def exits() -> Patch:
    """`uvicorn.run`: told to stop, it waits for running answers as long as they take."""
    symbol = f"{SERVER}.uvicorn"
    import uvicorn

    if look_at(symbol) is not uvicorn:
        raise refuse(symbol, "is not uvicorn")
    return exchange(symbol, "waits for open connections without end", serving_app.Uvicorn())


def routes() -> Patch:
    """`create_openai_router` offers every client to stop the server or to replace its weights."""
    symbol = f"{OPENAI}.endpoints.router.create_openai_router"
    original = look_at(symbol, parameters=["server_context"], contains=["management.register("])

    def create_openai_router(server_context):
        return serving_app.close_operator_routes(original(server_context), server_context)

    return exchange(symbol, "lets every client stop or alter the server", create_openai_router,
                    also=[f"{OPENAI}.endpoints.create_openai_router",
                          f"{SERVER}.create_openai_router"])


def errors_of_the_app() -> Patch:
    """`mount_metrics` is called once the routes are there, and before the keys are asked for."""
    symbol = f"{SERVER}.mount_metrics"
    original = look_at(symbol, parameters=["app", "backend_config"])

    def mount_metrics(app, backend_config) -> None:
        original(app, backend_config)
        serving_app.add_error_handlers(app)

    return exchange(symbol, "leaves errors without a reason", mount_metrics)


def keys() -> Patch:
    """`AuthenticationMiddleware` wants the key for the docs page too, where no browser sends it."""
    symbol = "lmdeploy.serve.utils.server_utils.AuthenticationMiddleware.__call__"
    original = look_at(symbol, parameters=["self", "scope", "receive", "send"])

    def call(self, scope, receive, send):
        if scope["type"] == "http" and scope["path"] in serving_app.WITHOUT_KEY:
            return self.app(scope, receive, send)
        return original(self, scope, receive, send)

    return exchange(symbol, "hides the docs page", call)


def error_body() -> Patch:
    """`create_error_response`: OpenAI's clients look for the reason under `error`."""
    symbol = f"{OPENAI}.errors.create_error_response"
    original = look_at(symbol, parameters=[
        "status", "message", "error_type", "error_code", "param"])

    def create_error_response(status, message: str, *args, **kwargs):
        from fastapi.responses import JSONResponse

        # A client may have sent half of a surrogate pair, which no answer can carry.
        readable = message.encode("utf-8", "backslashreplace").decode()
        response = original(status, readable, *args, **kwargs)
        return JSONResponse({"error": json.loads(response.body)}, response.status_code)

    return exchange(
        symbol, "puts its reason where OpenAI's clients do not look", create_error_response,
        also=[f"{OPENAI}.{module}.create_error_response" for module in (
            "chat_completions.serving", "endpoints.common", "endpoints.completions",
            "endpoints.generate", "endpoints.management", "endpoints.auxiliary")],
    )


# ---- Requests ------------------------------------------------------------------------------------

def session() -> Patch:
    """`ServerContext.create_session`: a session_id that is in use ends in status 500."""
    symbol = f"{SERVER}.ServerContext.create_session"
    original = look_at(symbol, parameters=["self", "user_session_id"])

    def create_session(self, user_session_id: int | None = None):
        from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

        if user_session_id in self.session_manager.user_session_id_map:
            raise RequestError(ErrorCode.REQUEST_CONFLICT,
                               f"session_id {user_session_id} is in use by another request")
        return original(self, user_session_id)

    return exchange(symbol, "fails where two requests have one session_id", create_session)


def chat_request() -> Patch:
    """`check_request` of chats passes over what the engine does not do."""
    symbol = f"{OPENAI}.chat_completions.validation.check_request"
    original = look_at(symbol, parameters=["request", "server_context", "json_request"])

    def check_request(request, server_context, json_request=None) -> str:
        return (serving_checks.fault_in_chat(request)
                or original(request, server_context, json_request))

    return exchange(symbol, "accepts what it then leaves out", check_request,
                    also=[f"{OPENAI}.chat_completions.serving.check_request"])


def completion_request() -> Patch:
    """`check_request` of text completions, likewise."""
    symbol = f"{OPENAI}.endpoints.completions.check_request"
    original = look_at(symbol, parameters=["request", "server_context"])

    def check_request(request, server_context) -> str:
        return (serving_checks.fault_in_completion(request)
                or original(request, server_context))

    return exchange(symbol, "accepts what it then leaves out", check_request)


def any_request() -> Patch:
    """`AsyncEngine.preprocess` is where requests of all endpoints pass before they are run. A token
    or a number out of range would stop the engine, for all clients and for good."""
    symbol = f"{ENGINE}.preprocess"
    original = look_at(symbol, contains=["input_ids: list | None = None,",
                                         "raise RequestError(ErrorCode.PREPROCESS_FAILED) from e"])
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    async def preprocess(self, messages, session_id, gen_config=None, **kwargs):
        from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

        gen_config = copy.copy(gen_config)  # the caller may use it again
        try:
            serving_checks.check_input(self, messages, kwargs.get("input_ids"))
            serving_checks.check_generation(self, gen_config)
        except ValueError as error:
            self.session_mgr.remove(session_id)
            raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from error
        try:
            request = await original(self, messages, session_id, gen_config, **kwargs)
        except RequestError as error:
            if error.code is not ErrorCode.PREPROCESS_FAILED or error.__cause__ is None:
                raise
            reason = f"the chat template refuses the messages: {error.__cause__}"
            raise RequestError(ErrorCode.INVALID_REQUEST, reason) from error
        serving_checks.fit(self, request)
        try:
            await compile_grammar(self, request.gen_config.response_format, worker)
        except ValueError as error:
            self.session_mgr.remove(session_id)
            raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from error
        return request

    return exchange(symbol, "lets a wrong number stop the engine", preprocess)


async def compile_grammar(engine, response_format: dict | None, worker: ThreadPoolExecutor) -> None:
    """Compile what an answer must look like before the engine asks for it, which then finds it in
    the compiler's cache. Some patterns take minutes; the engine would keep everybody waiting.

    Raises:
        ValueError: it takes too long, or cannot be compiled.
    """
    agent = getattr(getattr(engine.engine, "executor", None), "model_agent", None)
    manager = getattr(agent, "guided_decoding_manager", None)  # elsewhere in another process
    if not response_format or manager is None:
        return

    def work() -> None:
        from lmdeploy._guided_decoding import compile_response_format

        if manager.compiler.get_cache_size_bytes() > MAX_GRAMMAR_CACHE:
            manager.compiler.clear_cache()
        compile_response_format(manager.compiler, response_format)

    try:
        running = asyncio.get_running_loop().run_in_executor(worker, work)
        await asyncio.wait_for(running, MAX_GRAMMAR_SECONDS)
    except asyncio.TimeoutError:
        raise ValueError("response_format: making a grammar of it takes more than "
                         f"{MAX_GRAMMAR_SECONDS} seconds; simplify it") from None
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"response_format: {error}") from error


def perplexity() -> Patch:
    """`AsyncEngine.async_get_ppl` takes tokens straight to the engine."""
    symbol = f"{ENGINE}.async_get_ppl"
    original = look_at(symbol, parameters=["self", "input_ids"])

    async def async_get_ppl(self, input_ids: list[int]) -> float:
        serving_checks.check_ids(self, input_ids)
        return await original(self, input_ids)

    return exchange(symbol, "lets a wrong token stop the engine", async_get_ppl)


def scores() -> Patch:
    """`AsyncEngine.async_get_reward_score`: a model that gives no scores ends in status 500."""
    symbol = f"{ENGINE}.async_get_reward_score"
    original = look_at(symbol, parameters=["self", "input_ids"])

    async def async_get_reward_score(self, input_ids: list) -> list[float]:
        from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

        try:
            return await original(self, input_ids)
        except ValueError as error:
            raise RequestError(ErrorCode.UNSUPPORTED_FEATURE, str(error)) from error

    return exchange(symbol, "fails where the model gives no scores", async_get_reward_score)


# ---- Answers -------------------------------------------------------------------------------------

def grammar() -> Patch:
    """`compile_response_format` permits any number of spaces between the parts of JSON: a small
    model may go on with spaces until its answer is cut off. Here it is one at most."""
    symbol = "lmdeploy._guided_decoding.compile_response_format"
    original = look_at(symbol, parameters=["compiler", "response_format"],
                       contains=["compiler.compile_json_schema(source)"])
    source_of = look_at("lmdeploy._guided_decoding._grammar_source",
                        parameters=["response_format"])

    def compile_response_format(compiler, response_format: dict):
        kind, source = source_of(response_format)
        if kind == "json_schema":
            return compiler.compile_json_schema(source, max_whitespace_cnt=1)
        return original(compiler, with_one_space(response_format))

    return exchange(symbol, "permits endless spaces", compile_response_format,
                    also=["lmdeploy.pytorch.engine.guided_process.compile_response_format"])


def with_one_space(form):
    """A structural tag, in which tools are called, whose JSON has at most one space in a row."""
    if isinstance(form, list):
        return [with_one_space(part) for part in form]
    if not isinstance(form, dict):
        return form
    if form.get("type") == "json_schema" and "style" in form:
        return form | {"max_whitespace_cnt": 1}
    return {name: with_one_space(part) for name, part in form.items()}


def stop_words() -> Patch:
    """`convert_stop_bad_words_to_ids` looks for single tokens that contain a stop word: it stops at
    longer words too, and not at all at a word of several tokens, as most are in Chinese."""
    symbol = "lmdeploy.messages.GenerationConfig.convert_stop_bad_words_to_ids"
    original = look_at(symbol, parameters=["self", "tokenizer"],
                       contains=["tokenizer.indexes_containing_token(word)"])

    def convert(self, tokenizer) -> None:
        words = self.stop_words or []
        special = tokenizer.model.model.get_added_vocab()  # is not in the text, so stop at its id
        self.stop_words = None
        original(self, tokenizer)
        ids = [special[word] for word in words if word in special]
        self.stop_token_ids = list({*(self.stop_token_ids or []), *ids}) or None
        self.stop_words = [word for word in words if word not in special] or None

    return exchange(symbol, "stops at other words, or not at all", convert)


def generation() -> Patch:
    """`AsyncEngine.generate` yields an answer as it grows: here it ends before a stop word."""
    symbol = f"{ENGINE}.generate"
    original = look_at(symbol, parameters=["self", "request", "stream_response"],
                       contains=["finish_reason = ('stop' if outputs.token_ids"])

    async def generate(self, request, stream_response: bool = True):
        config = request.gen_config
        text = StopText(config.stop_words or [], keep=config.include_stop_str_in_output)
        async with aclosing(original(self, request, stream_response)) as results:
            async for result in results:
                ended = result.finish_reason is not None
                result.response = text.feed(result.response or "", last=ended)
                if text.found:
                    result.finish_reason = "stop"
                yield result
                if text.found:
                    return

    return exchange(symbol, "knows no stop word of several tokens", generate)


def token_probabilities() -> Patch:
    """`_create_chat_completion_logprobs` shows how the vocabulary spells tokens (Chinese becomes
    è¿ĺ), and leaves the chosen token out of the likeliest ones."""
    symbol = f"{OPENAI}.chat_completions.logprobs._create_chat_completion_logprobs"
    look_at(symbol, parameters=["tokenizer", "token_ids", "logprobs"],
            contains=["tokenizer.convert_ids_to_tokens(top_id)"])
    return exchange(symbol, "shows tokens as the vocabulary spells them",
                    serving_app.chat_logprobs,
                    also=[f"{OPENAI}.chat_completions.serving._create_chat_completion_logprobs"])


def sampler() -> Patch:
    """`DefaultMultinomialSamplingImpl.forward`, the sampler of all devices but CUDA, ignores the
    seeds. This one draws what the kernel for CUDA draws too: one number for seed and position."""
    symbol = ("lmdeploy.pytorch.backends.default.multinomial_sampling."
              "DefaultMultinomialSamplingImpl.forward")
    look_at(symbol, parameters=["self", "scores", "seeds", "offsets", "indices"],
            contains=["torch.multinomial(scores, num_samples=1, replacement=True)"])

    def sample(self, scores, seeds, offsets, indices=None):
        draws_B = torch.from_numpy(uniform(seeds.cpu().numpy(), offsets.cpu().numpy()))
        sums_BV = scores.double().cumsum(dim=1)
        draws_B1 = draws_B.to(scores.device)[:, None] * sums_BV[:, -1:]
        place_B1 = (sums_BV <= draws_B1).sum(dim=1, keepdim=True)
        # A draw of almost 1 must not land on the tokens that top_k and top_p have ruled out.
        last_B1 = (scores > 0).cumsum(dim=1).argmax(dim=1, keepdim=True)
        place_B1 = torch.minimum(place_B1, last_B1)
        return (place_B1 if indices is None else indices.gather(1, place_B1)).view(-1)

    return exchange(symbol, "ignores the seeds", sample)


def uniform(seeds_B: np.ndarray, offsets_B: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each pair of seed and position, the same one each time: SplitMix64
    (Steele, Lea and Flood 2014) as a function of its counter."""
    x_B = (seeds_B.astype(np.uint64) << np.uint64(32)) ^ offsets_B.astype(np.uint64)
    for _ in range(2):  # once mixes, twice lets go of the pattern that neighbours have
        x_B = x_B * PRIME + PRIME
        x_B = (x_B ^ (x_B >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x_B = (x_B ^ (x_B >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x_B = x_B ^ (x_B >> np.uint64(31))
    return (x_B >> np.uint64(11)).astype(np.float64) * 2.0**-53


def forward() -> Patch:
    """`BaseModelAgent._async_model_forward` computes where the server also answers: on a processor
    nobody is served meanwhile. In a thread it leaves the loop free, as torch does not hold the
    interpreter while it computes. Short steps of decoding stay: to change threads costs 0.3 ms.
    The engine is one step ahead of what it sends; a first token leaves before that step."""
    symbol = "lmdeploy.pytorch.engine.model_agent.agent.BaseModelAgent._async_model_forward"
    original = look_at(symbol, parameters=["self", "inputs", "return_logits", "cache_inputs"],
                       contains=["await self.async_forward(inputs"])
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
    seconds = math.inf  # that the last step of decoding took
    after_prompt = False

    async def model_forward(self, inputs, return_logits: bool, cache_inputs=None):
        nonlocal seconds, after_prompt
        if self.device == "cpu" and after_prompt:
            for _ in range(TURNS):
                await asyncio.sleep(0)
        after_prompt = not inputs.is_decoding
        work = original(self, inputs, return_logits, cache_inputs)
        # A pipeline's loop has a thread of its own already, and so nobody else to serve.
        if self.device != "cpu" or threading.current_thread() is not threading.main_thread():
            return await work
        start = time.perf_counter()
        if inputs.is_decoding and seconds < SHORT_STEP:
            result = await work
        else:
            release_team()
            result = await asyncio.get_running_loop().run_in_executor(worker, run_through, work)
        if inputs.is_decoding:
            seconds = time.perf_counter() - start
        return result

    return exchange(symbol, "blocks the server while the model computes", model_forward)


@torch.inference_mode()
def run_through(coroutine):
    """The result of a coroutine that waits for nothing (it may let others go first)."""
    try:
        while coroutine.send(None) is None:
            pass
    except StopIteration as done:
        return done.value
    finally:
        release_team()
    raise RuntimeError("the forward pass waits for something outside its thread")


# ---- The engine's process ------------------------------------------------------------------------

def engine_process() -> Patch:
    """`ZMQMPEngine._mp_proc`: on a GPU the server's engine has a process of its own, which imports
    LMDeploy afresh and so knows neither the model nor anything else of patches/."""
    symbol = f"{ENGINE_PROCESS}._mp_proc"
    held = look_at(symbol, contains=["engine = Engine.from_pretrained("])
    run_engine.original = held.__func__
    return exchange(symbol, "runs an engine that knows no patches", staticmethod(run_engine))


def run_engine(*args, **kwargs) -> None:
    """What that process runs. It is found by its name there, so it stands outside the patch."""
    from . import register

    register()
    run_engine.original(*args, **kwargs)
