"""The shapes in which people have records, each turned into one of two internal forms.

A pretraining record becomes its text. A conversation becomes

    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": str,
                   "reasoning_content": str, "tool_calls": [{"name": str, "arguments": dict}],
                   "learn": False}, ...],
     "tools": [{...}, ...]}

where all but role and content may be missing, and `"learn": False` marks an assistant's message
that is read and not learnt (`model/conversation.py`). It begins with an optional system message;
then come user and assistant in turn, and tools after an assistant who called them; the assistant
has the last word. What can be brought into this order without a doubt is, and is counted.
"""
import json
from collections import Counter

TEXTS, CONVERSATIONS, MESSAGES = "texts", "conversations (role, content)", "OpenAI messages"
SHAREGPT, ALPACA = "ShareGPT (from, value)", "Alpaca"
PREFERENCES, PROMPTS = "preference pairs (chosen, rejected)", "prompts with gt"
LABELLED = "answers labelled good or bad (label)"
MEDIA = ("images", "image", "videos", "audios")  # beside the conversation, in multimodal data
KNOWN_SHAPES = (
    'Known are {"text"} for pretraining, and for fine-tuning {"conversations": [{"role", "content"}]}, '
    '{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]} and {"instruction", '
    '"input", "output"}. For example: {"messages": [{"role": "user", "content": "你好"}, {"role": '
    '"assistant", "content": "你好！"}]}'
)
ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "tool": "tool", "function": "tool",
    # ShareGPT's names, as found in public data
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "observation": "tool", "function_call": "call",
}
STAGE_OF = {  # who can use which shape
    TEXTS: "pretraining (train_pretrain.py)",
    PREFERENCES: "training on preferences, a later stage",
    LABELLED: "training on preferences, a later stage",
    PROMPTS: "reinforcement learning, a later stage",
}
FINE_TUNING = "fine-tuning (train_sft.py)"


class Fault(ValueError):
    """Why a record cannot be used, in a few words."""


class WrongShape(Fault):
    """The record has no known shape, or one of another stage, as have its neighbours no doubt."""


def shape_of(record: object) -> str:
    """The name of a record's shape. Raises `WrongShape`, or `Fault` if it is no object."""
    if not isinstance(record, dict):
        raise Fault(f"wrong type: expected an object, found {json_type(record)}")
    if None in record:  # as Python's reader of CSV has it
        raise Fault("the row has more columns than the first one names")
    names = [name for name in ("chosen", "chosen_messages") if record.get(name) is not None]
    if names and record.get(names[0].replace("chosen", "rejected")) is not None:
        return PREFERENCES
    for field, shape in (("conversations", CONVERSATIONS), ("messages", MESSAGES)):
        turns = record.get(field)
        if turns is not None:
            if record.get("gt") is not None:
                return PROMPTS
            if isinstance(record.get("label"), bool):
                return LABELLED
            first = turns[0] if isinstance(turns, list) and turns else None
            if isinstance(first, dict) and "from" in first and "role" not in first:
                return SHAREGPT
            return SHAREGPT if isinstance(turns, str) and '"from"' in turns else shape
    if record.get("instruction") is not None and "output" in record:
        return ALPACA
    if "text" in record:
        return TEXTS
    if "conversations" in record or "messages" in record:
        raise Fault(f'"{"conversations" if "conversations" in record else "messages"}" is null')
    fields = ", ".join(map(str, record))[:100] or "none"
    raise WrongShape(f"unknown shape: its fields are {fields}. {KNOWN_SHAPES}")


def text_of(record: object) -> str:
    """The text of a pretraining record. Raises `Fault`."""
    shape = shape_of(record)
    if shape != TEXTS:
        raise WrongShape(f"{shape}: data for {STAGE_OF.get(shape, FINE_TUNING)}, not for pretraining, "
                         'which takes {"text": "…"}')
    return checked_text('"text"', record["text"])


def conversation_of(record: object, mended: Counter) -> tuple[str, dict]:
    """The shape of an SFT record, and the conversation in it in the internal form.

    `mended` counts what was brought into order. Raises `Fault`.
    """
    shape = shape_of(record)
    if shape in STAGE_OF:
        raise WrongShape(f"{shape}: data for {STAGE_OF[shape]}, not for fine-tuning")
    if media := [name for name in MEDIA if record.get(name)]:
        raise Fault(f"comes with {media[0]}: this model reads text only")
    tools = record.get("tools")
    if shape == ALPACA:
        turns = _alpaca_turns(record)
    else:
        field = "conversations" if record.get("conversations") is not None else "messages"
        turns = parsed(record[field], field)
        if not isinstance(turns, list):
            raise Fault(f'wrong type: "{field}" must be a list, found {json_type(turns)}')
        if not turns:
            raise Fault("empty conversation")
        if shape == SHAREGPT and record.get("system"):
            turns = [{"from": "system", "value": record["system"]}, *turns]
    messages = []
    for number, turn in enumerate(turns, 1):
        try:
            messages.append(_message(turn, shape == SHAREGPT))
        except Fault as fault:
            raise Fault(f"message {number}: {fault}") from None
        if messages[-1]["role"] == "system":
            tools = tools or turn.get("tools") or turn.get("functions")
    conversation = {"messages": _in_order(messages, mended)}
    tools = parsed(tools, "tools") if tools else None
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise Fault('"tools" must be a list of objects')
        conversation["tools"] = tools
    return shape, conversation


def _alpaca_turns(record: dict) -> list[dict]:
    def text(field: str) -> str:
        value = record.get(field)
        return "" if value is None else checked_text(f'"{field}"', value, may_be_empty=True)

    history = parsed(record.get("history") or [], "history")
    if not isinstance(history, list) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise Fault('"history" must be a list of [question, answer] pairs')
    question = "\n".join(part for part in (text("instruction"), text("input")) if part.strip())
    turns = [{"role": "system", "content": text("system")}] if text("system") else []
    for asked, answered in [*history, [question, text("output")]]:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return turns


def _message(turn: object, sharegpt: bool) -> dict:
    """One message in the internal form, its content checked."""
    if not isinstance(turn, dict):
        raise Fault(f"wrong type: must be an object, found {json_type(turn)}")
    role_field, content_field = ("from", "value") if sharegpt else ("role", "content")
    if role_field not in turn:
        raise Fault(f'missing field "{role_field}"')
    role, content = turn[role_field], turn.get(content_field)
    role = ROLES.get(role) if isinstance(role, str) else None
    if role is None:
        raise Fault(f"unknown role {json.dumps(turn[role_field], ensure_ascii=False)[:40]}")
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content)}
    calls = turn.get("tool_calls") or turn.get("function_call")
    if content_field not in turn and not calls:
        raise Fault(f'missing field "{content_field}"')
    if isinstance(content, list):
        content = "\n".join(map(_part, content))
    elif content is None and (calls or role == "system"):
        content = ""
    may_be_empty = bool(calls) or role in ("system", "tool")
    message = {"role": role,
               "content": checked_text(f'"{content_field}"', content, may_be_empty)}
    if role == "assistant":
        if calls:
            message["tool_calls"] = _calls(calls)
        thought = turn.get("reasoning_content")
        if thought and checked_text('"reasoning_content"', thought, may_be_empty=True).strip():
            message["reasoning_content"] = thought
        if turn.get("learn") is False:
            message["learn"] = False
    return message


def _part(part: object) -> str:
    """The text of one part of an OpenAI message's content."""
    if isinstance(part, dict) and part.get("type") == "text":
        text = part.get("text", part.get("value"))  # LLaMA-Factory's second form has "value"
        return checked_text('the "text" of a part', text, may_be_empty=True)
    kind = part.get("type") if isinstance(part, dict) else json_type(part)
    raise Fault(f'a part of its content is {kind!r}: this model reads text only')


def _calls(calls: object) -> list[dict]:
    """Tool calls as [{"name", "arguments"}], from a list of them or JSON text."""
    calls = parsed(calls, "tool_calls")
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call.get("function") or call if isinstance(call, dict) else {}
        arguments = parsed(call.get("arguments", {}) or {}, "arguments")
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            raise Fault('a tool call must be {"name": "…", "arguments": {…}}')
        found.append({"name": call["name"], "arguments": arguments})
    return found


def _in_order(messages: list[dict], mended: Counter) -> list[dict]:
    """The messages in an order that a chat can have; see the module's description."""
    kept: list[dict] = []
    for number, message in enumerate(messages, 1):
        role, last = message["role"], kept[-1] if kept else None
        if role == "system":
            if last is not None and last["role"] != "system":
                raise Fault(f"message {number}: a system message after the conversation has begun")
            if not message["content"].strip():
                mended["empty system messages skipped"] += 1
                continue
        if last is None and role == "assistant" or (
                last is not None and last["role"] == "system" and role == "assistant"):
            mended["assistant turns before the first question cut"] += 1
            continue
        if role == "tool" and (last is None or last["role"] not in ("assistant", "tool")):
            raise Fault(f"message {number}: a tool's result without a call before it")
        joins = last is not None and last["role"] == role and role != "tool" and (
            last.get("learn") == message.get("learn")) and not (
            "tool_calls" in last and message["content"])  # written after the call
        if not joins:
            kept.append(message)
            continue
        mended[f"{role} turns in a row joined"] += 1
        both = {**last, **message, "content": "\n".join(
            text for text in (last["content"], message["content"]) if text)}
        calls = last.get("tool_calls", []) + message.get("tool_calls", [])
        kept[-1] = {**both, "tool_calls": calls} if calls else both
    if not any(message["role"] == "assistant" for message in kept):
        raise Fault("no assistant turn after a question")
    while kept[-1]["role"] != "assistant":
        mended[f"last {kept[-1]['role']} turns without an answer cut"] += 1
        kept.pop()
    return kept


def parsed(value: object, name: str) -> object:
    """JSON text becomes what it says; anything else stays. Raises `Fault`."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Fault(f'"{name}" is text, but no JSON: {value[:40]!r}') from None


def checked_text(name: str, value: object, may_be_empty: bool = False) -> str:
    """`value` if it is text that can be trained on. Raises `Fault`."""
    if not isinstance(value, str):
        raise Fault(f"wrong type: {name} must be a string, found {json_type(value)}")
    if not may_be_empty and not value.strip():
        raise Fault(f"empty {name}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Fault(f"{name} holds half of a surrogate pair (\\u{ord(value[error.start]):04x})"
                    ) from None
    return value


def json_type(value: object) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean",
             int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
