"""Tools as the prompt shows them."""
import inspect
from textwrap import indent


def describe(tool) -> str:
    """Signature and docstring of a function."""
    text = inspect.getdoc(tool) or ""
    return f"def {tool.__name__}{inspect.signature(tool)}:\n" + indent(f'"""{text}"""', "    ")
