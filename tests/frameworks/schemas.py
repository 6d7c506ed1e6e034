"""What the frameworks' tests ask for: a tool and a form, both so narrow that a random trunk soon comes to an end."""

from __future__ import annotations

from typing import Literal

import pydantic

City = Literal["Oslo", "Paris"]


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: City
    celsius: int = pydantic.Field(ge=-40, le=50)


def get_weather(city: City) -> str:
    """Get the weather of a city."""
    return f"It rains in {city}."
