"""ComfyUI finds the node here: link this folder into `ComfyUI/custom_nodes`."""

from clockwork_hooks.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
