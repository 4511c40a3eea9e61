"""A drawn face that OpenCV's cascade takes for one, so that tests need no photograph of anybody."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFilter

SKIN, SHADE, HAIR, WHITE, PUPIL, LIPS = (224, 186, 160), (150, 110, 90), (60, 40, 25), (245, 245, 245), (30, 20, 20), (170, 60, 60)


def portrait(width: int, height: int, *faces: tuple[int, int, int]) -> Image.Image:
    """A plain ground with faces on it.

    Args:
        faces: each (x, y, length): its middle, and its length from chin to hair, in pixels.
    """
    image = Image.new("RGB", (width, height), (120, 150, 180))
    draw = ImageDraw.Draw(image)
    for face in faces:
        draw_face(draw, *face)
    return image.filter(ImageFilter.GaussianBlur(max((face[2] for face in faces), default=0) / 160))


def draw_face(draw: ImageDraw.ImageDraw, middle_x: int, middle_y: int, length: int) -> None:
    scale = length / 200

    def at(x: float, y: float) -> tuple[float, float]:
        return middle_x + x * scale, middle_y + y * scale

    def oval(x: float, y: float, across: float, down: float, colour: tuple[int, int, int]) -> None:
        draw.ellipse([at(x - across, y - down), at(x + across, y + down)], fill=colour)

    oval(0, -8, 64, 90, HAIR)
    oval(0, 0, 56, 76, SKIN)
    oval(0, -62, 48, 22, HAIR)
    for side in (-1, 1):
        oval(side * 23, -14, 16, 9, SHADE)
        oval(side * 23, -12, 11, 5, WHITE)
        oval(side * 23, -12, 5, 5, PUPIL)
        draw.line([at(side * 10, -26), at(side * 36, -28)], fill=HAIR, width=max(1, round(5 * scale)))
    draw.polygon([at(0, -12), at(-9, 18), at(9, 18)], fill=SHADE)
    oval(0, 40, 20, 6, LIPS)
