"""DreamerV3."""

from lit_rl.modules.dreamer_v3.dreamer_v3 import SIZES, DreamerV3

__all__ = ["SIZES", "DreamerV3"]
