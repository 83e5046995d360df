"""Which code of a model's answer is run: what models write, tidy or not."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeact.fences import LANGUAGES, code_of, text_of

CODE = "x = 1\nprint(x)"
FUNCTION = "def f():\n    return 1"


@pytest.mark.parametrize("answer, code", {
    "plain": (f"So:\n```python\n{CODE}\n```\nThat is all.", CODE),
    "tildes": (f"~~~python\n{CODE}\n~~~", CODE),
    "longer fence": (f"````py\n{CODE}\n````", CODE),
    "capital": (f"```Python\n{CODE}\n```", CODE),
    "space before the language": (f"``` python\n{CODE}\n```", CODE),
    "attributes": (f'```python title="a.py"\n{CODE}\n```', CODE),
    "pandoc": (f"```{{.python}}\n{CODE}\n```", CODE),
    "windows lines": (f"```python\n{CODE}\n```\n".replace("\n", "\r\n"), CODE),
    "indented": ("1. Run\n   ```python\n   def f():\n       return 1\n   ```\n2.", FUNCTION),
    "in a list": ("- ```python\n  def f():\n      return 1\n  ```", FUNCTION),
    "mid-line": (f"Here it is: ```python\n{CODE}\n```", CODE),
    "one line": ("Just ```python print(1)``` then.", "print(1)"),
    "code beside the fence": ("```python print(1)\nprint(2)\n```", "print(1)\nprint(2)"),
    "first line without spaces": ("```python\nx\n```", "x"),
    "unterminated": (f"```python\n{CODE}", CODE),
    "cut in the fence": (f"```python\n{CODE}\n``", CODE),
    "closed behind the code": (f"```python\n{CODE}```", CODE),
    "not closed before the next": (f"```python\n{CODE}\n```python\ny\n```", f"{CODE}\n\ny"),
    "not closed before the output": (f"```python\n{CODE}\n```output\n1\n```", CODE),
    "two blocks": (f"```python\n{CODE}\n```\nthen\n```python\ny\n```", f"{CODE}\n\ny"),
    "behind an unclosed block": (f"```json\n{{}}\n```python\n{CODE}\n```", CODE),
    "fence inside a string": ("```python\ns = '''\n```\n'''\n```\nend", "s = '''\n```\n'''"),
    "fence in a line of code": ('```python\ns = "```"\nprint(s)\n```', 's = "```"\nprint(s)'),
    "escapes stay": ("```python\nprint('a\\nb')\n```", "print('a\\nb')"),
    "think": (f"<think>\n```python\nbad\n```\n</think>\n```python\n{CODE}\n```", CODE),
    "think, open fence": (f"<think>\n```python\nbad\n</think>\n```python\n{CODE}\n```", CODE),
    "think in one line": (f"<think>hm</think>```python\n{CODE}\n```", CODE),
    "think by the template": (f"```python\nbad\n```\n</think>\n```python\n{CODE}\n```", CODE),
    "the same, fence left open": (f"```python\nbad\n</think>\n```python\n{CODE}\n```", CODE),
    "think inside the code": ("```python\nx = '<think>'\n```", "x = '<think>'"),
    "execute": (f"<execute>\n{CODE}\n</execute>", CODE),
    "execute in a line": ("so <execute>print(1)</execute>", "print(1)"),
    "execute left open": (f"<execute>\n{CODE}", CODE),
    "execute with a fence": (f"<execute>\n```python\n{CODE}\n```\n</execute>", CODE),
    "execute is only named": (f"Use `<execute>`:\n```python\n{CODE}\n```", CODE),
}.values())
def test_code_is_found(answer, code):
    assert code_of(answer) == code


@pytest.mark.parametrize("answer", [
    "", "The result is 3.", "```\n3\n```", '```json\n{"a": 1}\n```', "```bash\nrm -rf /\n```",
    "```pythonic\nx\n```", "inline ```code``` only", "```python\n\n```", "````\n```\n````",
    "````markdown\n```python\nbad\n```\n````", "```markdown\n```python\nbad\n```\n```",
    "<think>\n```python\nbad\n```\n</think>\nThe result is 3.", "<think>\n```python\nbad\n```",
    "```python\nbad\n</think>\nThe result is 3.", "The `python` language, and ``x``.",
    "~~~text\nnothing\n~~~",
])
def test_what_is_no_code_to_run_is_not_run(answer):
    assert code_of(answer) is None


def test_content_in_parts_is_read_and_reasoning_is_not():
    content = [{"type": "reasoning", "text": "```python\nbad\n```"}, "So:\n",
               {"type": "text", "text": f"```python\n{CODE}\n```"}, {"type": "image_url"}]
    assert code_of(content) == CODE
    assert text_of(content) == f"So:\n```python\n{CODE}\n```"
    assert code_of([]) is None


LINES = st.lists(st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="`~<'\"")))


@given(LINES, LINES, st.sampled_from(sorted(LANGUAGES)), st.sampled_from(["```", "~~~~"]))
def test_any_code_comes_back_as_it_was(lines, prose, language, mark):
    code, around = "\n".join(lines), "\n".join(prose)
    found = code_of(f"{around}\n{mark}{language}\n{code}\n{mark}\n{around}")
    if not code.strip():
        assert found is None
    elif code.lstrip("\n")[:1] not in (" ", "\t"):
        assert found == code


@given(st.text(st.sampled_from(list("`~\n <>/ax'\"")) , max_size=80)
       | st.lists(st.sampled_from(["```", "~~~", "python", "\n", "<think>", "</think>", "x",
                                   "<execute>", "</execute>", " ", "'''", "json"])).map("".join))
def test_no_answer_breaks_the_parser(answer):
    code = code_of(answer)
    assert code is None or code.strip()
