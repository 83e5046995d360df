"""`python lmdeploy_cli.py serve api_server`, asked by the clients that users have.

Tokens are compared with transformers' on the same weights (float32, the likeliest token).
"""
import asyncio
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import pytest
import requests
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lmdeploy", reason="LMDeploy is published for Linux on x86-64 only")

from model import MINI_DIR
from patches import serving, serving_app, serving_checks
from patches.stop_text import StopText

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ["你好", "你是谁？", "李白是谁", "一年有几个季节？", "What is water?", "用一句话介绍北京。",
             "1加1等于几", "写一句关于春天的话"]
MODEL = "yuanmeng"
START_WITHIN = 180  # seconds, on a machine that does much else
LONG = {"max_tokens": 1900, "extra_body": {"ignore_eos": True}, "temperature": 0}


# ---- The server ----------------------------------------------------------------------------------

def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A server in a process of its own, on a port of its own."""

    def __init__(self, log: Path, *options: str):
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "lmdeploy_cli.py", "serve", "api_server", str(MINI_DIR),
                 "--model-name", MODEL, "--dtype", "float32", "--server-port", str(self.port),
                 "--num-gpu-blocks", "600", "--chat-template", "chat_templates.json", *options],
                cwd=ROOT, stdout=output, stderr=output,
            )
        deadline = time.monotonic() + START_WITHIN
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=10).ok
        except requests.ConnectionError:
            return False

    def client(self, kind=openai.OpenAI, key: str = "none"):
        return kind(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def metrics(self) -> dict[str, float]:
        """What /metrics tells, as Prometheus reads it; sums over the labels."""
        from prometheus_client.parser import text_string_to_metric_families

        text = requests.get(f"{self.url}/metrics", timeout=30).text
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    assert server.answers(), server.log.read_text()[-5000:]  # nothing above has stopped it
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MINI_DIR)


@pytest.fixture(scope="module")
def reference(tokenizer):
    """transformers: ids of a prompt → the likeliest continuation, and its log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(MINI_DIR, dtype=torch.float32).eval()

    def generate(ids: list[int], max_new_tokens: int = 48) -> tuple[list[int], torch.Tensor]:
        output = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None,
            output_logits=True, return_dict_in_generate=True,
        )
        new = output.sequences[0, len(ids):].tolist()
        logprobs = torch.cat(output.logits).log_softmax(-1)
        ended = new[-1] == tokenizer.eos_token_id
        return new[:-1] if ended else new, logprobs

    return generate


@pytest.fixture(scope="module")
def prompt_ids(tokenizer):
    def ids(question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)

    return ids


def ask(client, question: str, **settings):
    """One answer, not streamed; the likeliest tokens unless told otherwise."""
    settings = {"max_tokens": 48, "temperature": 0} | settings
    return client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], **settings)


# ---- What it is asked for ------------------------------------------------------------------------

def test_models_and_a_docs_page_that_needs_no_internet(server, client):
    assert [model.id for model in client.models.list()] == [MODEL]
    page = requests.get(server.url, timeout=30).text
    parts = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(parts) == 3 and all(part.startswith("/docs/") for part in parts)
    assert all(requests.get(server.url + part, timeout=30).ok for part in parts)
    paths = requests.get(f"{server.url}/openapi.json", timeout=30).json()["paths"]
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/health"} <= set(paths)


def test_it_listens_to_this_computer_only(server):
    """As another computer would see it: on the address of the network card there is nobody."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; tells the address in use
        address = probe.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(ConnectionError):
        socket.create_connection((address, server.port), timeout=10)


def test_chats_are_transformers_token_for_token(client, tokenizer, reference, prompt_ids):
    for question in QUESTIONS[:4]:
        expected, _ = reference(prompt_ids(question))
        answer = ask(client, question, extra_body={"return_token_ids": True})
        choice = answer.choices[0]
        assert choice.output_ids == expected
        assert choice.message.content == tokenizer.decode(expected)
        assert choice.finish_reason == ("length" if len(expected) == 48 else "stop")
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            len(prompt_ids(question)), len(expected))
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_says_the_same_in_pieces(client):
    question = QUESTIONS[1]
    whole = ask(client, question)
    chunks = list(ask(client, question, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 5
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == (
        whole.choices[0].finish_reason)


def test_many_clients_at_once_get_what_one_gets(server, tokenizer, reference, prompt_ids):
    expected = {q: tokenizer.decode(reference(prompt_ids(q))[0]) for q in QUESTIONS}

    async def one(client, question: str) -> str:
        text = ""
        async for chunk in await ask(client, question, stream=True):
            text += chunk.choices[0].delta.content or ""
        return text

    async def all_of_them() -> list[str]:
        async with server.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, q) for q in QUESTIONS * 2))

    assert asyncio.run(all_of_them()) == [expected[q] for q in QUESTIONS * 2]


def test_text_completions(client, tokenizer, reference):
    prompts = ["春天来了，", "The capital of France"]
    expected = [tokenizer.decode(reference(tokenizer.encode(p, add_special_tokens=False), 24)[0])
                for p in prompts]
    settings = {"model": MODEL, "max_tokens": 24, "temperature": 0}
    both = client.completions.create(prompt=prompts, **settings)
    assert [choice.text for choice in both.choices] == expected
    assert [choice.index for choice in both.choices] == [0, 1]
    stream = client.completions.create(prompt=prompts[0], stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_ends_before_a_stop_word_of_any_length(client, tokenizer, streamed):
    text = ask(client, QUESTIONS[2]).choices[0].message.content
    word = text[6:11]  # several characters, and as many tokens or more
    assert len(tokenizer.encode(word, add_special_tokens=False)) > 1
    stop = {"stop": ["this is not in it", word]}
    if streamed:
        chunks = list(ask(client, QUESTIONS[2], stream=True, **stop))
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = ask(client, QUESTIONS[2], **stop).choices[0]
        answer, reason = choice.message.content, choice.finish_reason
    assert (answer, reason) == (text[:text.index(word)], "stop")
    kept = ask(client, QUESTIONS[2], **stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == answer + word


@given(st.text("ab。", max_size=30), st.lists(st.text("ab。", min_size=1, max_size=4), max_size=3),
       st.lists(st.integers(0, 30)), st.booleans())
def test_stop_words_are_found_wherever_the_pieces_break(text, words, cuts, keep):
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    stop, shown = StopText(words, keep), ""
    for number, piece in enumerate(pieces):
        shown += stop.feed(piece, last=number == len(pieces) - 1)
        if stop.found:
            break
    first = min((text.find(word) for word in words if word in text), default=None)
    assert stop.found == (first is not None)
    if first is None:
        assert shown == text
    elif keep:
        assert text.startswith(shown) and any(shown.endswith(word) for word in words)
    else:
        assert shown == text[:first]


def test_one_seed_gives_one_answer_and_others_give_others(server):
    async def answers(*seeds: int) -> list[str]:
        async with server.client(openai.AsyncOpenAI) as client:
            replies = await asyncio.gather(*(
                ask(client, QUESTIONS[7], seed=seed, temperature=1, max_tokens=24)
                for seed in seeds))
        return [reply.choices[0].message.content for reply in replies]

    first = asyncio.run(answers(*range(6)))
    assert asyncio.run(answers(*range(5, -1, -1)))[::-1] == first  # among others, in other places
    assert asyncio.run(answers(3)) == [first[3]]  # and alone
    assert len(set(first)) >= 3


def test_the_sampler_draws_as_often_as_the_probabilities_say():
    draws = 20_000
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).expand(draws, -1)
    seeds = torch.arange(draws) % 7
    offsets = torch.arange(draws)
    from lmdeploy.pytorch.backends.default.multinomial_sampling import (
        DefaultMultinomialSamplingImpl,
    )

    import patches

    patches.register()
    indices = torch.tensor([40, 30, 20, 10, 0]).expand(draws, -1)
    chosen = DefaultMultinomialSamplingImpl().forward(probabilities, seeds, offsets, indices)
    counts = torch.bincount(chosen // 10, minlength=5).flip(0) / draws
    assert counts[4] == 0 and torch.allclose(counts, probabilities[0], atol=0.015)
    # Neighbours in seed or position are not alike.
    first = serving.uniform(np.zeros(draws, np.int64), np.arange(draws))
    second = serving.uniform(np.ones(draws, np.int64), np.arange(draws))
    for a, b in ((first, second), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert np.histogram(first, 10, (0, 1))[0].min() > draws / 10 * 0.9


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities_are_those_of_the_softmax(
    client, tokenizer, reference, prompt_ids, streamed
):
    expected, logprobs = reference(prompt_ids(QUESTIONS[1]), 12)
    options = {"logprobs": True, "top_logprobs": 3, "max_tokens": 12}
    if streamed:
        content = [token for chunk in ask(client, QUESTIONS[1], stream=True, **options)
                   if chunk.choices[0].logprobs
                   for token in chunk.choices[0].logprobs.content]
    else:
        content = ask(client, QUESTIONS[1], **options).choices[0].logprobs.content
    assert len(content) == len(expected)
    spelt = b"".join(bytes(token.bytes) for token in content)
    assert spelt.decode() == tokenizer.decode(expected)
    for token, chosen, row in zip(content, expected, logprobs, strict=False):
        best = row.topk(3)
        assert token.logprob == pytest.approx(row[chosen].item(), abs=1e-3)
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-3)
        assert token.top_logprobs[0].token == token.token  # the likeliest was chosen


# ---- JSON, tools, LangChain ----------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8},
                   "age": {"type": "integer", "minimum": 0, "maximum": 150},
                   "kind": {"enum": ["人", "猫"]}},
    "required": ["name", "age", "kind"], "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_follows_a_json_schema(client, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "someone", "schema": SCHEMA}}
    for seed in range(3):
        reply = ask(client, "介绍一个人", response_format=form, temperature=temperature, seed=seed,
                    max_tokens=120)
        value = json.loads(reply.choices[0].message.content)
        assert set(value) == {"name", "age", "kind"} and value["kind"] in ("人", "猫")
        assert 0 <= value["age"] <= 150 and len(value["name"]) <= 8
    pattern = {"type": "regex_schema", "regex_schema": "[0-9]{4}-[0-9]{2}"}
    reply = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "哪一年"}], temperature=temperature,
        extra_body={"response_format": pattern})
    assert re.fullmatch(r"\d{4}-\d{2}", reply.choices[0].message.content)


TOOL = {"type": "function", "function": {
    "name": "weather", "description": "the weather in a city",
    "parameters": {"type": "object", "required": ["city"],
                   "properties": {"city": {"type": "string", "maxLength": 6}}}}}


def test_tool_fields(client):
    free = ask(client, "你好", tools=[TOOL]).choices[0]
    assert free.message.content == ask(client, "你好").choices[0].message.content
    forced = ask(client, "北京天气", tools=[TOOL], tool_choice="required", max_tokens=200,
                 temperature=1, seed=1).choices[0]
    assert forced.finish_reason == "tool_calls"
    for call in forced.message.tool_calls:
        assert call.function.name == "weather" and "city" in json.loads(call.function.arguments)
    history = [{"role": "user", "content": "你好"},
               {"role": "assistant", "content": None, "tool_calls": [
                   {"id": "1", "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "北京"}'}}]}]
    reply = client.chat.completions.create(model=MODEL, messages=history, max_tokens=4)
    assert reply.usage.completion_tokens >= 1


def test_langchain(server, client):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model=MODEL, temperature=0,
                      max_tokens=120, max_retries=0)
    expected = ask(client, QUESTIONS[0], max_tokens=120).choices[0].message.content
    reply = chat.invoke(QUESTIONS[0])
    assert reply.content == expected and reply.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(QUESTIONS[0])) == expected
    assert chat.bind_tools([TOOL]).invoke(QUESTIONS[0]).content == expected
    form = {"title": "someone", **SCHEMA}
    value = chat.with_structured_output(form, method="json_schema").invoke("介绍一个人")
    assert set(value) == {"name", "age", "kind"}


# ---- Wrong requests ------------------------------------------------------------------------------

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "你好"}]


def chat(**fields) -> dict:
    return {"model": MODEL, "messages": HELLO, "max_tokens": 4} | fields


def message(**fields) -> dict:
    return chat(messages=[{"role": "user", "content": "你好"} | fields])


def text(**fields) -> dict:
    return {"model": MODEL, "prompt": "你好", "max_tokens": 4} | fields


def schema(**fields) -> dict:
    return chat(response_format={"type": "json_schema",
                                 "json_schema": {"name": "a", "schema": fields}})


WRONG = [  # path, body, status, a part of the reason
    (CHAT, chat(model="x"), 404, "'x' does not exist"),
    (CHAT, message(content="你好" * 3000), 400, "smaller than the model context length (2048)"),
    (CHAT, message(content="你好" * 100_000), 400, "bytes is longer than"),
    (CHAT, message(content="你好" * 2_000_000), 413, "a request may have"),
    (CHAT, b'{"model": "x", ', 400, "JSON decode error"),
    (CHAT, b"", 400, "Field required"),
    (CHAT, b"[" * 5000, 400, "error parsing the body"),
    (CHAT, b'{"model": "\xff"}', 400, "error parsing the body"),
    (CHAT, b'{"model": "x", "messages": [{"role": "user", "content": "\\ud800"}]}', 400,
     "surrogate"),
    (CHAT, chat(user={"a": json.loads("[" * 80 + "]" * 80)}), 400, "within each other"),
    (CHAT, {"model": MODEL}, 400, "messages: Field required"),
    (CHAT, chat(messages=[]), 400, "messages must not be empty"),
    (CHAT, chat(messages="你好"), 400, "messages: Input should be a valid list"),
    (CHAT, message(role="alien"), 400, "unknown role: 'alien'"),
    (CHAT, message(role=5), 400, "needs a role"),
    (CHAT, message(content=None), 400, "needs content"),
    (CHAT, message(content=5), 400, "string or a list of parts"),
    (CHAT, message(content=["你好"]), 400, "a part of content is an object"),
    (CHAT, message(content=[{"type": "text"}]), 400, 'needs a string "text"'),
    (CHAT, message(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
     400, "Multimodal input is not supported"),
    (CHAT, message(content=[{"type": "input_audio", "input_audio": {}}]), 400, "not supported"),
    (CHAT, chat(temperature=-1), 400, "temperature"),
    (CHAT, chat(temperature="warm"), 400, "temperature"),
    (CHAT, b'{"model": "yuanmeng", "messages": [{"role": "user", "content": "a"}], '
           b'"repetition_penalty": NaN}', 400, "repetition_penalty"),
    (CHAT, chat(repetition_penalty=1e-300), 400, "repetition_penalty"),
    (CHAT, chat(top_p=0), 400, "top_p"),
    (CHAT, chat(top_k=-1), 400, "top_k"),
    (CHAT, chat(min_p=2), 400, "min_p"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_tokens=1.5), 400, "max_tokens"),
    (CHAT, chat(min_new_tokens=10**30), 400, "min_new_tokens"),
    (CHAT, chat(n=10**30), 400, "n 1000"),
    (CHAT, chat(presence_penalty=1), 400, "presence_penalty"),
    (CHAT, chat(stop=5), 400, "stop"),
    (CHAT, chat(stop=["a", ""]), 400, "must not be empty"),
    (CHAT, chat(stop=["a"] * 100), 400, "at most 16"),
    (CHAT, chat(logprobs=True, top_logprobs=50), 400, "top_logprobs"),
    (CHAT, chat(logit_bias={"99999": 1}), 400, "99999"),
    (CHAT, schema(type="nothing"), 400, "Unsupported type"),
    (CHAT, schema(**{"$ref": "#/nothing"}), 400, "nothing"),
    (CHAT, schema(enum=["x" * 20 + str(i) for i in range(5000)]), 400, "65536 characters"),
    (CHAT, chat(response_format={"type": "regex_schema", "regex_schema": "["}), 400, "Regex"),
    (CHAT, chat(response_format={"type": "regex_schema"}), 400, "needs"),
    (CHAT, schema(type="object") | {"ignore_eos": True}, 400, "ignore_eos"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools"),
    (CHAT, chat(tool_choice="required"), 400, "at least one tool"),
    (CHAT, chat(messages=[], input_ids=[10**30]), 400, "is no token"),
    (CHAT, chat(messages=[], input_ids=[-1]), 400, "is no token"),
    (CHAT, chat(preserve_cache=True), 400, "preserve_cache"),
    (CHAT, chat(migration_request="x"), 400, "MigrationRequest"),
    (TEXT, text(prompt=[5, 6]), 400, "list of such texts"),
    (TEXT, text(prompt=""), 400, "not empty"),
    (TEXT, text(prompt=["a", "b"], stream=True), 400, "one prompt"),
    (TEXT, text(n=2), 400, "n must be 1"),
    (TEXT, text(echo=True), 400, "echo"),
    (TEXT, text(logprobs=2), 400, "logprobs"),
    (TEXT, text(min_p=-1), 400, "min_p"),
    ("/generate", {"input_ids": [6400]}, 400, "6400 is no token"),
    ("/generate", {"prompt": "你好", "stop_token_ids": [10**30]}, 400, "stop_token_ids"),
    ("/get_ppl", {"input": [1, 6400]}, 400, "6400 is no token"),
    ("/get_ppl", {"input": [5] * 5000}, 400, "5000 tokens"),
    ("/pooling", {"input": "你好"}, 400, "reward model"),
    ("/v1/responses", {"model": MODEL, "input": 5}, 400, "input"),
    ("/v1/chat", {}, 404, "Not Found"),
    ("/v1/models", {}, 405, "Method Not Allowed"),
    ("/sleep", {}, 403, "--allow-terminate-by-client"),
    ("/update_weights", {"serialized_named_tensors": "x"}, 403, "--allow-terminate-by-client"),
    ("/distserve/free_cache", {}, 403, "--allow-terminate-by-client"),
    ("/abort_request", {"abort_all": True}, 403, "--enable-abort-handling"),
]


def post(server: Server, path: str, body: dict | bytes) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return requests.post(server.url + path, data=data, timeout=60,
                         headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("path, body, status, reason", WRONG,
                         ids=[f"{w[0]} {w[3]}" for w in WRONG])
def test_a_wrong_request_gets_a_reason(server, path, body, status, reason):
    answer = post(server, path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status), answer.text
    assert reason in error["message"] and "Traceback" not in answer.text
    if isinstance(body, dict) and path in (CHAT, TEXT):  # a stream has not begun either
        assert post(server, path, body | {"stream": True}).status_code in (status, 400)


def test_openais_client_shows_the_reason(client):
    with pytest.raises(openai.BadRequestError, match="unknown role: 'alien'") as refusal:
        client.chat.completions.create(model=MODEL, messages=[{"role": "alien", "content": "a"}])
    assert refusal.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="'x' does not exist"):
        client.chat.completions.create(model="x", messages=HELLO)


def test_other_ways_to_be_wrong(server):
    answer = requests.post(server.url + CHAT, data="{}", timeout=30)
    assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]
    answer = requests.get(f"{server.url}/terminate", timeout=30)
    assert answer.status_code == 403
    assert requests.get(server.url + CHAT, timeout=30).status_code == 405


def test_a_grammar_that_takes_minutes_to_make_is_given_up(monkeypatch):
    """Nobody else notices. (Here it is given less than the server's ten seconds.)"""

    class Compiler:
        def get_cache_size_bytes(self) -> int:
            return 0

        def compile_regex(self, pattern: str) -> None:
            release.wait()

    class Engine:
        def __getattr__(self, name):  # engine.executor.model_agent.guided_decoding_manager
            return Compiler() if name == "compiler" else self

    release = threading.Event()
    form = {"type": "regex_schema", "regex_schema": "(.{1,50}){1,50}x"}
    monkeypatch.setattr(serving, "MAX_GRAMMAR_SECONDS", 0.05)

    async def compile_it() -> None:
        with serving.ThreadPoolExecutor(1) as worker:
            try:
                with pytest.raises(ValueError, match="more than 0.05 seconds"):
                    await serving.compile_grammar(Engine(), form, worker)
            finally:
                release.set()

    asyncio.run(compile_it())


RIGHT_BODIES = {
    CHAT: {"messages": HELLO, "max_tokens": 4}, TEXT: {"prompt": "你好", "max_tokens": 4},
    "/get_ppl": {"input": "春眠不觉晓", "input_ids": None},
}


@pytest.mark.slow
def test_whatever_fits_the_description_gets_an_answer_or_a_reason(server):
    """schemathesis makes requests up from the served description, right ones and wrong ones."""
    import schemathesis

    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: dict[str, set[int]] = {}
    for result in description.get_all_operations():
        operation = result.ok()
        modes = list(schemathesis.GenerationMode)
        for mode in modes if operation.definition.raw.get("requestBody") else modes[:1]:
            seen.setdefault(operation.path, set()).update(statuses(operation, mode))
    assert len(seen) >= 12, seen
    for path in (CHAT, TEXT, "/v1/models", "/v1/encode", "/get_ppl"):
        assert 200 in seen[path], (path, seen)


def statuses(operation, mode) -> set[int]:
    """How made-up requests are answered; the same ones each time. The served model's name is put
    in, as nothing else would get past that, and no answer is left to grow long."""
    found = set()

    @settings(max_examples=12, deadline=None, derandomize=True, database=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case) -> None:
        if isinstance(case.body, dict):
            if "model" in case.body:
                case.body["model"] = MODEL
            if mode == mode.POSITIVE:  # the description leaves open what may stand in these
                case.body.update(RIGHT_BODIES.get(operation.path, {}))
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 4)
        answer = case.call(timeout=60)
        found.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    check()
    return found


# ---- Under way -----------------------------------------------------------------------------------

def test_health_is_told_while_long_prompts_are_read(server):
    """Six prompts of 1,900 tokens keep the model busy; /health answers before any of them is
    done."""
    events = []

    def read() -> None:
        post(server, "/generate", {"input_ids": [300 + i % 5000 for i in range(1900)],
                                   "max_tokens": 8, "ignore_eos": True})
        events.append("read")

    readers = [threading.Thread(target=read) for _ in range(6)]
    for reader in readers:
        reader.start()
    while True:
        assert requests.get(f"{server.url}/health", timeout=30).ok
        events.append("health")
        if not any(reader.is_alive() for reader in readers):
            break
    for reader in readers:
        reader.join()
    assert events.index("health") < events.index("read")


@pytest.mark.parametrize("decoding", [False, True])
def test_the_forward_pass_leaves_the_loop_to_others(decoding):
    """The pass ends only once the loop has done something else: were it in the loop, it would
    never."""
    import patches

    patches.register()
    from lmdeploy.pytorch.engine.model_agent.agent import BaseModelAgent

    served = threading.Event()

    class Agent:
        device, memdecode_agent = "cpu", None

        async def async_forward(self, inputs, cache_inputs=None):
            assert torch.is_inference_mode_enabled()
            assert served.wait(60)
            await asyncio.sleep(0)
            return {"hidden_states": [inputs]}

        def _is_prefill_input_logprobs(self, inputs) -> bool:
            return True

        def _get_input_logits(self, hidden_states, inputs):
            return "logits"

    async def main():
        asyncio.get_running_loop().call_later(0.01, served.set)
        inputs = SimpleNamespace(is_decoding=decoding)
        return await BaseModelAgent._async_model_forward(Agent(), inputs, False)

    assert asyncio.run(main())["logits"] == "logits"


@pytest.mark.slow
def test_under_load_nothing_is_lost_and_nothing_is_other_than_alone(server):
    """benchmarks/serving.py, shortened: 16 clients stream for a quarter of a minute."""
    from benchmarks.serving import Settings, load

    report, _ = asyncio.run(load(server, Settings(clients=16, minutes=0.25)))
    assert not report.failed and not report.wrong
    assert report.answers >= 32 and report.health


CLIENT = """
import openai, sys
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
stream = client.chat.completions.create(
    model="yuanmeng", messages=[{"role": "user", "content": "你好"}], max_tokens=1900,
    temperature=0, stream=True, extra_body={"ignore_eos": True})
for number, chunk in enumerate(stream):
    if number == 3:
        print("streaming", flush=True)
"""


def test_clients_that_are_killed_give_their_blocks_back(server):
    """kill -9, so nobody says goodbye. Idle, the server holds no blocks at all."""
    before = server.metrics()["lmdeploy:generation_tokens_total"]
    clients = [subprocess.Popen([sys.executable, "-c", CLIENT, server.url],
                                stdout=subprocess.PIPE) for _ in range(4)]
    try:
        for process in clients:
            assert process.stdout.readline() == b"streaming\n"
    finally:
        for process in clients:
            process.kill()
            process.wait()
            process.stdout.close()
    deadline = time.monotonic() + 60
    while (now := server.metrics())["lmdeploy:gpu_cache_usage_perc"] > 0 or (
            now["lmdeploy:num_requests_running"] > 0):
        assert time.monotonic() < deadline, now
        time.sleep(0.5)
    assert now["lmdeploy:generation_tokens_total"] - before < 4 * 1900  # they were not finished


def test_metrics_count_what_was_said(server, client):
    before = server.metrics()
    usage = ask(client, "你好").usage
    after = server.metrics()
    for name, tokens in (("prompt", usage.prompt_tokens), ("generation", usage.completion_tokens)):
        key = f"lmdeploy:{name}_tokens_total"
        assert 0 <= after[key] - before[key] - tokens <= 1  # the token that ends it counts too


# ---- Keys, four-bit caches, and the end ----------------------------------------------------------

@pytest.mark.slow
def test_keys_four_bit_caches_and_the_end(tmp_path):
    """One more server, with the options of the README."""
    server = Server(tmp_path / "log", "--quant-policy", "4", "--api-keys", "one", "two")
    try:
        with pytest.raises(openai.AuthenticationError):
            ask(server.client(key="three"), "你好")
        assert requests.get(f"{server.url}/v1/models", timeout=30).json()["error"]["code"] == 401
        assert requests.get(f"{server.url}/metrics", timeout=30).status_code == 401
        assert requests.get(server.url, timeout=30).ok  # the docs page holds no secret
        for key in ("one", "two"):
            assert ask(server.client(key=key), "你好").usage.completion_tokens > 0
        stream = server.client(key="one").chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, **LONG)
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        stream.close()
    finally:
        server.process.kill()
        server.process.wait()
    assert server.process.returncode in (0, -signal.SIGTERM), server.log.read_text()[-3000:]
    assert "Traceback" not in server.log.read_text().partition("Shutting down")[0]
    with socket.create_server(("127.0.0.1", server.port)):
        pass  # the port is free again


# ---- The command line ----------------------------------------------------------------------------

def test_what_cannot_be_served_is_told_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="holds no config.json"):
        serving_checks.check_model(str(tmp_path))
    for content, reason in ((None, "no such file"), ("{", "no valid JSON"), ("[]", "not a JSON")):
        path = tmp_path / "template.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(SystemExit, match=reason):
            serving_checks.check_template(str(path))
    serving_checks.check_template("chat_templates.json")
    serving_checks.check_template("llama2")
    with pytest.raises(SystemExit, match="from 1 to 65535"):
        serving_checks.check_port("127.0.0.1", 99999)
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(SystemExit, match="stop the other server"):
            serving_checks.check_port("127.0.0.1", other.getsockname()[1])


def test_a_wrong_path_is_told_in_one_line():
    run = subprocess.run(
        [sys.executable, "lmdeploy_cli.py", "serve", "api_server", "no/such/model"], cwd=ROOT,
        stderr=subprocess.PIPE, text=True, check=False,
    )
    assert run.returncode == 1
    assert run.stderr == ("no model in no/such/model: `python convert_to_transformers.py` makes "
                          "one in Yuanmeng_Models/\n")


@pytest.mark.slow
def test_chat_in_a_terminal():
    """A real terminal: questions, a conversation too long for the model, Ctrl-C, Ctrl-D."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [
            sys.executable, "lmdeploy_cli.py", "chat", str(MINI_DIR), "--dtype", "float32",
            "--chat-template", "chat_templates.json", "--session-len", "64"])
    seen = b""

    def read(*, until: bytes) -> str:
        """What appears up to and with `until`; all of it if the program ends before."""
        nonlocal seen
        while until not in seen:
            try:
                seen += os.read(terminal, 4096)
            except OSError:  # it has ended
                break
        shown, found, seen = seen.partition(until)
        return (shown + found).decode()

    def say(text: str) -> None:
        os.write(terminal, text.encode())

    try:
        read(until=b">>> ")
        say("你是谁\n\n")
        assert "缘梦" in read(until=b">>> ")
        say("那你会做什么呢？" * 10 + "\n\n")
        assert "must be smaller than the model context length (64)" in read(until=b">>> ")
        say("end\n\n")
        read(until=b">>> ")
        say("你是谁\n\n")
        assert "缘梦" in read(until=b">>> ")
        say("end\n\n")
        read(until=b">>> ")
        say("写一首诗\n\n")
        read(until="诗\r\n\r\n".encode())  # the terminal's echo
        while not seen:  # the answer has begun
            seen += os.read(terminal, 4096)
        say("\x03")  # breaks the answer off, or ends the program if that was done already
        say("\x04")
        rest = read(until=b"exiting...")
        assert rest.endswith("exiting...") and "Traceback" not in rest
        assert "Traceback" not in read(until=b"\0")
    finally:
        os.kill(process, signal.SIGKILL)  # it has ended but is not waited for yet
        _, status = os.waitpid(process, 0)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


def test_bytes_of_tokens(tokenizer):
    for text in ("你好，世界", "a b\n", "🙂"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        spelt = b"".join(serving_app.bytes_of(tokenizer, token) for token in ids)
        assert spelt.decode() == text
    assert serving_app.text_of(tokenizer, tokenizer.eos_token_id) == "</s>"
