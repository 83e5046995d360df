"""CodeAct conversations for small models: tasks from templates, every observation a real one.

A *kind* (`kinds.py`) is one sort of task: it draws numbers, and knows the code that solves it and,
by a way of its own, what that code must print. `phrasings.txt` holds how people ask for it in
Chinese and English and how the answer is worded. `conversations.py` makes conversations of them,
`verification.py` runs their code in the sandbox and drops what is wrong.

What is held out from training, by content, so that training and evaluation can never meet:

- phrasings: the lines of `phrasings.txt` whose language is marked with `!`;
- numbers: a tenth of all tasks, by a hash of the code that solves them;
- functions: a tenth of all functions to be derived, by a hash of the function, whatever the point;
- the specification's own question: x·ln x together with the point π appears in no training row
  (the function at other points, and other functions at π, do).

The code of a task copies its numbers and expressions from the question, digit by digit (the
tokenizer gives each digit a token), and Python does the computing: a model of a few million
parameters learns to copy, it does not learn to multiply.
"""
