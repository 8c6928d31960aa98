"""One config a recipe; its docstring says how to run it and what comes out.

`get_config` is a flat list of settings, which is why it may be long.
"""
