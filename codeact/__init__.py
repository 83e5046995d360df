"""An agent that acts by writing Python, and the sandbox in which that Python runs."""
