"""wanlora: encode each clip once, then train only the transformer."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ClipDataset", "__version__", "collate_fn"]

if TYPE_CHECKING:
    from wanlora.data.clip_frames import ClipDataset, collate_fn


def __getattr__(name: str) -> Any:
    """Import the dataset API on first use, so that `import wanlora` stays free of torch."""
    if name in {"ClipDataset", "collate_fn"}:
        from wanlora.data import clip_frames  # noqa: PLC0415  (lazy: it imports torch)

        return getattr(clip_frames, name)
    raise AttributeError(f"module 'wanlora' has no attribute {name!r}")
