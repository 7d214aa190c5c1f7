"""Tiny real UNets, each with the region that reading its code gives.

`ZOO` maps a name to a function that builds a `ZooCase`; `random_unet(seed)` makes as many more as wanted.
"""

from tests.zoo import diffusers_image, diffusers_other, own, third_party  # noqa: F401  (they register their cases)
from tests.zoo.case import ZOO, ZooCase
from tests.zoo.random_unets import random_unet

__all__ = ["ZOO", "ZooCase", "random_unet"]
