"""What the model is told: how to act, which tools there are, what its code has printed.

The long prompt is for models that follow instructions. A small model learns the format in training
(`python -m dataset.codeact` writes its conversations with the short prompt), and each token that a
prompt takes is missing from its context.
"""
import ast
from collections.abc import Sequence

from .tools import describe

SYSTEM = {
    "en": """\
You solve tasks by writing Python code, which is run for you in an interactive session.

- To run code, write one block that begins with ```python and ends with ```, then stop. What it \
prints comes back to you in the next message; never write that output yourself.
- Only what is printed comes back: use print(...).
- Variables, functions and imports stay from one block to the next.
- The Python standard library, sympy and mpmath are installed; numpy and pandas are not. There is \
no network and no file of the user's.
- If an error comes back, find the cause, correct the code and run it again.
- When you know the answer, give it in plain words, without any code block.""",
    "zh": """\
你通过编写 Python 代码来解决问题，代码会在一个交互式会话中替你运行。

- 要运行代码，就写一个以 ```python 开头、以 ``` 结尾的代码块，然后停下。它打印的内容会在下一条消息里交给你；\
绝不要自己编写输出。
- 只有打印出来的内容才会交给你：请用 print(...)。
- 变量、函数和导入的模块会保留到后面的代码块。
- 可以使用 Python 标准库、sympy 和 mpmath；没有 numpy 和 pandas。没有网络，也没有用户的文件。
- 如果返回的是错误，找出原因，改正代码，再运行一次。
- 知道答案之后，直接用文字回答，不要再写代码块。""",
}
TOOLS = {
    "en": "These functions are already defined. Call them as they are; do not import or redefine "
          "them:",
    "zh": "下列函数已经定义好，直接调用即可，不要导入，也不要重新定义：",
}
SHORT_SYSTEM = {
    "en": "To compute, write Python in a ```python block and print the result; answer when you "
          "see the output.",
    "zh": "需要计算时，用```python代码块写Python并print结果，看到输出后再回答。",
}
SHORT_TOOLS = {"en": "Functions:", "zh": "可用函数："}

OUTPUT = {
    "en": "The code has been executed, and the output is as follows:",
    "zh": "代码已执行，输出如下：",
}
NO_OUTPUT = {
    "en": "The code has been executed, but it printed nothing; use print(...) to see a value.",
    "zh": "代码已执行，但没有打印任何内容；请用 print(...) 查看结果。",
}
ERROR = {
    "en": "The code has been executed, and it stopped with an error:",
    "zh": "代码执行时出错：",
}
STATE_LOST = {
    "en": "The Python session had to be restarted: all earlier variables, functions and imports "
          "are gone.",
    "zh": "Python 会话已重新启动：之前的变量、函数和导入都没有了。",
}
LAST_STEP = {
    "en": "No more code can be run for this question: answer now with what is known.",
    "zh": "这个问题不能再运行代码了：请根据已知的内容直接回答。",
}
STEP_LIMIT = {
    "en": "I have run code {steps} times without an answer; the step limit ends the attempt here.",
    "zh": "已运行 {steps} 次代码，仍没有得到答案；到达步数上限，就此停止。",
}


def system_prompt(tools: Sequence, language: str = "en", short: bool = False) -> str:
    """The system line for an agent with these tools, in "en" or "zh"; short: for a small model."""
    if not short:
        descriptions = "\n\n".join(describe(tool) for tool in tools)
        return SYSTEM[language] + (f"\n\n{TOOLS[language]}\n\n{descriptions}" if tools else "")
    lines = [brief(describe(tool)) for tool in tools]
    return "\n".join([SHORT_SYSTEM[language], *([SHORT_TOOLS[language], *lines] if tools else [])])


def brief(description: str) -> str:
    """A tool in one line: its call and the first line of its docstring."""
    (function,) = ast.parse(description).body
    call = f"{function.name}({ast.unparse(function.args)})"
    text = ast.get_docstring(function)
    return f"{call}: {text.splitlines()[0]}" if text else call


def describe_output(observation, language: str = "en") -> str:
    """What the model reads after its code has run: the text of the System Message.

    Args:
        observation: of the sandbox, with `output`, `error` and `state_lost`.
    """
    output = observation.output.rstrip("\n")
    if observation.error is not None:
        said = [ERROR[language], output, observation.error.strip("\n")]
    elif output.strip():
        said = [OUTPUT[language], output]
    else:
        said = [NO_OUTPUT[language]]
    said += [STATE_LOST[language]] if observation.state_lost else []
    return "\n".join(line for line in said if line)


def is_small(model_name: str) -> bool:
    """Whether a served model is one of this repository's own, which know the short prompt."""
    return "yuanmeng" in model_name.lower()
