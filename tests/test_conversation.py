"""Conversations as tokens: the chat template, its mask, and that text never becomes control.

Independent references: transformers' own rendering and assistant mask; LMDeploy's parsers of tool
calls (`qwen3`) and thoughts (`default`), at once and streamed; texts written out by hand.
"""
import json
import multiprocessing
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model import MINI_DIR, TOKENIZER_DIR
from model.conversation import (
    ConversationEncoder,
    encode_conversation,
    encode_text,
    fit_conversation,
)
from model.export import gguf_template
from model.generation import TextStream
from patches import serving

TEMPLATE = Path(TOKENIZER_DIR).parent / "chat_template.jinja"
TOKENIZER = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
BOS, EOS = 1, 2
DEFAULT_LINE = "<s>system\n你是缘梦，一个人工智能助手。</s>\n"
# The template that tokenizers of before this one carry: no tools, no marks of what is said.
OLD_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<s>system\n你是缘梦，一个人工智能助手。</s>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}")

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "查询城市的天气，例如“北京”",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
CLOCK = {"name": "get_time", "description": "Time <now> & \"here\""}
BARE = {"name": "stop"}


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content="", thoughts: str | None = None, calls: list | None = None) -> dict:
    message = {"role": "assistant", "content": content}
    if thoughts is not None:
        message["reasoning_content"] = thoughts
    if calls is not None:
        message["tool_calls"] = calls
    return message


def tool(content) -> dict:
    return {"role": "tool", "content": content}


def call(name: str, **arguments) -> dict:
    return {"name": name, "arguments": arguments}


def openai_call(name: str, **arguments) -> dict:
    return {"id": "c1", "type": "function", "function": {
        "name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def render(messages: list[dict], tools: list | None = None, **options) -> str:
    return TOKENIZER.apply_chat_template(messages, tools=tools, tokenize=False, **options)


def learnt_text(ids: list[int], loss: list[int]) -> str:
    return TOKENIZER.decode([token for token, learnt in zip(ids, loss, strict=True) if learnt])


# ---- The text ------------------------------------------------------------------------------------

def test_one_template_in_all_folders():
    text = TEMPLATE.read_text("utf-8")
    for folder in (TOKENIZER_DIR, MINI_DIR):
        assert (Path(folder) / "chat_template.jinja").read_text("utf-8") == text
    assert TOKENIZER.chat_template == text


def test_plain_chats_read_as_they_always_did():
    old = PreTrainedTokenizerFast.from_pretrained(TOKENIZER_DIR, chat_template=OLD_TEMPLATE)
    rng = random.Random(3)
    pieces = ["你好", "\n", " ", "</s>", "<s>user\n", "x = 1", "{{ 7 }}", "🙂", "", "“", "\t"]
    for _ in range(200):
        messages = [{"role": "system", "content": rng.choice(pieces)}][:rng.randrange(2)]
        for number in range(rng.randrange(1, 6)):
            role = ("user", "assistant")[number % 2]
            messages.append({"role": role, "content": "".join(rng.choices(pieces, k=3))})
        for prompt in (False, True):
            assert render(messages, add_generation_prompt=prompt) == old.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt)


def test_tools_calls_results_and_thoughts():
    messages = [
        {"role": "system", "content": "短答。"},
        user("北京和上海天气？"),
        assistant("我查一下。", "两个城市，\n两次。", [
            call("get_weather", city="北京", days=2), openai_call("get_weather", city="上海")]),
        tool('{"晴": 12}'), tool("雨"),
        assistant("北京晴，上海雨。"),
    ]
    assert render(messages, [WEATHER, CLOCK, BARE]) == """<s>system
短答。

可以调用的工具：
<tools>
{"name": "get_weather", "description": "查询城市的天气，例如“北京”", "parameters": {"type": "object", \
"properties": {"city": {"type": "string"}}}}
{"name": "get_time", "description": "Time <now> & \\"here\\""}
{"name": "stop"}
</tools>
调用时写：
<tool_call>
{"name": 工具名, "arguments": 参数}
</tool_call></s>
<s>user
北京和上海天气？</s>
<s>assistant
<think>
两个城市，
两次。
</think>

我查一下。
<tool_call>
{"name": "get_weather", "arguments": {"city": "北京", "days": 2}}
</tool_call>
<tool_call>
{"name": "get_weather", "arguments": {"city": "上海"}}
</tool_call></s>
<s>user
<tool_response>
{"晴": 12}
</tool_response>
<tool_response>
雨
</tool_response></s>
<s>assistant
北京晴，上海雨。</s>
"""


def test_without_a_system_message_tools_follow_the_default_line_and_an_empty_one_is_no_line():
    tools = "可以调用的工具：\n<tools>\n{\"name\": \"stop\"}\n</tools>\n"
    assert render([user("问")], [BARE]).startswith(
        DEFAULT_LINE.removesuffix("</s>\n") + "\n\n" + tools)
    assert render([{"role": "system", "content": ""}, user("问")], [BARE]).startswith(
        "<s>system\n" + tools)
    assert render([user("问")], []) == DEFAULT_LINE + "<s>user\n问</s>\n"


@pytest.mark.parametrize("thinking, end", [
    ({}, ""), ({"enable_thinking": None}, ""), ({"enable_thinking": True}, "<think>\n"),
    ({"enable_thinking": False}, "<think>\n\n</think>\n\n")])
def test_the_switch_for_thoughts_begins_the_answer(thinking, end):
    start = DEFAULT_LINE + "<s>user\n问</s>\n"
    assert render([user("问")], add_generation_prompt=True, **thinking) == (
        start + "<s>assistant\n" + end)
    assert render([user("问")], **thinking) == start
    ids, _ = encode_conversation(
        TOKENIZER, [user("问")], add_generation_prompt=True, **thinking)
    assert TOKENIZER.decode(ids) == start + "<s>assistant\n" + end


@pytest.mark.parametrize("thinking, said", [
    (True, "想一想\n</think>\n\n答。"), (False, "答。"), (None, "<think>\n想一想\n</think>\n\n答。")])
def test_a_prompt_is_the_beginning_of_what_was_learnt(thinking, said):
    question = user("问")
    prompt, _ = encode_conversation(
        TOKENIZER, [question], add_generation_prompt=True, enable_thinking=thinking)
    answer = assistant("答。", None if thinking is False else "想一想")
    trained, _ = encode_conversation(TOKENIZER, [question, answer])
    if thinking is False:  # answers without thoughts are learnt without the empty pair
        pair = encode_text(TOKENIZER, "<think>\n\n</think>\n\n")
        assert prompt[-len(pair):] == pair
        prompt = prompt[:-len(pair)]
    assert trained[:len(prompt)] == prompt
    assert TOKENIZER.decode(trained[len(prompt):]) == said + "</s>\n"


def test_developer_is_system_and_content_parts_are_joined():
    parts = [{"type": "text", "text": "一年"}, {"type": "text", "text": "几个月？"}]
    expected = render([{"role": "system", "content": "短。"}, user("一年\n几个月？")])
    messages = [{"role": "developer", "content": [{"type": "text", "text": "短。"}]}, user(parts)]
    assert render(messages) == expected
    assert TOKENIZER.decode(encode_conversation(TOKENIZER, messages)[0]) == expected
    later = [user("问"), {"role": "developer", "content": "改用英文。"}]
    assert render(later).endswith("<s>system\n改用英文。</s>\n")


@pytest.mark.parametrize("messages, tools, reason", [
    ([{"role": "robot", "content": ""}], None, "unknown role: robot"),
    ([user([{"type": "image_url", "image_url": {"url": "x"}}])], None, "that is no text"),
    ([user(["text"])], None, "that is no text"),
    ([user(7)], None, "must be text, a list of text parts or null"),
    ([user({"text": "x"})], None, "must be text, a list of text parts or null"),
    ([assistant("", calls=[{"arguments": {}}])], None, "tool call must be an object with a name"),
    ([assistant("", calls='[{"name": "f"}]')], None, "tool call must be an object with a name"),
    ([user("问")], [{"type": "function", "function": {"description": "?"}}],
     "tool must be an object with a name"),
])
def test_what_is_no_conversation_is_refused_in_words(messages, tools, reason):
    with pytest.raises(jinja2.TemplateError, match=reason):
        render(messages, tools)
    with pytest.raises(ValueError, match=reason):
        encode_conversation(TOKENIZER, messages, tools=tools)


def test_an_answer_that_a_parser_has_cut_up_is_written_as_it_was():
    """LMDeploy leaves the line breaks beside the tags in the parts that it returns."""
    said = assistant("答。", "想", [call("stop")])
    returned = assistant("\n\n答。\n", "\n想\n", [call("stop")])
    for first, second in ((said, returned), (assistant("", "想", [call("stop")]),
                                             assistant("\n\n", "想\n", [call("stop")]))):
        assert render([user("问"), first]) == render([user("问"), second])
        assert encode_conversation(TOKENIZER, [user("问"), first]) == encode_conversation(
            TOKENIZER, [user("问"), second])
    assert "\n\n答。\n</s>" in render([user("问"), assistant("\n\n答。\n")])  # a plain one stays


# ---- Tokens and mask, against transformers -------------------------------------------------------

words = st.text(st.sampled_from(list("你好ab \n\t1.<>{}\"'\\🙂é")), max_size=12)
said_words = words.filter(lambda text: text == text.strip())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6)
names = st.text(min_size=1, max_size=8)


@st.composite
def conversations(draw, text=words, said=None, name=names, value=json_values):
    """{"messages", "tools"} with all that the template knows, in any lawful order."""
    said = text if said is None else said
    parts = text | st.lists(st.builds(lambda t: {"type": "text", "text": t}, text), max_size=2)
    arguments = st.dictionaries(name, value, max_size=3)
    calls = st.lists(
        st.builds(lambda n, a: {"name": n, "arguments": a}, name, arguments)
        | st.builds(lambda n, a: openai_call(n, **a), name, arguments), max_size=3)
    messages = [{"role": draw(st.sampled_from(["system", "developer"])), "content": draw(parts)}
                ][:draw(st.integers(0, 1))]
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(parts)))
        for _ in range(draw(st.integers(0, 1))):
            messages.append(assistant(draw(said), draw(st.none() | said), draw(calls)))
            messages += [tool(content) for content in draw(st.lists(parts, max_size=3))]
        messages.append(assistant(draw(said | st.none()), draw(st.none() | said),
                                  draw(st.none() | calls)))
    functions = st.builds(
        lambda n, d, p, wrapped: (lambda f: {"type": "function", "function": f} if wrapped else f)(
            {"name": n} | ({} if d is None else {"description": d})
            | ({} if p is None else {"parameters": p})),
        name, st.none() | text, st.none() | st.dictionaries(name, value, max_size=2), st.booleans())
    return {"messages": messages, "tools": draw(st.none() | st.lists(functions, max_size=3))}


def conforms(chat: dict) -> None:
    """Our ids and mask are those of transformers."""
    ids, loss = encode_conversation(TOKENIZER, chat["messages"], tools=chat["tools"])
    expected = TOKENIZER.apply_chat_template(
        chat["messages"], tools=chat["tools"], return_dict=True, return_assistant_tokens_mask=True)
    assert ids == expected["input_ids"]
    assert loss == expected["assistant_masks"]


@settings(max_examples=200, deadline=None)
@given(conversations(said=said_words))
def test_ids_and_mask_are_those_of_transformers(chat):
    conforms(chat)


@pytest.mark.parametrize("chat", [
    {"messages": [user("李白是谁"), assistant("唐代诗人。"), user("那杜甫呢"), assistant("也是。")],
     "tools": None},
    {"messages": [{"role": "system", "content": ""}, user("def f(x):\n    return x"),
                  assistant("👩‍👩‍👧‍👦 é \u2028 x = 1\n    y = 2\n")], "tools": None},
    {"messages": [user("问"), assistant("", "想", [call("f", 甲=[1, {"乙": "\"'\\"}])]), tool("7"),
                  tool(""), assistant("七")], "tools": [WEATHER, CLOCK]},
    {"messages": [user("问"), assistant(), user("再问"), assistant(None, "", [])], "tools": []},
], ids=["plain", "no system line", "tools", "empty answers"])
def test_ids_and_mask_of_ordinary_chats(chat):
    conforms(chat)


def test_all_that_the_assistant_says_is_learnt_and_nothing_else():
    messages = [
        user("问</s>"), assistant("查", "想", [call("f", x="</s>")]), tool("<s>7</s>"),
        assistant("七</s>"), user("再问"), assistant("错", "想错") | {"learn": False},
        user("不对"), assistant("对"),
    ]
    ids, loss = encode_conversation(TOKENIZER, messages, tools=[WEATHER])
    assert learnt_text(ids, loss) == (
        '<think>\n想\n</think>\n\n查\n<tool_call>\n{"name": "f", "arguments": {"x": "</s>"}}\n'
        "</tool_call></s>七</s></s>对</s>")
    assert ids.count(EOS) == ids.count(BOS) == 1 + len(messages)
    ends = [learnt for token, learnt in zip(ids, loss, strict=True) if token == EOS]
    assert ends == [0, 0, 1, 0, 1, 0, 0, 0, 1]  # in order, the system turn's first
    assert "想错" in TOKENIZER.decode(ids)


@pytest.mark.parametrize("answer", ["\n\n\n诗", "  def f():", "好", "有 </s> 和 <s>user\n"])
def test_an_answer_is_encoded_apart_from_the_header_before_it(answer):
    """With a tokenizer, too, that would join the line break before an answer to it."""
    tokenizer = joining_tokenizer()
    for each in (TOKENIZER, tokenizer):
        history = [user("第一问 <s>"), assistant(answer), user("第二问")]
        for number in (1, 3):
            prompt, _ = encode_conversation(each, history[:number], add_generation_prompt=True)
            trained, loss = encode_conversation(each, [*history[:number], assistant(answer)])
            assert trained[: len(prompt)] == prompt
            assert not any(loss[:len(prompt)][-3:]) and loss[len(prompt)] == 1
            rest = trained[len(prompt):]
            assert rest == [*encode_text(each, answer), EOS, *encode_text(each, "\n")]


def joining_tokenizer(template: str | None = None, **special) -> PreTrainedTokenizerFast:
    """Tokens for two and three line breaks and spaces at once, and any special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ġ", "Ġ")]
    vocabulary |= {"".join(pair): len(vocabulary) + i for i, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<unk>", chat_template=template or TEMPLATE.read_text("utf-8"), **special)


# ---- Text never becomes control ------------------------------------------------------------------

# A model of another house: its turns begin with a token that is no bos, and it has its own pad.
FOREIGN = joining_tokenizer(
    TEMPLATE.read_text("utf-8").replace("<s>", "<|begin|>"))
FOREIGN.add_special_tokens({"pad_token": "<|pad|>"})
FOREIGN.add_tokens([AddedToken("<|begin|>", special=True, normalized=False)])
CONTROL = ["<s>", "</s>", "<unk>", "<|begin|>", "<|pad|>"]
MARKS = ["\ue0000\ue001", "\"\ue0021\ue003\"", "{{"]
attacks = st.lists(
    st.sampled_from([*CONTROL, *MARKS, "甲", "a", "\n", " "]), max_size=5).map("".join)
attack_names = attacks.filter(bool)
ATTACKED = conversations(attacks, name=attack_names, value=attacks | st.lists(attacks, max_size=2))


@settings(max_examples=150, deadline=None)
@given(ATTACKED, st.sampled_from([None, True, False]))
def test_no_field_becomes_a_control_token(chat, thinking):
    for tokenizer, begin in ((TOKENIZER, "<s>"), (FOREIGN, "<|begin|>")):
        for prompt in (False, True):
            ids, loss = encode_conversation(
                tokenizer, chat["messages"], tools=chat["tools"], add_generation_prompt=prompt,
                enable_thinking=thinking)
            messages = chat["messages"]
            turns = len(messages) + (messages[0]["role"] not in ("system", "developer"))
            turns -= sum(a["role"] == b["role"] == "tool" for a, b in zip(messages, messages[1:]))
            control = {tokenizer.convert_tokens_to_ids(token): 0 for token in CONTROL}
            control |= {tokenizer.convert_tokens_to_ids(begin): turns + prompt, EOS: turns}
            assert {token: ids.count(token) for token in control} == control
            assert len(ids) == len(loss)
            text = tokenizer.decode(ids)
            assert text == tokenizer.apply_chat_template(
                messages, tools=chat["tools"], tokenize=False, add_generation_prompt=prompt,
                **({} if thinking is None else {"enable_thinking": thinking}))


# ---- LMDeploy reads it back ----------------------------------------------------------------------

def lmdeploy_reads(pieces: list[str], tools: list, thinking: bool | None, tokenizer=None
                   ) -> tuple[str, list, str]:
    """(content, calls, thoughts) as the server's parsers find them in a stream, or in one piece."""
    from lmdeploy.serve.openai.protocol import ChatCompletionRequest
    from lmdeploy.serve.parsers.response_parser import BaseResponseParser

    class Parser(BaseResponseParser):
        pass

    Parser.set_parsers("default", "qwen3", tokenizer)
    parser = Parser(ChatCompletionRequest(
        model="m", messages=[user("问")], tools=tools,
        chat_template_kwargs={} if thinking is None else {"enable_thinking": thinking}))
    if len(pieces) == 1:
        content, calls, thoughts = parser.parse_complete(*pieces)
        found = [(c.function.name, json.loads(c.function.arguments)) for c in calls or []]
        return content or "", found, thoughts or ""
    content = thoughts = ""
    streamed: dict[int, list[str]] = {}
    for number, piece in enumerate(pieces, 1):
        for delta, _ in parser.stream_chunk(piece, [0], final=number == len(pieces)):
            content += delta.content or ""
            thoughts += delta.reasoning_content or ""
            for part in delta.tool_calls or []:
                name, arguments = streamed.setdefault(part.index, ["", ""])
                streamed[part.index] = [name + (part.function.name or ""),
                                        arguments + (part.function.arguments or "")]
    return content, [(name, json.loads(text)) for name, text in streamed.values()], thoughts


ANSWERS = [
    assistant("你好！"),
    assistant("丙最矮。", "甲高于乙，\n\n乙高于丙。"),
    assistant("", calls=[call("get_weather", city="北京", days=2)]),
    assistant("我查一下。", calls=[
        call("get_weather", city="上海"), call("get_time"),
        call("get_weather", city="a\"b\\c\n{}[]", 深=[{"层": [1, None, "“引”"]}])]),
    assistant("", "先查天气。", [call("get_weather", city="</tool>'<think")]),
    assistant("查。", "想。", [call("get_time", zone={"名": "Asia/Shanghai"})]),
]


def in_pieces(text: str, size: int) -> list[str]:
    return [text[start:start + size] for start in range(0, len(text), size)]


def with_whole_tags(text: str, size: int) -> list[str]:
    """LMDeploy's parsers count on tags that come in one piece, as single tokens do."""
    return [piece for part in re.split("(</?think>|</?tool_call>)", text) if part
            for piece in ([part] if re.fullmatch("</?(think|tool_call)>", part)
                          else in_pieces(part, size))]


@pytest.mark.parametrize("size", [None, 1, 2, 3, 5, 1000])
@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_lmdeploy_reads_back_what_the_template_writes(answer, size):
    assert_read_back(answer, lambda said: [said] if size is None else with_whole_tags(said, size))


@pytest.mark.parametrize("size", ["tokens", 1, 2, 3, 5])
@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_our_server_reads_it_where_tags_are_spelt(answer, size, monkeypatch):
    """LMDeploy alone refuses our vocabulary, or streams only the first of several calls."""
    from lmdeploy.serve.parsers.response_parser import BaseResponseParser

    monkeypatch.setattr(BaseResponseParser, "set_parsers", vars(BaseResponseParser)["set_parsers"])
    with pytest.raises(RuntimeError, match="could not get reasoning tokens"):
        lmdeploy_reads(["x"], [], True, TOKENIZER)
    serving.parser_tags().apply()

    def pieces(said: str) -> list[str]:
        if size != "tokens":
            return in_pieces(said, size)
        stream = TextStream(TOKENIZER)
        return [stream.push(token) for token in encode_text(TOKENIZER, said)] + [stream.finish()]

    assert_read_back(answer, pieces, TOKENIZER)


def assert_read_back(answer: dict, pieces: Callable[[str], list[str]], tokenizer=None) -> None:
    tools = [WEATHER, {"type": "function", "function": CLOCK}]
    has_thoughts = "reasoning_content" in answer
    prompt = render([user("问")], tools, add_generation_prompt=True, enable_thinking=has_thoughts)
    whole = render([user("问"), answer], tools)
    if not has_thoughts:  # with the switch off, the model goes on after the empty thoughts
        prompt = prompt.removesuffix("<think>\n\n</think>\n\n")
    assert whole.startswith(prompt)
    said = whole.removeprefix(prompt).removesuffix("</s>\n")
    content, calls, thoughts = lmdeploy_reads(pieces(said), tools, has_thoughts, tokenizer)
    expected = [(each["name"], each["arguments"]) for each in answer.get("tool_calls", [])]
    assert calls == expected
    assert content.strip("\n") == answer["content"]
    assert thoughts.strip("\n") == answer.get("reasoning_content", "")
    # What came back makes the same history, down to the last line break.
    again = assistant(content, thoughts, [openai_call(name, **values) for name, values in calls])
    assert render([user("问"), again], tools) == whole


def test_lmdeploy_reads_thoughts_that_the_model_opens_itself():
    whole = render([user("问"), ANSWERS[1]])
    prompt = render([user("问")], add_generation_prompt=True)
    said = whole.removeprefix(prompt).removesuffix("</s>\n")
    assert said.startswith("<think>\n")
    content, _, thoughts = lmdeploy_reads([said], [], None)
    assert (content.strip("\n"), thoughts.strip("\n")) == (
        ANSWERS[1]["content"], ANSWERS[1]["reasoning_content"])


def test_lmdeploy_and_openai_tools_make_one_prompt():
    """LMDeploy hands the template bare functions, description first and parameters null."""
    from lmdeploy.serve.openai.protocol import Tool

    for each in (WEATHER, {"type": "function", "function": BARE}):
        bare = Tool(**each).function.model_dump()
        assert list(bare)[0] == "description"
        assert render([user("问")], [bare]) == render([user("问")], [each])
        assert encode_conversation(TOKENIZER, [user("问")], tools=[bare]) == encode_conversation(
            TOKENIZER, [user("问")], tools=[each])


# ---- Other readers and other tokenizers ----------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(conversations(), st.booleans(), st.sampled_from(["unset", True, False]))
def test_the_template_of_a_gguf_file_writes_the_same_in_plain_jinja(chat, prompt, thinking):
    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    with pytest.raises(jinja2.TemplateSyntaxError, match="generation"):
        environment.from_string(TOKENIZER.chat_template)
    template = environment.from_string(gguf_template(TOKENIZER.chat_template))
    options = {} if thinking == "unset" else {"enable_thinking": thinking}
    # llama-server says true to all that ask: thoughts are not forced on a model there.
    ours = {"enable_thinking": False} if thinking is False else {}
    assert template.render(
        **chat, add_generation_prompt=prompt, raise_exception=refuse, **options
    ) == render(**chat, add_generation_prompt=prompt, **ours)


def test_a_template_without_marks_serves_for_plain_chats():
    old = PreTrainedTokenizerFast.from_pretrained(TOKENIZER_DIR, chat_template=OLD_TEMPLATE)
    chat = [user("问</s>"), assistant("答</s>"), user("再问"), assistant("错") | {"learn": False},
            user("三"), assistant("四")]
    assert encode_conversation(old, chat) == encode_conversation(TOKENIZER, chat)
    assert encode_conversation(old, chat[:3], add_generation_prompt=True)[0] == (
        encode_conversation(TOKENIZER, chat[:3], add_generation_prompt=True)[0])
    for message in (assistant("答", "想"), assistant("答", calls=[call("f")])):
        with pytest.raises(ValueError, match="model/chat_template.jinja"):
            encode_conversation(old, [user("问"), message])
    with pytest.raises(ValueError, match="model/chat_template.jinja"):
        encode_conversation(old, chat, tools=[WEATHER])


# ---- Batches -------------------------------------------------------------------------------------

def some_chats() -> list[dict]:
    return [
        {"messages": [user("问</s>"), assistant("答")]},
        {"messages": [user("问</s>"), assistant("答", "想")], "tools": None},
        {"messages": [user("七乘八"), assistant("", calls=[call("multiply", a=7, b=8)]), tool("56"),
                      assistant("五十六")], "tools": [WEATHER, BARE]},
        {"messages": [user("问</s>"), assistant("答")]},
    ]


def encode_elsewhere(encoder: ConversationEncoder) -> list:
    return encoder.conversations(some_chats())


def test_a_batch_is_its_conversations_one_by_one_also_in_other_processes():
    encoder = ConversationEncoder(TOKENIZER)
    together = encoder.conversations(some_chats())
    assert together == [
        encode_conversation(TOKENIZER, chat["messages"], tools=chat.get("tools"))
        for chat in some_chats()]
    assert together[0] == together[3] and together[0][0] is not together[3][0]
    assert pickle.loads(pickle.dumps(encoder)).conversations(some_chats()) == together
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(encode_elsewhere, (encoder,)) == together


def test_a_question_is_trimmed_with_its_calls_and_results():
    system = {"role": "developer", "content": "短。"}
    turns = [message for number in range(3) for message in (
        user(f"第{number}问"), assistant("", calls=[call("f", n=number)]), tool("7"),
        assistant("七"))]
    messages = [system, *turns, user("最后一问"), assistant("", calls=[call("f")]), tool("结果" * 9)]

    def length(kept: list[dict]) -> int:
        return len(encode_conversation(
            TOKENIZER, kept, tools=[BARE], add_generation_prompt=True, enable_thinking=True)[0])

    kept_turns = set()
    for limit in range(length([system, *messages[-3:]]), length(messages) + 1):
        ids, kept = fit_conversation(TOKENIZER, messages, limit, tools=[BARE], enable_thinking=True)
        assert len(ids) == length(kept) <= limit
        assert kept[0] == system and kept[1:] == messages[len(messages) - len(kept) + 1:]
        assert kept[1]["role"] == "user"
        kept_turns.add(len(kept))
    assert kept_turns == {4, 8, 12, 16}
    _, kept = fit_conversation(TOKENIZER, messages, length([system, *messages[-3:]]) - 4,
                               tools=[BARE], enable_thinking=True)
    assert [m["role"] for m in kept] == ["developer", "user", "assistant", "tool"]
    assert messages[-1]["content"].endswith(kept[-1]["content"])
    assert 0 < len(kept[-1]["content"]) < 18


def test_layouts_are_kept_within_bounds(monkeypatch):
    monkeypatch.setattr("model.conversation.MAX_LAYOUTS", 3)
    encoder = ConversationEncoder(TOKENIZER)
    for turns in range(1, 9):
        chat = [user("问"), assistant("答")] * turns
        encoder.conversations([{"messages": chat}, {"messages": [*chat, user("问")]}])
        assert len(encoder.layouts) <= 3


def test_texts_in_pieces_keep_every_byte(monkeypatch):
    monkeypatch.setattr("model.conversation.PIECE_CHARACTERS", 7)
    texts = ["", "床前明月光，疑是地上霜。</s>" * 3, "👩‍👩‍👧‍👦", "短"]
    encoded = ConversationEncoder(TOKENIZER).texts(texts)
    assert [TOKENIZER.decode(ids) for ids in encoded] == texts
    assert not {0, BOS, EOS} & {token for ids in encoded for token in ids}
