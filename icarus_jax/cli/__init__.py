"""What all programs share: flags, configs, and `build`, which makes an engine from a config.

Owns: --config and its errors, the default config, `build`. Takes: argv. Gives: an App (engine, tokenizer, heads).
"""

from icarus_jax.cli.composition import App, build, check_head, enable_compilation_cache, engine_config, served_names
from icarus_jax.cli.defaults import random_heads, serving_config, trained_heads
from icarus_jax.cli.flags import add_heads, define_heads, load_config, run
from icarus_jax.cli.paths import DATA, HOME, home_path
from icarus_jax.cli.serving import access, check_adapters, make_api, tracing, watching

__all__ = [
    "DATA",
    "HOME",
    "App",
    "access",
    "add_heads",
    "build",
    "check_adapters",
    "check_head",
    "define_heads",
    "enable_compilation_cache",
    "engine_config",
    "home_path",
    "load_config",
    "make_api",
    "random_heads",
    "run",
    "served_names",
    "serving_config",
    "tracing",
    "trained_heads",
    "watching",
]
