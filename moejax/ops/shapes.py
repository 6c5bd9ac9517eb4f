"""The rule of the shape suffixes, checked: arrays whose names share a letter have the same size there."""

from typing import Any


def check(**arrays: Any) -> None:
    """Checks that arrays have the shapes that their names say: u_BLI has three dims, and its I is that of A_IN.

    Args:
      arrays: by name; what follows the last underscore has a letter for each dim. None is passed over.

    Raises:
      ValueError: another number of dims, or two sizes for one letter; one line, about the later of two arrays.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in arrays.items():
        if array is None:
            continue
        dims = name.rpartition("_")[2]
        if len(array.shape) != len(dims):
            raise ValueError(f"{name} has shape {array.shape}; give it the dims ({', '.join(dims)})")
        for dim, size in zip(dims, array.shape, strict=True):
            known, owner = sizes.setdefault(dim, (size, name))
            if size != known:
                raise ValueError(
                    f"{name} has shape {array.shape}, {dim}={size}, and {owner} has {dim}={known}; make them equal"
                )
