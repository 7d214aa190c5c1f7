"""Random small UNets whose region is known by construction, and whose names say nothing."""

import random
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.case import ZooCase, enliven
from tests.zoo.random_layers import (
    CONV,
    Anonymous,
    Block,
    Names,
    Resampling,
    TimeEmbedding,
    Wrapped,
    make_down,
    make_up,
)
from tests.zoo.random_plan import SIZES, TIME, Plan


class Parts:
    """What both layouts are built of: blocks, merges and resamplings, added to a given owner."""

    def __init__(self, plan: Plan, names: Names) -> None:
        self.plan = plan
        self.names = names
        self.act = nn.SiLU()
        self.upsample = nn.Upsample(scale_factor=2.0)

    def block(self, owner: Anonymous, role: str, width: int, out: int) -> None:
        plan = self.plan
        act = self.act if plan.shared_act else nn.SiLU()
        time = TIME if plan.time else 0
        owner.add(role, Block(self.names, plan.dims, width, out, time, residual=plan.residual, act=act))

    def encoder(self, owner: Anonymous, level: int) -> None:
        before = self.plan.widths[max(level - 1, 0)]
        for index in range(self.plan.blocks):
            self.block(
                owner, f"in {level}.{index}", self.plan.widths[level] if index else before, self.plan.widths[level]
            )

    def decoder(self, owner: Anonymous, level: int) -> None:
        width = self.plan.widths[level]
        for index in range(self.plan.skips):
            if self.plan.merge == "concat1x1":
                owner.add(f"merge {level}.{index}", CONV[self.plan.dims](2 * width, width, 1))
            self.block(owner, f"out {level}.{index}", 2 * width if self.plan.merge == "concat" else width, width)

    def down(self, owner: Anonymous, level: int) -> Resampling | None:
        plan, role = self.plan, f"down {level}"
        if not plan.wrapped:
            return make_down(owner, role, plan.downs[level], plan.dims, plan.widths[level])
        wrap = Wrapped(self.names)
        wrap.step = make_down(wrap, role, plan.downs[level], plan.dims, plan.widths[level])
        owner.add(role, wrap)
        return None

    def up(self, owner: Anonymous, level: int) -> Resampling | None:
        plan, role = self.plan, f"up {level}"
        shared = self.upsample if plan.shared_upsample else None
        sizes = (plan.dims, plan.widths[level + 1], plan.widths[level])
        if not plan.wrapped:
            return make_up(owner, role, plan.ups[level], *sizes, shared)
        wrap = Wrapped(self.names)
        wrap.step = make_up(wrap, role, plan.ups[level], *sizes, shared)
        owner.add(role, wrap)
        return None


class Level(Anonymous):
    """The encoder and decoder of some levels, and how to run them."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.names)
        self.plan = parts.plan
        self.steps: dict[str, Resampling | None] = {}

    def encode(self, level: int, image: Tensor, time: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        outputs = []
        for index in range(self.plan.blocks):
            image = self.child(f"in {level}.{index}")(image, time)
            outputs.append(image)
        return image, outputs[-self.plan.skips :]

    def decode(self, level: int, image: Tensor, skips: list[Tensor], time: Tensor | None) -> Tensor:
        for index, skip in enumerate(reversed(skips)):
            image = image + skip if self.plan.merge == "add" else torch.cat((image, skip), dim=1)
            if self.plan.merge == "concat1x1":
                image = self.child(f"merge {level}.{index}")(image)
            image = self.child(f"out {level}.{index}")(image, time)
        return image

    def resample(self, role: str, image: Tensor) -> Tensor:
        step = self.steps[role]
        return step(self, image) if step else self.child(role)(image)


class Below(Level):
    """Nested layout: from one level's downsampling to its upsampling, with all deeper levels in between."""

    def __init__(self, parts: Parts, level: int) -> None:
        super().__init__(parts)
        self.level = level
        self.steps[f"down {level}"] = parts.down(self, level)
        parts.encoder(self, level + 1)
        if level + 2 < len(self.plan.widths):
            self.add("below", Below(parts, level + 1))
            parts.decoder(self, level + 1)
        self.steps[f"up {level}"] = parts.up(self, level)

    def forward(self, image: Tensor, time: Tensor | None) -> Tensor:
        image = self.resample(f"down {self.level}", image)
        image, skips = self.encode(self.level + 1, image, time)
        if "below" in self._roles:
            image = self.decode(self.level + 1, self.child("below")(image, time), skips, time)
        return self.resample(f"up {self.level}", image)


class Net(Level):
    """The root: flat, with everything its own child, or nested."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        plan = parts.plan
        depth = len(plan.widths)
        if plan.time:
            self.add("time", TimeEmbedding(parts.names, TIME))
        self.add("stem", CONV[plan.dims](3, plan.widths[0], 3, padding=1))
        parts.encoder(self, 0)
        if plan.nested:
            self.add("below", Below(parts, 0))
        else:
            for level in range(1, depth):
                self.steps[f"down {level - 1}"] = parts.down(self, level - 1)
                parts.encoder(self, level)
            for level in reversed(range(depth - 1)):
                self.steps[f"up {level}"] = parts.up(self, level)
                if level:
                    parts.decoder(self, level)
        parts.decoder(self, 0)
        self.add("head", CONV[plan.dims](plan.widths[0], 3, 3, padding=1))

    def forward(self, image: Tensor, time: Tensor | None = None) -> Any:
        time = self.child("time")(time) if self.plan.time else None
        image, skips = self.encode(0, self.child("stem")(image), time)
        image = self.child("below")(image, time) if self.plan.nested else self._deeper(image, time)
        image = self.child("head")(self.decode(0, image, skips, time))
        return {"tensor": image, "tuple": (image,), "dict": {"sample": image}}[self.plan.returns]

    def _deeper(self, image: Tensor, time: Tensor | None) -> Tensor:
        deepest = len(self.plan.widths) - 1
        features: list[list[Tensor]] = []
        for level in range(1, deepest + 1):
            image, skips = self.encode(level, self.resample(f"down {level - 1}", image), time)
            features.append(skips)
        for level in reversed(range(deepest)):
            image = self.resample(f"up {level}", image)
            if level:
                image = self.decode(level, image, features[level - 1], time)
        return image


class Preconditioned(Anonymous):
    """The input passes round the whole network, and the network sees it scaled."""

    def __init__(self, names: Names, net: Net) -> None:
        super().__init__(names)
        self.add("net", net)

    def forward(self, image: Tensor, *time: Tensor) -> Any:
        out = self.child("net")(image * 0.8, *time)
        if isinstance(out, tuple):
            return (image * 0.3 + out[0] * 0.7,)
        if isinstance(out, dict):
            return {"sample": image * 0.3 + out["sample"] * 0.7}
        return image * 0.3 + out * 0.7


def random_unet(seed: int) -> ZooCase:
    """A small UNet of our own, all of whose traits and names are drawn from the seed.

    Drawn are: one to three dimensions, depth, widths, blocks and skips of a level, how skips join (concatenated,
    added, concatenated and squeezed by a 1x1), how it halves (strided convolution, average or maximum pooling as
    module or function, pixel-unshuffle) and doubles (transposed convolution, interpolation before or after the
    convolution, nn.Upsample, pixel-shuffle), whether resamplings are modules, whether levels nest, whether one
    activation or one nn.Upsample serves all levels, time, preconditioning, batch and kind of output.
    """
    rng = random.Random(seed)
    plan = Plan.draw(rng)
    names = Names(rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net(Parts(plan, names))
        model = Preconditioned(names, net) if plan.preconditioned else net
        enliven(model)
        args = (torch.randn(plan.batch, 3, *SIZES[plan.dims]),)
        if plan.time:
            args += (torch.rand(plan.batch) * 1000,)
    prefix = f"{model.name_of('net')}." if plan.preconditioned else ""
    return _expect(f"random-{seed}", plan, net, model, args, prefix)


def _expect(name: str, plan: Plan, net: Net, model: nn.Module, args: tuple[Tensor, ...], prefix: str) -> ZooCase:
    owner: Level = net
    root = prefix
    exits: list[str] = []
    if plan.nested:
        owner = net.child("below")
        root = f"{prefix}{net.name_of('below')}."
        exits = [root[:-1]]

    up = f"{root}{owner.name_of('up 0')}"
    if plan.wrapped:
        wrap = owner.child("up 0")
        exits += [up, *([f"{up}.{wrap.step.layer}"] if wrap.step.ends_in_layer else [])]
    elif owner.steps["up 0"].ends_in_layer or not exits:
        exits += [up]
    # Pixel-shuffle and a late interpolation in the root's own forward: the last module output is the convolution's.
    low = not plan.nested and not plan.wrapped and plan.ups[0] in ("shuffle", "late")
    size = SIZES[plan.dims]

    outside = ("time", "stem", "head", "net", "in 0.", "out 0.", "merge 0.")
    skipped = {
        f"{root}{child}" for role, child in owner._roles.items() if not role.startswith(outside) and role != "below"
    }
    if plan.nested and "below" in owner._roles:
        skipped.add(f"{root}{owner.name_of('below')}")
    paths = {f"{prefix}{child}" for role, child in net._roles.items() if role.startswith(outside)}
    last = net.name_of(f"in 0.{plan.blocks - 1}")
    block = net.child(f"in 0.{plan.blocks - 1}")
    # A block that is not residual returns its second convolution's output as it is.
    aliases = () if plan.residual else (f"{prefix}{last}.{block.name_of('conv2')}",)
    if plan.nested:
        consumer: str | None = root[:-1]
    elif "down 0" in owner._roles and (plan.wrapped or plan.downs[0] != "unshuffle"):
        consumer = f"{root}{owner.name_of('down 0')}"
    else:
        consumer = None
    called = {path for path, _ in model.named_modules()}  # calls of a module that levels share have its first name
    return ZooCase(
        name=name,
        model=model,
        args=args,
        entry=(f"{prefix}{last}", *aliases),
        consumer=consumer,
        exit=tuple(exits),
        resolution=size,
        exit_resolution=tuple(n // 2 for n in size) if low else size,
        source="our own, random",
        note=f"{plan}: the last encoder block of the top level enters, the top level's upsampling leaves.",
        skipped=frozenset((skipped & called) - set(exits)),
        outside=frozenset(paths),
    )
