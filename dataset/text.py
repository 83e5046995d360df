"""Small repairs and cuts on Chinese text, used by every source of the starter corpus."""
import hashlib
import re
from collections.abc import Iterable, Iterator

LEAST = 24  # bytes of UTF-8: 8 Han characters, or 24 letters, about 4 words
NOT_HAN = re.compile(r"[^\u4e00-\u9fff]+")
NOT_LETTERS = re.compile(r"[\W_]+")  # what is left: letters of all scripts, and digits
NOT_SPOKEN = re.compile(r"[^\w+\-×÷*/]+|_")
SPOKEN_SIGN = re.compile(r"(?<=\d)[x*/](?=\d)")
SIGNS = {"x": "×", "*": "×", "/": "÷"}
# Missing characters (□, （缺）), private-use glyphs and rare planes: such text cannot be repaired.
UNREADABLE = re.compile(
    r"[□■◇○●\ufffd\ue000-\uf8ff\U00020000-\U0003ffff\u3400-\u4dbf]|[（(\[]?[缺阙][）)\]]|[{}<>]"
)
SENTENCE_END = re.compile(r"(?<=[。！？；])(?![”’」）])")
MARKS = str.maketrans("﹑「」『』", "、“”‘’")
SPACES = re.compile(r"[ \t\r\u3000\xa0]+")
LINE_BREAKS = re.compile(r"\s*\n\s*")
FULL = dict(zip(",;:?!", "，；：？！"))
HALF_WIDTH = re.compile(r"[,;:?!\"]")
HALF_MARK = re.compile(r"(?<=[\u4e00-\u9fff”》）])([,;:?!]) ?")
QUOTED = re.compile(r'"([^"\n]{1,40})"')
INNER_SPACE = re.compile(r"(?<=[\u4e00-\u9fff，。；：！？、]) (?=[\u4e00-\u9fff，。；：！？、])")
ORIGIN = re.compile(
    r"》(?:第?[零〇一二三四五六七八九十百]+[回折章出卷]|卷[上中下零〇一二三四五六七八九十百]+"
    "|之[一二三四五六七八九十]+|套曲|诗|词)?"
)
QUOTE_AFTER = re.compile(r"(?:亦作|又作|也作|参见|详见|亦称|也说|也称|[同见作称叫谓曰云说道即为指的，。、；：])")


def han(text: str) -> str:
    """Only the Han characters."""
    return NOT_HAN.sub("", text)


def letters(text: str) -> str:
    """Only letters, digits and Han characters, in lower case: how two texts are compared."""
    return NOT_LETTERS.sub("", text).lower()


def is_specific(text: str) -> bool:
    """Whether a text is so long that two of the same are no chance."""
    return len(letters(text).encode()) >= LEAST


def spoken(question: str) -> str:
    """`letters` and the signs of arithmetic, each in one form: how two questions are compared.

    `3 x 4 = ?` and `3×4=` are the same question.
    """
    question = NOT_SPOKEN.sub("", question).lower()
    return SPOKEN_SIGN.sub(lambda match: SIGNS[match[0]], question)


def bucket(key: str, buckets: int) -> int:
    """A stable number in 0…buckets-1: decides by content what is held out or sampled."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % buckets


def tidy(text: str) -> str:
    """One kind of space, full-width marks between Han characters, no blank lines."""
    text = SPACES.sub(" ", text.translate(MARKS))
    if "\n" in text:
        text = LINE_BREAKS.sub("\n", text)
    if HALF_WIDTH.search(text):
        text = HALF_MARK.sub(lambda match: FULL[match[1]], text)
        text = QUOTED.sub(r"“\1”", text)
    return INNER_SPACE.sub("", text).strip()


def finish(text: str) -> str:
    """Make a definition end like a sentence."""
    text = text.rstrip(" ，、；：,;:")
    return text if not text or text[-1] in "。！？”）》…" else text.rstrip(".") + "。"


def restore_quotes(text: str) -> str:
    """Put back the opening quotation marks that the dictionaries have lost.

    `《庄子》天地一指也。”` becomes `《庄子》：“天地一指也。”`; a closing mark for which no place
    is plain is dropped, and so is an opening mark that never closes.
    """
    out: list[str] = []
    for piece in re.split(r"(?<=”)", text):
        if piece.endswith("”") and "“" not in piece:
            piece = piece[:-1]
            titles = list(ORIGIN.finditer(piece))
            words = list(QUOTE_AFTER.finditer(piece, max(0, len(piece) - 14)))
            if titles and titles[-1].end() < len(piece):
                at = titles[-1].end()
                marked = piece[at] in "：，。"
                head = piece[: at + 1] if marked else f"{piece[:at]}："
                piece = f"{head}“{piece[at + marked:]}”"
            elif words and words[-1].end() < len(piece):
                piece = f"{piece[:words[-1].end()]}“{piece[words[-1].end():]}”"
        elif "“" in piece and not piece.endswith("”"):
            piece = piece.replace("“", "")
        elif piece.count("“") > 1:
            first, rest = piece.split("“", 1)
            piece = first + "“" + rest.replace("“", "")
        out.append(piece)
    return "".join(out)


def cut(text: str, limit: int) -> str:
    """The longest run of whole sentences within `limit` characters, or '' if none fits."""
    taken = ""
    for sentence in SENTENCE_END.split(text):
        if len(taken) + len(sentence) > limit:
            break
        taken += sentence
    return taken.strip().rstrip("；") + "。" if taken.strip().endswith("；") else taken.strip()


def pack(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Join neighbouring pieces with newlines into texts of about `size` characters."""
    held: list[str] = []
    length = 0
    for piece in pieces:
        if held and length + len(piece) > size:
            yield "\n".join(held)
            held, length = [], 0
        held.append(piece)
        length += len(piece)
    if held:
        yield "\n".join(held)


def sentences(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of whole sentences of at most about `size` characters."""
    taken = ""
    for sentence in SENTENCE_END.split(text):
        if taken and len(taken) + len(sentence) > size:
            yield taken.strip()
            taken = ""
        taken += sentence
    if taken.strip():
        yield taken.strip()
