"""The CodeAct agent (arXiv 2402.01030): it acts by writing Python, which runs in a sandbox.

`install.py` sets the sandbox up, once; `sandbox.py` is what an agent uses: one process per
conversation, whose variables live from step to step. `process.py` starts such a process,
`interpreter.py` speaks with it, `tools.py` makes the host's functions callable from within, and
`runner/` is what runs inside. docs/sandbox.md says what is promised, and by which layer.
"""
