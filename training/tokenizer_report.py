"""What a tokenizer must prove before it is used: how many bytes a token holds, and no faults."""
import re
from collections.abc import Iterable

import jinja2
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

KINDS = ("zh", "en", "code")
CODE_LINE = re.compile(r"^\s*(def |class |import |from \w+ import |return\b|if .*:$|[@#}])", re.M)
NUM_PLANES = 17
PLANE_SIZE = 2**16

# Chats that the template must write as below: a plain one, and one with all that it can write.
CHAT = [{"role": "user", "content": "你好"}]
TOOL_CHAT = [
    {"role": "system", "content": "短答。"}, {"role": "user", "content": "2乘3？"},
    {"role": "assistant", "content": "", "reasoning_content": "用工具。",
     "tool_calls": [{"name": "multiply", "arguments": {"a": 2, "b": 3}}]},
    {"role": "tool", "content": "6"}, {"role": "assistant", "content": "6。"},
]
TOOLS = [{"type": "function", "function": {"name": "multiply", "description": "两数相乘"}}]
TOOL_CHAT_SYSTEM = """<s>system
短答。

可以调用的工具：
<tools>
{"name": "multiply", "description": "两数相乘"}
</tools>
调用时写：
<tool_call>
{"name": 工具名, "arguments": 参数}
</tool_call></s>
<s>user
2乘3？</s>
<s>assistant
"""
TOOL_CHAT_SAID = """<think>
用工具。
</think>

<tool_call>
{"name": "multiply", "arguments": {"a": 2, "b": 3}}
</tool_call></s>"""
TOOL_CHAT_END = """
<s>user
<tool_response>
6
</tool_response></s>
<s>assistant
6。</s>
"""


def text_kind(text: str) -> str:
    """"zh" if Han characters stand out, "code" if many lines look like a program, else "en"."""
    han = sum("\u4e00" <= char <= "\u9fff" for char in text)
    if han > 0.1 * len(text):
        return "zh"
    return "code" if len(CODE_LINE.findall(text)) > 0.1 * (text.count("\n") + 1) else "en"


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> float:
    """UTF-8 bytes per token over all texts: higher means fewer tokens, so shorter sequences."""
    texts = list(texts)
    backend = tokenizer.backend_tokenizer  # unlike the wrapper, it does not warn of long texts
    num_tokens = sum(len(encoding.ids) for encoding in backend.encode_batch(texts))
    return sum(len(text.encode()) for text in texts) / num_tokens


def broken_characters(tokenizer: PreTrainedTokenizerBase, plane: int) -> list[str]:
    """The blocks ("U+0400…") of a Unicode plane that do not survive encoding and decoding.

    All 65,536 code points are tried, assigned or not, without the surrogates, which no UTF-8 text
    can hold.
    """
    broken = []
    for start in range(plane * PLANE_SIZE, (plane + 1) * PLANE_SIZE, 256):
        text = "".join(chr(code) for code in range(start, start + 256)
                       if not 0xD800 <= code <= 0xDFFF)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(ids) != text:
            broken.append(f"U+{start:04X}…")
    return broken


def find_faults(tokenizer: PreTrainedTokenizerBase, default_system: str) -> list[str]:
    """Everything that would spoil training or chatting; an empty list for a good tokenizer."""
    faults = []
    for expected, name in enumerate(("<unk>", "<s>", "</s>")):
        found = tokenizer.convert_tokens_to_ids(name)
        if found != expected:
            faults.append(f"{name} has id {found}, not {expected}")
    roles = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    if roles != (0, 1, 2):
        faults.append(f"pad, bos, eos are {roles}, not (0, 1, 2)")
    for plane in range(NUM_PLANES):
        if broken := broken_characters(tokenizer, plane):
            faults.append(f"plane {plane} does not survive a round trip: {', '.join(broken)}")
    if 1 in (ids := tokenizer.encode("<s>", split_special_tokens=True)):
        faults.append(f"the text <s> in the data becomes the special token: {ids}")
    return faults + template_faults(tokenizer, default_system)


def template_faults(tokenizer: PreTrainedTokenizerBase, default_system: str) -> list[str]:
    """What the chat template writes wrong, for a plain chat and for one with tools and thoughts."""
    prompt = f"<s>system\n{default_system}</s>\n<s>user\n你好</s>\n<s>assistant\n"
    tools = {"conversation": TOOL_CHAT, "tools": TOOLS}
    cases = [
        ("", prompt, {"conversation": CHAT, "add_generation_prompt": True}),
        (" for thoughts", prompt + "<think>\n",
         {"conversation": CHAT, "add_generation_prompt": True, "enable_thinking": True}),
        (" without thoughts", prompt + "<think>\n\n</think>\n\n",
         {"conversation": CHAT, "add_generation_prompt": True, "enable_thinking": False}),
        (" for tools", TOOL_CHAT_SYSTEM + TOOL_CHAT_SAID + TOOL_CHAT_END, tools),
    ]
    faults = []
    try:
        for case, expected, chat in cases:
            found = tokenizer.apply_chat_template(tokenize=False, **chat)
            if found != expected:
                faults.append(f"the chat template gives{case} {found!r}")
        encoded = tokenizer.apply_chat_template(
            return_dict=True, return_assistant_tokens_mask=True, **tools)
    except jinja2.TemplateError as error:
        return [*faults, f"the chat template fails: {error}"]
    said = tokenizer.decode([token for token, mask in zip(
        encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask])
    if said != TOOL_CHAT_SAID + "6。</s>":
        faults.append(f"the chat template marks as said by the assistant: {said!r}")
    return faults


def print_report(
    console: Console,
    tokenizer: PreTrainedTokenizerBase,
    previous: PreTrainedTokenizerBase | None,
    heldout: list[str],
    faults: list[str],
) -> None:
    """Print bytes per token on text that was not trained on, beside the previous tokenizer's."""
    table = Table(title="Bytes per token on held-out text (higher is better)")
    for column in ("text", "KB", "previous", "new", "change"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for kind in KINDS:
        texts = [text for text in heldout if text and text_kind(text) == kind]
        if not texts:
            table.add_row(kind, "0", "–", "–", "–")
            continue
        new = bytes_per_token(tokenizer, texts)
        old = bytes_per_token(previous, texts) if previous else None
        table.add_row(kind, f"{sum(len(text.encode()) for text in texts) / 1000:.0f}",
                      f"{old:.3f}" if old else "–", f"{new:.3f}",
                      f"{new / old - 1:+.2%}" if old else "–")
    console.print(table)
    console.print(f"Entries: {len(tokenizer)}. Special ids: <unk> 0 (pad), <s> 1, </s> 2.")
    console.print("Checked: special ids, all code points of all 17 Unicode planes there and back, "
                  "special tokens in data stay text, chat template with tools and thoughts.")
    for fault in faults:
        console.print(f"[red]Fault:[/red] {fault}", markup=True)
    if not faults:
        console.print("No faults.")
