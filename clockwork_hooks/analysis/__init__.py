"""Where a UNet can be approximated: feature maps, what disturbing them does, how they drift, and a plan."""
