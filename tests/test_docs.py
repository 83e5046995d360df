"""What the documents tell a reader to type must work, and both languages must tell the same.

Every command in README.md, README_en.md and docs/ is parsed by the script it names: not run, but
given to that script's own settings, so that a renamed option breaks the test and not the reader.
"""
import dataclasses
import importlib
import importlib.util
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from transformers import AutoTokenizer, HfArgumentParser

from model import TOKENIZER_DIR
from model.conversation import encode_conversation

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "README_en.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
PAIRS = [(ROOT / "README.md", ROOT / "README_en.md")] + [
    (path, ROOT / "docs/en" / path.relative_to(ROOT / "docs"))
    for path in sorted((ROOT / "docs").rglob("*.md")) if ROOT / "docs/en" not in path.parents
]
FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
OTHERS_MODULES = {"pip", "venv", "pytest"}  # run with `python -m`, not ours


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language, without comments and indentation."""
    found = []
    for indent, name, body in FENCE.findall(text):
        if name == language:
            lines = [line.removeprefix(indent) for line in body.splitlines()]
            found.append("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    return found


def prose(text: str) -> str:
    """The document without its fenced blocks."""
    return FENCE.sub("", text)


def commands(text: str) -> list[list[str]]:
    """The words of each command that starts a script: in bash blocks, and in `code` in the text."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python|bash|torchrun) [^`]+)`", prose(text))
    found = []
    for line in lines:
        for part in re.split(r"&&|\||;", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):  # PIP_INDEX_URL=… bash setup.sh
                words.pop(0)
            if words and words[0] in ("python", "bash", "torchrun"):
                found.append(words)
    return found


@lru_cache
def parser_of(module_name: str) -> HfArgumentParser | None:
    """The parser over a script's own settings dataclass; None if it has none."""
    module = importlib.import_module(module_name)
    settings = [item for name, item in vars(module).items()
                if name.endswith("Settings") and dataclasses.is_dataclass(item)
                and item.__module__ == module_name]
    return HfArgumentParser(settings) if settings else None


@lru_cache
def lmdeploy_parser():
    """LMDeploy's own parser, with our commands in it."""
    import patches

    patches.register()
    from lmdeploy.cli.entrypoint import CLI, SubCliLite, SubCliServe

    for group in (CLI, SubCliServe, SubCliLite):
        group.add_parsers()
    return CLI.parser


def lmdeploy_fault(arguments: list[str]) -> str | None:
    """Why LMDeploy refuses a command line, or None; elsewhere than on Linux it cannot be asked."""
    if importlib.util.find_spec("lmdeploy") is None:
        return None
    try:
        lmdeploy_parser().parse_args(arguments)
    except SystemExit:
        return f"lmdeploy_cli.py refuses {' '.join(arguments)}"
    return None


def fault(words: list[str]) -> str | None:
    """Why a command cannot work, or None."""
    if words[0] == "torchrun":
        try:
            launch = get_args_parser().parse_args(words[1:])
        except SystemExit:
            return f"torchrun refuses {' '.join(words[1:])}"
        words = ["python", launch.training_script, *launch.training_script_args]
    program, words = words[0], words[1:]
    if program == "bash":
        script = ROOT / words[0]
        if not script.is_file():
            return f"no {words[0]}"
        source = script.read_text(encoding="utf-8")
        unknown = [word for word in words[1:] if word.startswith("--") and word not in source]
        return f"{words[0]} knows no {unknown[0]}" if unknown else None
    if words[0] == "-m":
        module_name, arguments = words[1], words[2:]
        if module_name in OTHERS_MODULES:
            return None
        if (ROOT / module_name.replace(".", "/") / "__main__.py").is_file():
            module_name += ".__main__"
    else:
        if not words[0].endswith(".py"):
            return f"{words[0]} is no script"
        module_name, arguments = words[0].removesuffix(".py").replace("/", "."), words[1:]
    path = ROOT / f"{module_name.replace('.', '/')}.py"
    if not path.is_file():
        return f"no {path.relative_to(ROOT)}"
    arguments = [word for word in arguments if word not in ("-h", "--help")]
    if module_name == "lmdeploy_cli":
        return lmdeploy_fault(arguments)
    parser = parser_of(module_name)
    if parser is None:
        source = path.read_text(encoding="utf-8")
        options = [word for word in arguments if word.startswith("--")]
        unknown = [option for option in options if f'"{option}"' not in source]
        return f"{path.name} knows no {unknown[0]}" if unknown else None
    try:
        parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (SystemExit, ValueError) as error:
        return f"{path.name} refuses {' '.join(arguments)}: {error}"
    return None


# ---- Commands -----------------------------------------------------------------------------------

@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_is_one_that_its_script_accepts(document):
    faults = {" ".join(words): fault(words) for words in commands(document.read_text("utf-8"))}
    assert not {command: why for command, why in faults.items() if why}


def test_the_readme_has_the_commands_of_all_its_stages():
    starts = {" ".join(words[:3]) if words[1] == "-m" else words[1]
              for words in commands((ROOT / "README.md").read_text("utf-8"))}
    assert starts >= {"quickstart.sh", "run_tests.sh", "setup.sh", "python -m dataset.starter",
                      "python -m dataset.download", "train_tokenizer.py", "train_pretrain.py",
                      "train_sft.py", "model_chat.py", "evaluate.py",
                      "convert_to_transformers.py", "lmdeploy_pipeline.py", "lmdeploy_cli.py",
                      "codeact_pipeline.py", "python -m codeact.internlm3"}


@pytest.mark.parametrize("command", [
    "python no_such_script.py",
    "python -m dataset.no_such_module",
    "python train_pretrain.py --no_such_option 1",
    "python train_sft.py --max_minutes four",
    "python model_chat.py --mode 2",
    "python -m benchmarks.tokenizer --no_such_option",
    "torchrun --nproc_per_node 2 train_pretrain.py --no_such_option",
    "torchrun --no_such_option 2 train_pretrain.py",
    "torchrun --nproc_per_node 2",
    "echo 你是谁 | python model_chat.py --no_such_option",
    "FAST=1 bash quickstart.sh --no_such_option",
    "bash no_such_script.sh",
    "python lmdeploy_cli.py serve no_such_server model",
    "python lmdeploy_cli.py serve gradio http://localhost:23333 --language fr",
    "python lmdeploy_cli.py lite auto_awq model --no-such-option",
])
def test_a_wrong_command_is_found(command):
    (words,) = commands(f"```bash\n{command}\n```\n")
    assert fault(words)


# ---- Links and pictures -------------------------------------------------------------------------

@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_relative_link_and_picture_exists(document):
    text = prose(document.read_text("utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    local = [target.split("#")[0] for target in targets if not re.match(r"https?://|#", target)]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_source_file_that_is_named_exists(document):
    named = re.findall(r"`((?:model|dataset|training|tests|benchmarks|docs|images)/[\w./-]+"
                       r"\.(?:py|txt|md|png))`", document.read_text("utf-8"))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


# ---- Outputs that can be checked at once --------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)


@pytest.mark.parametrize("name", ["README.md", "README_en.md"])
def test_the_tokens_shown_are_the_tokenizers(name, tokenizer):
    text = (ROOT / name).read_text("utf-8")
    lines = re.findall(r"^(\S+) +→ (.+?) +\[([\d, ]+)\]$", text, re.MULTILINE)
    assert len(lines) >= 5
    for text, pieces, ids in lines:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert encoded == [int(number) for number in ids.split(", ")]
        if "|" in pieces:
            assert pieces.split(" | ") == [tokenizer.decode([token]) for token in encoded]


@pytest.mark.parametrize("name", ["README.md", "README_en.md"])
def test_the_mask_shown_is_the_trainers(name, tokenizer):
    (shown,) = [block for block in blocks((ROOT / name).read_text("utf-8"), "") if "■" in block]
    expected = [(line[0], token) for line in shown.splitlines() for token in line[1:].split()]
    questions, answers = ("李白是谁", "那杜甫呢"), ("李白是唐代诗人。", "杜甫也是唐代诗人。")
    messages = [{"role": role, "content": text} for pair in zip(questions, answers, strict=True)
                for role, text in zip(("user", "assistant"), pair, strict=True)]
    ids, loss = encode_conversation(tokenizer, messages)
    tokens = [tokenizer.decode([token]).replace("\n", "\\n") for token in ids]
    assert expected == [("■" if learnt else "·", token)
                        for learnt, token in zip(loss, tokens, strict=True)]
    text = (ROOT / name).read_text("utf-8")
    assert re.search(rf"^(Of )?{len(ids)} (tokens|个 token 里有) {sum(loss)} ", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", "README_en.md"])
def test_the_conversation_shown_is_the_templates(name, tokenizer):
    shown = [block for block in blocks((ROOT / name).read_text("utf-8"), "")
             if "<tool_response>" in block]
    number = {"type": "number"}
    multiply = {"name": "multiply", "description": "两数相乘", "parameters": {
        "type": "object", "properties": {"a": number, "b": number}}}
    messages = [
        {"role": "user", "content": "34 乘 19 得多少？"},
        {"role": "assistant", "content": None, "reasoning_content": "用工具算。",
         "tool_calls": [{"name": "multiply", "arguments": {"a": 34, "b": 19}}]},
        {"role": "tool", "content": "646"},
        {"role": "assistant", "content": "34 乘 19 等于 646。"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tools=[multiply], tokenize=False)
    assert shown == [rendered.removesuffix("\n")]


# ---- Two languages ------------------------------------------------------------------------------

def test_both_languages_have_the_same_documents():
    docs, english = ROOT / "docs", ROOT / "docs/en"
    chinese = {path.relative_to(docs) for path in docs.rglob("*.md") if english not in path.parents}
    assert chinese and chinese == {path.relative_to(english) for path in english.rglob("*.md")}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].name)
def test_both_languages_have_the_same_shape_and_the_same_commands(pair):
    chinese, english = (path.read_text("utf-8") for path in pair)

    def levels(text: str) -> list[str]:
        return re.findall(r"^(#+) ", prose(text), re.MULTILINE)

    assert levels(chinese) == levels(english)
    assert [language for _, language, _ in FENCE.findall(chinese)] == [
        language for _, language, _ in FENCE.findall(english)]
    assert blocks(chinese, "bash") == blocks(english, "bash")
    assert commands(chinese) == commands(english)
    assert chinese.count("\n| ") == english.count("\n| ")  # rows of tables
    images = r"!\[[^\]]*\]\((?:\.\./)*([^)]+)\)"  # docs/en lies one folder deeper
    assert re.findall(images, chinese) == re.findall(images, english)


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_no_output_is_left_to_be_filled_in(document):
    assert not re.findall(r"RESULT_PENDING\([^)]*\)", document.read_text("utf-8"))
