"""What the parts of a settings file have in common."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0)]


def _resolve(path: Path, info: ValidationInfo) -> Path:
    folder: Path | None = (info.context or {}).get("folder")
    return folder / path if folder else path


# Relative to the settings file, where there is one.
FilePath = Annotated[Path, AfterValidator(_resolve)]


class Section(BaseModel):
    """A part of the file. Unknown keys are errors: a misspelt limit must not be no limit."""

    # A wrong value may be a password in the wrong place: messages do not repeat what was given, explain() may.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
