"""The former place of `data.picture`: notebooks and model cards in use name it."""

from tinylab.data.picture import read_image

__all__ = ["read_image"]
