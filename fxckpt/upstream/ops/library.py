"""The namespace of fxckpt's own operators."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("fxckpt", "DEF")
