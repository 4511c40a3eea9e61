"""The few lines of Python that show a user how to render with what was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TEMPLATE = """\
import torch
{imports}

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
{load}
pipeline.to(device)

image = pipeline(
{call}).images[0]
image.save("picture.png")
"""


def render(imports: Sequence[str], load: Sequence[str], arguments: Mapping[str, object]) -> str:
    """Put a kind's own lines into the frame.

    Args:
        imports: import statements.
        load: lines that leave a `pipeline` in `dtype`, with what was trained in it.
        arguments: of the pipeline's call; `seed` becomes a generator, and `image` a picture that is read, cut to the width and height.
    """
    call = {name: repr(value) for name, value in arguments.items() if name != "seed"}
    if "image" in arguments:  # a pipeline that starts from a picture takes its size
        imports = [*imports, "from PIL import Image, ImageOps"]
        size = f"({call.pop('width')}, {call.pop('height')})"
        call["image"] = f"ImageOps.fit(Image.open({arguments['image']!r}).convert('RGB'), {size}, Image.Resampling.LANCZOS)"
    if "seed" in arguments:
        call["generator"] = f"torch.Generator().manual_seed({arguments['seed']!r})"
    return TEMPLATE.format(
        imports="\n".join(imports),
        load="\n".join(load),
        call="".join(f"    {name}={value},\n" for name, value in call.items()),
    )
