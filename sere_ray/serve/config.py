"""What a deployment serves: one validated description, in ``deploy/*.yaml`` and in Python."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sere_ray.config import Policy
from sere_ray.errors import SereError


class ServeConfig(BaseModel):
    """One model behind the OpenAI routes.

    Example:
        >>> ServeConfig.parse({"model": "/models/moe", "model_id": "moe"}).device
        'cpu'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="checkpoint folder or hub name")
    model_id: str = Field(min_length=1, description="name under which clients ask for the model")
    device: Literal["cpu"] = Field("cpu", description="what the replica runs on")
    sere: Policy | None = Field(None, description="re-routing policy; null = stock vLLM")
    engine: dict[str, Any] = Field(
        default_factory=dict, description="further vLLM engine arguments, such as max_model_len"
    )

    @field_validator("sere", mode="before")
    @classmethod
    def _policy(cls, value: object) -> Policy | None:
        return None if value is None else Policy.parse(value)

    @classmethod
    def parse(cls, value: object) -> "ServeConfig":
        """Validate a mapping, such as ``args`` of a deployment file.

        Raises:
            SereError: one line for each mistake.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            lines = (
                f"{'.'.join(str(part) for part in e['loc']) or 'args'} = {e['input']!r}: {e['msg']}"
                for e in error.errors()
            )
            raise SereError("; ".join(lines)) from None
