"""Where training text comes from, and how it becomes rows of tokens."""
