"""Charts as PNG, where the library for it is installed: the extra ``plots``."""

from __future__ import annotations

from llama_runtime.errors import CaravanError, rust_reason

ZOOM = 2.0  # pixels of the picture for each of the drawing's


def as_png(svg: str) -> bytes | None:
    """A file of SVG as a picture, in its light colours; None without the library.

    Raises:
        CaravanError: it can't be drawn.
    """
    try:
        import resvg_py
    except ImportError:
        return None
    try:
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=ZOOM))
    except BaseException as error:
        raise CaravanError(f"the chart can't be drawn as PNG: {rust_reason(error)}") from error
