"""Many task models, one KV cache: ICaRus (arXiv 2603.13281) in JAX.

`LLM` is the library's front door; docs/architecture.md lists the rooms behind it.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icarus_jax.grammar.spec import StructuredOutputsParams
    from icarus_jax.llm import LLM
    from icarus_jax.scheduling.request import SamplingParams
    from icarus_jax.server.offline import RequestOutput

__all__ = ["LLM", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "__version__"]
_HOMES = {
    "LLM": "icarus_jax.llm",
    "RequestOutput": "icarus_jax.server.offline",
    "SamplingParams": "icarus_jax.scheduling.request",
    "StructuredOutputsParams": "icarus_jax.grammar.spec",
}


def __getattr__(name: str) -> Any:
    """Loads a public part when it is first used, so that importing the package loads no JAX."""
    import importlib

    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _version() -> str:
    """The version in pyproject.toml: of the installed package, or of the checkout that this file lies in."""
    try:
        return metadata.version("icarus-jax")
    except metadata.PackageNotFoundError:
        import tomllib
        from pathlib import Path

        with (Path(__file__).resolve().parents[1] / "pyproject.toml").open("rb") as file:
            return tomllib.load(file)["project"]["version"]
