"""Configs. --config=FILE:ARG loads a file of this folder by path and calls its `get_config(ARG)`.

Owns: the defaults of each program. Takes: the text after the file's name (FILE:ARG). Gives: a locked ConfigDict.
"""
