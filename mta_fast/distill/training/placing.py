"""Where a teacher lies: on the training device, or where it was loaded if it can't be moved."""

from __future__ import annotations

from typing import Any

import torch


def place_teacher(teacher: Any, device: torch.device) -> torch.device:
    """Move a teacher to the training device where that can be done; the device that its inputs go to.

    A teacher that ``device_map`` spread or off-loaded stays where it is, and so does a quantised one that transformers
    does not move.
    """
    if getattr(teacher, "hf_device_map", None) is None:
        quantised = any(
            getattr(teacher, f"is_{name}", False) for name in ("quantized", "loaded_in_8bit", "loaded_in_4bit")
        )
        try:
            teacher.to(device)
        except (ValueError, RuntimeError):
            if not quantised:
                raise
        else:
            return device
    weight = teacher.get_input_embeddings().weight
    return device if weight.is_meta else weight.device  # accelerate's hooks move what is off-loaded
