"""What a user may ask of a push."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from qexport.specs import Spec

Layout = Literal["branches", "subfolders"]


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


_Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_several)]


class PushSpec(Spec):
    """How an output goes to the Hub. The token is none of its fields: it is never written anywhere."""

    public: bool = Field(
        False, description="let everyone see the repository, where it is made now; default: private"
    )
    layout: Layout | None = Field(
        None,
        description="several variants: a revision each (branches), or all in one tree (subfolders, GGUF "
        "files side by side at its root)",
    )
    variant: _Names = Field((), description="push these variants of a directory of several only")
    exclude: _Names = Field(
        (), description="leave out files or directories whose name or path matches a pattern, e.g. '*.log'"
    )
    revision: str | None = Field(
        None, description="branch to push to, made where it is missing; default: main"
    )
    message: str | None = Field(
        None, min_length=1, description="message of the commit; default: says what was pushed"
    )


class PushRecipe(PushSpec):
    """The `push` part of a recipe: what `qexport push` takes, for the variants that were made."""

    repo_id: str = Field(min_length=1, description="repository, NAMESPACE/NAME")
    layout: Layout = Field(
        "subfolders", description="all variants in one tree (subfolders), or a revision each (branches)"
    )
    variant: _Names = Field((), description="these of the recipe's models; default: the quantized ones")
