"""The ComfyUI node: on a real ComfyUI where `COMFYUI_PATH` names one, else on a stand-in with its way of calling."""
