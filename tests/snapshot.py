"""What `remove()` must bring back: everything that can be seen of every module."""

from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Identity of every attribute of every module, contents of the hook dictionaries, state_dict keys in order."""
    seen: dict[str, Any] = {"keys": list(model.state_dict()), "parameters": [id(p) for p in model.parameters()]}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[path] = (
            type(module),
            module.training,
            [(name, id(value)) for name, value in vars(module).items()],
            {
                name: [(key, id(item)) for key, item in value.items()]
                for name, value in vars(module).items()
                if isinstance(value, dict)
            },
        )
    return seen
