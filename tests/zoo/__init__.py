"""Tiny real UNets, each with the region, or the refusal, that reading its code gives.

`ZOO` and `REFUSED` map names to functions that build a case; `random_unet(seed)` makes as many more as wanted.
"""

from tests.zoo import (  # noqa: F401  (they register their cases)
    diffusers_image,
    diffusers_other,
    diffusers_pixel,
    diffusers_sd,
    diffusers_video,
    imagen,
    lucidrains,
    other_bases,
    own,
    own_layout,
    own_refused,
)
from tests.zoo.case import REFUSED, ZOO, Case, RefusedCase, ZooCase
from tests.zoo.random_unets import random_unet

__all__ = ["REFUSED", "ZOO", "Case", "RefusedCase", "ZooCase", "random_unet"]
