"""Engine options are checked before anything is loaded."""

import pytest

from icarus_jax.config import DTYPES, KV_DTYPES, EngineConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in ("dtype", "kv_dtype") for value in ("float8_e4m3fn", "float16", "bf16", "")]
    + [("dtype", "int8"), ("dtype", "fp8")],
)
def test_a_dtype_that_is_not_served_is_refused(field, value):
    with pytest.raises(ValueError, match=f"engine.{field}='{value}'.*float32, bfloat16"):
        EngineConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "least"), [("num_pages", 1), ("page_store_bytes", 1), ("host_cache_bytes", 0), ("max_loras", 0)]
)
def test_a_number_that_is_too_small_is_refused(field, least):
    with pytest.raises(ValueError, match=f"engine.{field}={least - 1}; it must be at least {least}"):
        EngineConfig(**{field: least - 1})


@pytest.mark.parametrize("value", DTYPES)
@pytest.mark.parametrize("kv", KV_DTYPES)
def test_the_dtypes_that_are_served(value, kv):
    config = EngineConfig(dtype=value, kv_dtype=kv)
    assert (config.dtype, config.kv_dtype) == (value, kv)
