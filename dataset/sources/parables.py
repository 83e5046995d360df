"""Chinese parables with five morals to choose from: evaluation only, never training text."""
import json
import re
import zipfile
from collections.abc import Iterator

MEMBER = "evals/registry/data/parable-to-moral-match/parable-to-moral-match-zh.jsonl"
MORALS = re.compile(r"\nA\) (.*) B\) (.*) C\) (.*) D\) (.*) E\) (.*?)\nThe output", re.S)


def choices(archive: zipfile.ZipFile) -> Iterator[dict]:
    for line in archive.read(MEMBER).decode("utf-8").splitlines():
        entry = json.loads(line)
        content = entry["input"][1]["content"]
        story = content.split("\nWhich moral")[0].strip()
        morals = MORALS.search(content)
        answer = re.search(r": ([A-E])", entry["ideal"][0])
        if morals and answer and len(story) <= 300:
            yield {"task": "parable", "kind": "choice", "passages": [story],
                   "question": f"{story}\n这个故事的寓意是：",
                   "choices": [moral.strip() for moral in morals.groups()],
                   "answer": "ABCDE".index(answer[1])}
