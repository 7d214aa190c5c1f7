"""Which rows of `fidelity.json` stand in which table of docs/results.md, and what is said above them."""

from __future__ import annotations

from benchmarks.fidelity_plan import MODES_SEEDS, modes_group

__all__ = ["FEWER", "IDENTITY", "MODES", "MORE", "OURS", "PLAIN", "SCORES", "SHIPS", "TABLES"]

PLAIN, IDENTITY, OURS = "losses-8/plain", "losses-8/identity", "losses-8/guided-output"
SHIPS = "losses-8/ResNet, guided-output"  # with the demo
FEWER, MORE = "losses-8/plain, 5 steps", "losses-8/plain, 6 steps"  # the plain sampler just below our cost, and above
SCORES = ("Fréchet", "attributes right", "PSNR")

TABLES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Plain, identity, trained (Tab. 1, Fig. 4)",
        "Clock 2; an adaptor trained for each step count: the scaled ResNet (`ScaledResNetAdaptor`, ours), width 64, "
        "guided-output loss, unless a row says otherwise.",
        (
            PLAIN, MORE, FEWER, "losses-8/plain, 4 steps", "losses-8/plain, 3 steps", IDENTITY,
            OURS, "steps-6/identity", "steps-6/trained", "steps-4/identity", "steps-4/trained", "steps-16/plain",
            "steps-16/identity", "steps-16/trained",
        ),
    ),
    (
        "Losses",
        "The paper's loss compares features. Guidance e_u + g(e_c - e_u) multiplies the *difference* of the two "
        "branches' errors, so this library adds two losses on the guided combination: of the features, and of "
        "the UNet's output. `ResNet`: the paper's adaptor; the others are the scaled one, ours, which works in "
        "units of the cached exit.",
        (PLAIN, IDENTITY, "losses-8/ResNet, feature", "losses-8/ResNet, guided-output", "losses-8/feature",
         "losses-8/guided-feature", OURS),
    ),
    (
        "Losses at guidance 4",
        "A guidance scale that is too large for this model.",
        ("guidance-4/plain", "guidance-4/identity", "guidance-4/feature", "guidance-4/guided-feature",
         "guidance-4/guided-output"),
    ),
    (
        "Kinds of adaptor (Tab. 3)",
        "8 steps, clock 2. `ResNet, feature` is the paper's adaptor with the paper's loss. "
        f"`{SHIPS}` is the one that ships with the demo.",
        (PLAIN, IDENTITY, "losses-8/ResNet, feature", "losses-8/ResNet, guided-output", "kinds-8/UNet-light",
         "kinds-8/UNet", "kinds-8/width 48", OURS, "kinds-8/width 80"),
    ),
    (
        "Towards the plain model's distance",
        "`best-8`: skips nearly the whole UNet (`cut-0`) at steps 3, 5 and 7, so that the first two steps and the last "
        "one are full. `long-8`: the default cut and clock 2, trained for longer.",
        (PLAIN, OURS, "best-8/identity, 3 5 7", "best-8/width 64, 3 5 7", "best-8/width 32, 3 5 7",
         "best-8/UNet-light, 3 5 7", "long-8/UNet-light", "long-8/width 64", "long-8/width 64, on-policy"),
    ),
    (
        "Four steps, trained for longer", "Clock 2, default cut; `steps-4` for comparison.",
        ("long-4/plain", "losses-8/plain, 3 steps", "steps-4/identity", "steps-4/trained", "long-4/width 64",
         "longer-4/width 64", "long-4/UNet-light"),
    ),
    (
        "Schedules (Tab. 3)", "Four of eight steps use the adaptor, which was trained for these steps.",
        (IDENTITY, OURS, *(f"schedules-8/{name}, {steps}" for steps in ("5 6 7 8", "3 4 5 6", "3 4 6 7")
                           for name in ("identity", "trained"))),
    ),
    (
        "Cuts (Tab. 3)",
        "`losses-8`: the default cut. `cut-paper`: without the region's down- and upsampler. `cut-2`: below the second "
        "level. `cut-0`: nearly the whole UNet.",
        (IDENTITY, OURS, "cut-paper/identity", "cut-paper/trained", "cut-2/identity", "cut-2/trained", "cut-0/identity",
         "cut-0/trained"),
    ),
    (
        "Solvers (Tab. 4)", "8 steps, clock 2; an adaptor trained for each. PNDM evaluates its second step twice.",
        (PLAIN, IDENTITY, OURS, *(f"solver-{solver}/{row}" for solver in ("dpm", "pndm", "ddim")
                                  for row in ("plain", "identity", "trained"))),
    ),
    (
        "What the adaptor reads (Tab. 5)",
        "All read the time; those of `losses-8` read entry, exit and text. The last row has no cached feature and runs "
        "at every step but the first.",
        ("inputs-8/entry", "inputs-8/exit", "inputs-8/entry + exit", "losses-8/ResNet, guided-output", OURS,
         "inputs-8/every step, no cache"),
    ),
    (
        "Clocks at 50 DDIM steps", "Identity adaptor.",
        ("clocks-50/plain", *(f"clocks-50/identity, clock {clock}" for clock in (2, 3, 4))),
    ),
    (
        "Against others at equal cost",
        "DeepCache 0.1.1 (PyPI) with interval 2 on the same UNet; its branch 1 skips what our default cut skips. "
        "Plain with fewer steps.",
        (OURS, IDENTITY, "losses-8/DeepCache, branch 1", "losses-8/DeepCache, branch 0", MORE, FEWER,
         "losses-8/plain, 4 steps"),
    ),
)  # fmt: skip

MODES = {  # steps → way of training → its rows, one a training seed
    steps: {
        mode: tuple(f"{modes_group(steps, seed)}/{mode}" for seed in MODES_SEEDS)
        for mode in ("unrolled", "forward-noise", "on-policy")
    }
    for steps in (4, 6, 8, 16)
}
