"""The base of all sections of a run, and the kinds of numbers that several of them have.

A section's fields have a bound, a unit in the name and a sentence. What one section can know is checked by its own
validator; what needs several is checked by `validate.py`. Derived values are properties.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_\-]*$")]


class Settings(BaseModel):
    """Base of all sections: frozen, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
