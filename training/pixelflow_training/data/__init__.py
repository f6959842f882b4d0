"""Sources of training images: the digits, class folders, tar shards, or a source of your own."""

from .augment import augment, to_signed
from .decode import decode
from .digits import enlarge, load_digits
from .folder import FolderSource
from .loader import Loader
from .memory import ImageSet
from .open import open_data
from .prepared import PreparedImages
from .shards import ShardSource
from .skipped import SkippedImages
from .source import ImageSource, SkippedImage, Taken, TrainingImages, UnreadableImageError

__all__ = [
    "FolderSource",
    "ImageSet",
    "ImageSource",
    "Loader",
    "PreparedImages",
    "ShardSource",
    "SkippedImage",
    "SkippedImages",
    "Taken",
    "TrainingImages",
    "UnreadableImageError",
    "augment",
    "decode",
    "enlarge",
    "load_digits",
    "open_data",
    "to_signed",
]
