"""The programs. In an installed package they are icarus_jax.launch, with the commands icarus-serve and so on.

Owns: argv and what is printed. Takes: --config and flags. Gives: a run, with exit code 0, or 2 and one line of error.
"""
