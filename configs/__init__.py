"""One config a recipe; its docstring says how to run it and what comes out."""
