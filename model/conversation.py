"""Conversations as token ids: the chat template applied safely, and trimmed until they fit.

Training, chat and evaluation encode here, so that a model reads what it was trained on.

`apply_chat_template` would read a `</s>` that a user typed as the end of the message. Here the
template is rendered with marks in place of the texts, and each text is encoded as text, whatever it
contains; for ordinary texts the ids are the same.
"""
import bisect
import json
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .bpe import TextEncoder

# Longer than any token of the vocabulary: text beyond limit x this cannot fit into limit tokens.
LONGEST_TOKEN = 128
PIECE_CHARACTERS = 1 << 20  # a longer text is tokenised in pieces, to bound memory
MAX_LAYOUTS = 1000  # kept; another one costs about a millisecond
ROLES = ("system", "developer", "user", "assistant", "tool")

# {"role", "content"}; an assistant's may have "reasoning_content", "tool_calls" and "learn".
Message = dict[str, Any]

# Marks for text as it is, and for text in JSON: private-use characters, found in no template.
TEXT_MARK, JSON_MARK = "\ue000{}\ue001", "\ue002{}\ue003"
ANY_MARK = "\ue000[0-9]+\ue001|\"\ue002[0-9]+\ue003\""


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *,
    tools: Sequence[dict] | None = None, add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> tuple[list[int], list[int]]:
    """The (ids, loss) of one conversation; `ConversationEncoder.conversations` describes them."""
    return _encoder(tokenizer, tokenizer.chat_template).conversations(
        [{"messages": messages, "tools": tools}],
        add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking)[0]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text: nothing added, and no special token even if its name is in the text."""
    return _encoder(tokenizer, tokenizer.chat_template).texts([text])[0]


class ConversationEncoder:
    """Encodes texts and conversations in batches by a tokenizer and its chat template.

    It has no threads of its own and can be pickled, so worker processes may take it along.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.encode_pieces = TextEncoder(tokenizer.backend_tokenizer)
        self.special_ids = {
            token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens
        } | {
            str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self.layouts: dict[tuple, Layout] = {}

    def __reduce__(self):
        return ConversationEncoder, (self.tokenizer,)  # a pickled backend reads special tokens again

    def texts(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Token ids of each text; special tokens in it stay text, and none is added."""
        if all(len(text) <= PIECE_CHARACTERS for text in texts):
            return list(self.encode_pieces(texts))
        pieces, owners = [], []
        for number, text in enumerate(texts):
            for start in range(0, len(text), PIECE_CHARACTERS):
                pieces.append(text[start:start + PIECE_CHARACTERS])
                owners.append(number)
        ids: list[Sequence[int]] = [[] for _ in texts]
        for number, piece_ids in zip(owners, self.encode_pieces(pieces), strict=True):
            if not ids[number]:
                ids[number] = piece_ids
            else:  # of a text of several pieces; a list of integers would take ten times as much
                whole = array("I", ids[number]) if isinstance(ids[number], list) else ids[number]
                whole.extend(piece_ids)
                ids[number] = whole
        return ids

    def conversations(
        self, batch: Iterable[dict], *, add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
    ) -> list[tuple[list[int], list[int]]]:
        """(ids, loss), equally long, of each conversation in the tokenizer's chat template.

        loss is 1 on all that the assistant says: thoughts, calls of tools, content and the token
        that ends its turn. A message with `"learn": false` is read and not learnt. An assistant's
        text is encoded apart from the header before it, as when it is generated.

        Args:
            batch: {"messages": [...], "tools": [...] or None} each. A content is a string, None or
                a list of {"type": "text", "text"}; tools and calls are OpenAI's objects or bare
                ones with "name"; a call's "arguments" are an object or its JSON text.
            add_generation_prompt: end with the line that asks the assistant to speak.
            enable_thinking: see the template; None leaves it to the model.

        Raises:
            ValueError: a message, tool or call is not of this form, or the template has no place
                for what a conversation to be learnt contains.
            jinja2.TemplateError: the template refuses the conversation.
        """
        slots: dict[str, int] = {}  # each text of the batch is encoded once
        plans = []
        for conversation in batch:
            shape, texts = _read(conversation)
            layout = self._layout(shape, len(texts), add_generation_prompt, enable_thinking)
            plans.append((layout, [
                slots.setdefault("".join(
                    [part if isinstance(part, str) else texts[part] for part in parts]), len(slots))
                for parts, _ in layout.slots
            ]))
        encoded = self.texts(list(slots))
        rendered = []
        for layout, numbers in plans:
            ids, loss = list(layout.fixed[0][0]), list(layout.fixed[0][1])
            for number, (_, learnt), (fixed_ids, fixed_loss) in zip(
                    numbers, layout.slots, layout.fixed[1:], strict=True):
                text_ids = encoded[number]
                ids += text_ids
                ids += fixed_ids
                loss += [learnt] * len(text_ids)
                loss += fixed_loss
            rendered.append((ids, loss))
        return rendered

    def _layout(self, shape: tuple, num_texts: int, add_generation_prompt: bool,
                enable_thinking: bool | None) -> "Layout":
        key = (shape, add_generation_prompt, enable_thinking)
        layout = self.layouts.get(key)
        if layout is None:
            if len(self.layouts) >= MAX_LAYOUTS:
                self.layouts.clear()
            layout = self.layouts[key] = self._lay_out(*key, num_texts)
        return layout

    def _lay_out(self, shape: tuple, add_generation_prompt: bool, enable_thinking: bool | None,
                 num_texts: int) -> "Layout":
        """Render the template once for conversations of this shape. So the template in the
        tokenizer's folder is the only place that knows the format."""
        messages, tools = _marked(shape)
        template = self.tokenizer.get_chat_template(None, tools)
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        (rendered,), spans = render_jinja_template(
            [messages], tools, chat_template=template, return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **self.tokenizer.special_tokens_map, **thinking)
        marks = [int(mark) for mark in re.findall("[\ue000\ue002]([0-9]+)", rendered)]
        # For a prompt, a template may leave out what it likes (Qwen3's drops earlier thoughts).
        if not add_generation_prompt and sorted(marks) != list(range(num_texts)):
            raise ValueError(
                "The tokenizer's chat template does not write every message, thought, call and "
                "tool once: cannot tell which tokens the assistant said (roles "
                f"{', '.join(m['role'] for m in messages)}); model/chat_template.jinja does, copy it "
                "to the tokenizer's folder")
        return self._cut(rendered, self._spoken(messages, rendered, spans[0], shape,
                                                add_generation_prompt))

    def _spoken(self, messages: list[Message], rendered: str, spans: list[tuple[int, int]],
                shape: tuple, is_prompt: bool) -> list[tuple[int, int, int]]:
        """(start, end, whether learnt) of what the assistant says in `rendered`."""
        answers = [(message, learnt) for message, (_, _, learnt) in zip(messages, shape[1])
                   if message["role"] == "assistant"]
        if spans and len(spans) == len(answers):
            return [(*span, learnt) for span, (_, learnt) in zip(spans, answers)]
        if spans and not is_prompt:
            raise ValueError(f"The chat template marks {len(spans)} parts as said by the assistant "
                             f"(`generation`), where it speaks {len(answers)} times")
        found = []  # a template without these marks: the content, and the token that ends it
        eos = self.tokenizer.eos_token or ""
        for message, learnt in answers:
            if not is_prompt and len(message) > 2:
                raise ValueError(
                    "The tokenizer's chat template has no marks `generation` around what the "
                    "assistant says, so that thoughts and calls of tools cannot be learnt with it; "
                    "copy model/chat_template.jinja to the tokenizer's folder")
            start = rendered.find(message["content"]) if message["content"] else -1
            if start >= 0:
                end = start + len(message["content"])
                found.append((start, end + len(eos) * rendered.startswith(eos, end), learnt))
        return found

    def _cut(self, rendered: str, spoken: list[tuple[int, int, int]]) -> "Layout":
        """Cut at special tokens and where the assistant begins and ends; what has no text of a
        conversation in it is encoded here."""
        special = map(re.escape, sorted(self.special_ids, key=len, reverse=True))
        pattern = re.compile(f"({'|'.join(special)})") if self.special_ids else re.compile("(?!)")
        borders = [0, *(border for start, end, _ in spoken for border in (start, end)),
                   len(rendered)]
        learning = [0, *(flag for _, _, learnt in spoken for flag in (learnt, 0))]
        fixed: list[tuple[list[int], list[int]]] = [([], [])]
        slots: list[tuple[tuple[str | int, ...], int]] = []
        for (start, end), learnt in zip(pairwise(borders), learning, strict=True):
            for piece in pattern.split(rendered[start:end]):
                parts = tuple(
                    int(re.sub("[^0-9]", "", part)) if re.fullmatch(ANY_MARK, part) else part
                    for part in re.split(f"({ANY_MARK})", piece) if part)
                if any(isinstance(part, int) for part in parts):
                    slots.append((parts, learnt))
                    fixed.append(([], []))
                elif parts:
                    ids = ([self.special_ids[piece]] if piece in self.special_ids
                           else self.texts([piece])[0])
                    fixed[-1][0].extend(ids)
                    fixed[-1][1].extend([learnt] * len(ids))
        return Layout(fixed, slots)


@dataclass(frozen=True)
class Layout:
    """A rendered template without the texts: fixed tokens, and slots between them.

    `fixed` are (ids, loss) before, between and after the slots; a slot is what is encoded as one
    text, template (str) and numbers of the conversation's texts (int), and whether it is learnt.
    """

    fixed: list[tuple[list[int], list[int]]]
    slots: list[tuple[tuple[str | int, ...], int]]


def is_learnt(message: Message) -> bool:
    """Whether the model is to learn to say this."""
    return message["role"] == "assistant" and message.get("learn", True) is not False


@lru_cache(maxsize=4)
def _encoder(tokenizer: PreTrainedTokenizerBase, template: str) -> ConversationEncoder:
    return ConversationEncoder(tokenizer)


def _read(conversation: dict) -> tuple[tuple, list[str]]:
    """Take a conversation apart: its shape, which decides how the template is laid out, and the
    texts that go into it.

    The shape is (tools, messages): (has a description, has parameters) of each tool; (role, which
    texts there are, whether learnt) of each message.
    """
    texts: list[str] = []
    tools = []
    for tool in conversation.get("tools") or ():
        function = _function_of(tool, "tool")
        described, parameters = function.get("description"), function.get("parameters")
        tools.append((bool(described), bool(parameters)))
        texts += [_json(value) for value in (function["name"], described, parameters) if value]
    messages = []
    for message in conversation["messages"]:
        role, content = message.get("role"), message.get("content")
        if type(content) is not str:
            content = text_of(content)
        if role == "assistant":
            thoughts = text_of(message.get("reasoning_content")).strip("\n")
            calls = message.get("tool_calls") or ()
            # As in the template: the line breaks beside a tag are the template's.
            if thoughts:
                content = content.lstrip("\n")
                texts.append(thoughts)
            if calls:
                content = content.rstrip("\n")
            if content:
                texts.append(content)
            for call in calls:
                function = _function_of(call, "tool call")
                arguments = function.get("arguments") or {}
                texts.append(_json(function["name"]))
                texts.append(arguments if isinstance(arguments, str) else _json(arguments))
            messages.append((role, (bool(thoughts), bool(content), len(calls)),
                             int(is_learnt(message))))
        elif role in ROLES:
            if content:
                texts.append(content)
            messages.append((role, bool(content), 0))
        else:
            raise ValueError(f"unknown role: {role}; known are {', '.join(ROLES)}")
    return (tuple(tools), tuple(messages)), texts


def _marked(shape: tuple) -> tuple[list[Message], list[dict] | None]:
    """A conversation of this shape with marks, numbered as `_read` lists the texts."""
    number = -1

    def mark(form: str, wanted: bool = True) -> str:
        nonlocal number
        number += wanted
        return form.format(number) if wanted else ""

    tools = [
        {"name": mark(JSON_MARK)}
        | ({"description": mark(JSON_MARK)} if described else {})
        | ({"parameters": mark(JSON_MARK)} if parameters else {})
        for described, parameters in shape[0]
    ]
    messages: list[Message] = []
    for role, has, _ in shape[1]:
        if role != "assistant":
            messages.append({"role": role, "content": mark(TEXT_MARK, has)})
            continue
        has_thoughts, has_content, num_calls = has
        message: Message = {"role": role, "content": ""}
        if has_thoughts:
            message["reasoning_content"] = mark(TEXT_MARK)
        message["content"] = mark(TEXT_MARK, has_content)
        if num_calls:
            message["tool_calls"] = [
                {"name": mark(JSON_MARK), "arguments": mark(TEXT_MARK)} for _ in range(num_calls)
            ]
        messages.append(message)
    return messages, tools or None


def text_of(content: object) -> str:
    """The text of a content: a string, a list of text parts, or None.

    Raises:
        ValueError: it is something else, such as an image.
    """
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise ValueError("a content must be text, a list of text parts or null, not "
                         f"{json.dumps(content, ensure_ascii=False, default=str)[:60]}")
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text"
                and isinstance(part.get("text"), str)):
            raise ValueError("a content part that is no text; this model reads text only: "
                             f"{json.dumps(part, ensure_ascii=False, default=str)[:60]}")
    return "\n".join(part["text"] for part in content)


def _function_of(value: object, kind: str) -> dict[str, Any]:
    """The object with the name, of a tool or a call in OpenAI's form or in the bare one."""
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not (isinstance(name, str) and name):
        raise ValueError(f"a {kind} must be an object with a name: "
                         f"{json.dumps(value, ensure_ascii=False, default=str)[:60]}")
    return function


def _json(value: object) -> str:
    """As the template's `tojson`."""
    return json.dumps(value, ensure_ascii=False)


def fit_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], max_tokens: int, *,
    tools: Sequence[dict] | None = None, enable_thinking: bool | None = None,
) -> tuple[list[int], list[Message]]:
    """The prompt's ids of what fits into `max_tokens`, and the messages that these are.

    The oldest turns go first, each question with all up to the next; a system line stays. If the
    last message is too long even alone, its beginning is cut away.

    Args:
        messages: an optional system line, then user and assistant in turns, a user's or a tool's
            last.

    Raises:
        ValueError: not even an empty message would fit.
    """
    def encode(messages: list[Message]) -> list[int]:
        return encode_conversation(tokenizer, messages, tools=tools, add_generation_prompt=True,
                                   enable_thinking=enable_thinking)[0]

    system = [m for m in messages[:1] if m["role"] in ("system", "developer")]
    turns = messages[len(system) :]
    questions = [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]
    ids = encode(system + turns)
    while len(ids) > max_tokens and questions:
        ids = encode(system + turns[questions[0] :])
        questions, turns = [i - questions[0] for i in questions[1:]], turns[questions[0] :]
    if len(ids) <= max_tokens:
        return ids, system + turns

    text = text_of(turns[-1]["content"])[-max_tokens * LONGEST_TOKEN :]

    def with_text_from(start: int) -> list[Message]:
        return [*system, *turns[:-1], {**turns[-1], "content": text[start:]}]

    def fits(start: int) -> bool:
        return len(encode(with_text_from(start))) <= max_tokens

    # Bisection finds a border between "too long" and "fits"; the search space ends with "".
    start = bisect.bisect_left(range(len(text) + 1), True, key=fits)
    if start > len(text):
        needed = len(encode(with_text_from(len(text))))
        raise ValueError(
            f"the system line and the template alone need {needed} tokens, max_seq_len leaves "
            f"{max_tokens}; raise --max_seq_len or shorten --system"
        )
    messages = with_text_from(start)
    return encode(messages), messages
