"""Engine options are checked before anything is loaded."""

import pytest

from icarus_jax.config import DTYPES, EngineConfig


@pytest.mark.parametrize("field", ["dtype", "kv_dtype"])
@pytest.mark.parametrize("value", ["int8", "float8_e4m3fn", "float16", "bf16", ""])
def test_a_dtype_that_is_not_served_is_refused(field, value):
    """K/V pages of 8 bits would be rounded without a scale."""
    with pytest.raises(ValueError, match=f"engine.{field}='{value}'.*float32, bfloat16"):
        EngineConfig(**{field: value})


@pytest.mark.parametrize("value", DTYPES)
def test_the_dtypes_that_are_served(value):
    config = EngineConfig(dtype=value, kv_dtype=value)
    assert (config.dtype, config.kv_dtype) == (value, value)
