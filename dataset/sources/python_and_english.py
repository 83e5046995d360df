"""Python code and English prose from the standard library of the running interpreter (PSF licence).

Nothing has to be downloaded: every machine that runs this has both. The texts therefore differ a
little from one Python version to another.
"""
import ast
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset.text import bucket, pack

SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "__pycache__",
    "turtledemo",
    "ensurepip", "distutils", "msilib", "pydoc_data", "tkinter", "_pyrepl", "sqlite3", "ctypes",
    "_sysconfigdata", "config", "curses",
}
CODE_SIZE = 1500  # characters of a piece
ENGLISH_SIZE = 900
TABLES = re.compile(r"^\s*[\[({'\"0-9\\x,\s\])}:+-]+$")


def files(root: Path | None = None) -> list[Path]:
    """The library's readable modules in a fixed order."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in root.rglob("*.py")
             if not SKIPPED & set(path.relative_to(root).parts)
             and not path.name.startswith(("_sysconfigdata", "turtle", "_osx", "antigravity"))]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


@dataclass(frozen=True)
class Module:
    """One module's pieces of code, and of English prose: its docstrings, which the code repeats."""

    name: str
    code: tuple[str, ...]
    english: tuple[str, ...]


def read(paths: list[Path]) -> list[Module]:
    """All readable modules, each parsed once, and the topics behind help() as modules of prose."""
    topics = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    modules = [Module(f"topic {i}", (), tuple(english_pieces([text])))
               for i, text in enumerate(topic_texts(topics) if topics.exists() else ())]
    for path in paths:
        if found := readable(path):
            text, tree = found
            code = [piece for piece in chunks(text, tree) if 200 < len(piece) <= 2 * CODE_SIZE]
            name = "/".join(path.parts[-3:])
            modules.append(Module(name, tuple(code), tuple(english_pieces(docstrings(tree)))))
    return modules


def english_pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (p for p in pack(paragraphs(text), ENGLISH_SIZE) if len(p) > 80)


def readable(path: Path) -> tuple[str, ast.Module] | None:
    """A module's text and syntax tree; None if it is not ASCII, does not parse or is a table."""
    try:
        text = path.read_text(encoding="ascii")
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, OSError):
        return None
    lines = [line for line in text.split("\n") if line.strip()]
    tables = sum(bool(TABLES.match(line)) for line in lines)
    return (text, tree) if tables <= len(lines) / 3 else None


def chunks(source: str, tree: ast.Module, size: int = CODE_SIZE) -> list[str]:
    """Split one module where a top-level statement, or a method of a class, begins."""
    lines = source.split("\n")

    def first_line(node: ast.stmt) -> int:
        decorators = getattr(node, "decorator_list", [])
        return min([node.lineno, *(d.lineno for d in decorators)]) - 1

    starts = {0, len(lines)}
    for node in tree.body:
        starts.add(first_line(node))
        if isinstance(node, ast.ClassDef):
            starts.update(first_line(child) for child in node.body
                          if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))
    borders = sorted(starts)
    parts = ["\n".join(lines[a:b]) for a, b in zip(borders, borders[1:])]
    return [text.strip("\n") for text in pack(parts, size)]


def topic_texts(path: Path) -> Iterator[str]:
    """The string values of `pydoc_data/topics.py`, read without running it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of the module, its classes and their functions."""
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        text = ast.get_docstring(node)
        if text and len(text) > 60:
            yield text
        nodes += [child for child in node.body
                  if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs that are English sentences: tables, code and signatures are left out."""
    for block in re.split(r"\n\s*\n", text):
        block = re.sub(r"\s+", " ", re.sub(r"[*`]{1,2}|\"{2}", "", block)).strip(" -")
        words = re.findall(r"[A-Za-z]+", block)
        if (len(words) > 6 and block[-1:] in ".!?:" and sum(map(len, words)) > 0.7 * len(block)
                and ">>>" not in block and "::" not in block):
            yield block


def drawn(pieces: Iterable[str], budget: int) -> Iterator[str]:
    """Pieces in the order of their hash until `budget` characters are spent."""
    for piece in sorted(pieces, key=lambda piece: bucket(piece, 2**60)):
        if budget < 0:
            return
        budget -= len(piece)
        yield piece
