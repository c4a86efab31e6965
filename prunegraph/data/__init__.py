"""Data sets by name or of the user's own, as typed train, search and test splits."""

from prunegraph.data.custom import Images, from_images
from prunegraph.data.load import EMBEDDED, RESIZED, load_dataset

__all__ = ["EMBEDDED", "RESIZED", "Images", "from_images", "load_dataset"]
