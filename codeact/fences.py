"""The code in a model's answer.

Models do not write tidy Markdown. A regular expression over the whole answer takes JSON or a draft
inside `<think>` for code, and misses a block that is indented, ends at the last token or opens
behind a colon. So the answer is read line by line, as one would read it: outside of any block,
inside a fenced one (fences as in CommonMark 0.31, section 4.5), or inside `<think>`.
"""
import re
import textwrap
import tokenize
from collections.abc import Iterator

LANGUAGES = {"python", "python3", "py", "py3", "ipython"}
DOCUMENTS = {"markdown", "md"}  # a fence inside such a block is part of the document

FENCE = re.compile(r"[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)")  # alone on its line
MIDDLE = re.compile(  # behind some words, or with the code on the same line
    r"(?P<before>.*?)(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[A-Za-z]\w*)(?!\w)(?P<rest>.*)"
)
ATTRIBUTE = re.compile(r"\{|[\w-]+=[\"'{]")  # ```python title="a.py"
EXECUTE = re.compile(r"(?<!`)<execute>(.*?)(?:</execute>|\Z)", re.DOTALL)


def text_of(content: str | list[str | dict]) -> str:
    """The text of a message's content, which some endpoints send in parts: reasoning, pictures and
    whatever else is no text are left out."""
    if isinstance(content, str):
        return content
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return "".join(part.get("text") or "" for part in parts if part.get("type") == "text")


def code_of(text: str | list[str | dict]) -> str | None:
    """The Python to run in a model's answer, all its blocks one after the other; None if it has
    none. Blocks without a language or of another one are no code to run: they show something."""
    code = "\n\n".join(block for block in code_blocks(text_of(text)) if block.strip())
    return code or None


def code_blocks(text: str) -> list[str]:
    """Each block of Python in the answer, `<execute>` (the CodeAct paper's own mark) included."""
    blocks: list[str] = []
    lines = iter(text.replace("\r\n", "\n").split("\n"))
    for line in lines:
        if "</think>" in line:  # the template itself had opened it: all so far was a draft
            blocks.clear()
            line = line.partition("</think>")[2]
        elif line.lstrip().startswith("<think>"):
            line = after_thinking(line, lines)
        if re.search(r"(?<!`)<execute>", line):
            blocks += executed(line, lines)
        else:
            blocks += fenced(line, lines, blocks)
    return blocks


def after_thinking(line: str, lines: Iterator[str]) -> str:
    """What stands behind `</think>`; nothing if the answer ends before it."""
    while "</think>" not in line:
        line = next(lines, "</think>")
    return line.partition("</think>")[2]


def executed(line: str, lines: Iterator[str]) -> list[str]:
    """The blocks between `<execute>` in this line and `</execute>` or the end; inside may be bare
    code or a fence."""
    text = line
    while text.count("</execute>") < text.count("<execute>"):
        line = next(lines, None)
        if line is None:
            break
        text += f"\n{line}"
    contents = EXECUTE.findall(text)
    return [block for content in contents
            for block in code_blocks(content) or [textwrap.dedent(content).strip("\n")]]


def fenced(line: str, lines: Iterator[str], before: list[str]) -> list[str]:
    """The blocks of Python that begin in this line; reads on to the end of the last of them.

    A fence that opens before the last one was closed ends it: the model forgot to. `before` is
    emptied where what was read turns out to have been a draft.
    """
    blocks = []
    opening: str | None = line
    while opening is not None:
        fence, middle = FENCE.fullmatch(opening), MIDDLE.fullmatch(opening)
        if fence:
            mark, info = fence["mark"], fence["info"]
            language = re.match(r"[{.\s]*(\w*)", info)[1].lower()
            rest = info.lstrip("{. \t")[len(language):].strip(" \t}")
        elif middle and middle["language"].lower() in LANGUAGES:
            mark, language = middle["mark"], middle["language"].lower()
            rest = middle["rest"].strip()
        else:
            return blocks
        if mark in rest:  # all in one line
            return [*blocks, rest.partition(mark)[0].strip()] if language in LANGUAGES else blocks
        margin = re.match(r"[ \t]*", opening)[0]
        code = [] if not rest or ATTRIBUTE.match(rest) else [margin + rest]
        content, opening = until_closed(mark, language, lines)
        if opening is not None and "</think>" in opening:
            before.clear()
            blocks, code, content, opening = [], [], [], opening.partition("</think>")[2]
        if language in LANGUAGES:
            blocks.append(without_margin(code + content, margin))
    return blocks


def until_closed(
    mark: str, language: str, lines: Iterator[str]
) -> tuple[list[str], str | None]:
    """The lines of a block, and the line that ends it where that is no plain closing fence."""
    content: list[str] = []
    for line in lines:
        fence = FENCE.fullmatch(line)
        if language in LANGUAGES and mark in line and in_string(content):
            content.append(line)  # a fence that the code itself writes
        elif fence and fence["mark"].startswith(mark) and not fence["info"].strip():
            return content, None
        elif fence and fence["mark"].startswith(mark) and language not in DOCUMENTS:
            return content, line
        elif line.strip() == "</think>":
            return content, line
        elif line.rstrip().endswith(mark):
            return [*content, line.rstrip().rstrip(mark[0])], None
        else:
            content.append(line)
    if content and content[-1].strip() and mark.startswith(content[-1].strip()):
        content.pop()  # half a closing fence: the answer was cut there
    return content, None


def in_string(lines: list[str]) -> bool:
    """Whether code ends inside a string of several lines."""
    try:
        list(tokenize.generate_tokens(iter([f"{line}\n" for line in lines] + [""]).__next__))
    except tokenize.TokenError as error:
        return bool(re.search("multi-line string|triple-quoted", error.args[0]))
    except SyntaxError:  # an indentation that fits nothing: the code will not run anyway
        return False
    return False


def without_margin(lines: list[str], margin: str) -> str:
    """The code without the fence's own indentation (CommonMark), or, where the fence stood in a
    list and the code below it, without what all its lines share."""
    lines = [line[len(shared_start(line, margin)):] for line in lines]
    first = next((line for line in lines if line.strip()), "")
    code = "\n".join(lines)
    return textwrap.dedent(code) if first[:1] in (" ", "\t") else code


def shared_start(line: str, margin: str) -> str:
    """As much of the line's own indentation as the margin has."""
    return re.match(r"[ \t]*", line)[0][: len(margin)]
