"""Where the starter corpus comes from: one module per kind of source.

Each module turns one package into plain entries (`read`), the entries into pretraining texts
(`texts`), and, where it can, into conversations (`chats`) and multiple-choice items (`choices`).
"""
