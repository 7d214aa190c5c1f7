"""Every reason that `cw.stats.reasons` counts: what causes it, and what to do about it."""

FIRST = "first step"
SCHEDULED = "scheduled"
MOVED = "scheduled: the entry changed by more than the threshold"
LONGEST = "scheduled: the longest run of adaptor steps is over"
UNSEEN = "the entry was not seen before the region began"
TREND = "one full pass since the last doubt: its trend is not known"
TIMES = "rows at different times, of which the adaptor would be told one"
TRACED = "traced"
TRAINING = "training"
NO_TIME = "no time input: declare cw.step()"
UNREADABLE = "time differs between rows or cannot be read"
EVIDENCE = "these times are not known to be one trajectory yet"
STRIDE = "time moved by another stride than before"
SHARED = "another thread or task uses the same times and conditions"
ELSEWHERE = "a block of this thread is open in a function that does not call"
BACKWARDS = "time runs against the declared steps"
NEW = "conditions are new in this step"
RENEWED = "conditions came as new objects, in the middle of a step"
COUNT = "several calls with these conditions in the step before"
AGAIN = "same time and conditions again within a step"
APART = "another place in the list of times than in the step before"
CROWDED = "too many calls in one step to remember"
CHANGED = "inputs or modes changed since the step before"
WEIGHTS = "weights or adapters of the UNet changed since the step before"
NOT_KEPT = "no feature was kept in the step before"
WRITTEN = "the kept feature was written to"
DIFFERED = "calls differed from the traced ones"
USED = "code outside the skipped modules uses what they compute"
NO_REGION = "no region for these inputs"
COMPILED = "within torch.compile, torch.export or torch.jit"
TRANSFORMED = "within a transform of torch.func"
REPEATED = "within torch.utils.checkpoint or a backward pass"
UNTOLD = "this version of torch does not say whether the call is transformed or run again"
EMPTY = "the batch is empty"
UNANALYSED = "these inputs could not be analysed"
TEACHER = "a teacher runs in full"
REPLACED = "something put an older forward of the UNet back"
ANSWERED = "another forward in front of the UNet's answered by itself"
OTHER_REGION = "the chosen region is another one for these inputs"

REASONS: dict[str, tuple[str, str]] = {
    FIRST: ("a trajectory begins: there is nothing to reuse", "nothing"),
    SCHEDULED: ("the schedule says full", "choose another clock or schedule"),
    MOVED: (
        "an adaptive schedule compared the region's entry with that of the last full pass",
        "a larger threshold, if the results allow it",
    ),
    LONGEST: ("an adaptive schedule reached its `longest=`", "a larger `longest=`, if the results allow it"),
    UNSEEN: (
        "an adaptive schedule has nothing to compare: the entry that it compares comes after the first skipped module",
        "another region, or another schedule",
    ),
    TREND: (
        "the adaptor needs the last two full passes, and there was only one since conditions, weights or inputs "
        "changed, or a call could not be placed",
        'nothing; once per change. An adaptor of a kind without "+trend" avoids it',
    ),
    TIMES: (
        "rows have different times, and the adaptor reads one time only, as a calibrated one does",
        "call the UNet once for each time; or use a trained adaptor, or one that reads no time",
    ),
    TRACED: (
        "the first call of an input signature is recorded, and what the next step needs of it was not kept",
        "nothing; once per signature. `cw.prepare(*example)` before the first run avoids it",
    ),
    TRAINING: ("the UNet is in training mode and gradients are on", "`unet.eval()` or `torch.no_grad()` to sample"),
    NO_TIME: (
        "the UNet takes no time, or one that cannot be told from a class label",
        "`wrap(..., time=name)`, or `with cw.step():` around each step",
    ),
    UNREADABLE: (
        "rows at different times, as in training and validation losses; or a time on the meta device",
        "nothing; or for a sampler with a time for each row, `with cw.step():` around each step; if the UNet computes "
        "losses only, `cw.enabled = False`",
    ),
    EVIDENCE: (
        "times that are plain numbers or new tensors may be drawn at random. They count as one trajectory after three "
        "equal strides, or five that follow a trend; items from the middle of a list after two",
        "`with cw.trajectory():` around each run; or take the times from one tensor, `for t in timesteps`; for a "
        'sampler that evaluates between its steps, `with cw.sampler("dpm_2_ancestral", sigmas):` with its own name',
    ),
    STRIDE: (
        "the time jumped by another stride than before: this may be a restart",
        "nothing; or `cw.reset()` before each trajectory and `with cw.step():` around each step",
    ),
    SHARED: (
        "several threads or tasks call with the same times and conditions: one loop or several cannot be told",
        "`with cw.trajectory(name):` in each loop; or give each its own list of times or its own embeddings",
    ),
    ELSEWHERE: (
        "a generator has a block of `cw.trajectory()` or `cw.branch()` open and another function calls, or the "
        "function that opened it has ended: whether the call is inside cannot be told",
        "`with cw.trajectory() as run:`, and `run(...)` instead of `unet(...)`",
    ),
    BACKWARDS: (
        "declared steps went back in time: noise was added again (RePaint), or a trajectory began without `reset()`",
        "`cw.reset()` before each trajectory",
    ),
    NEW: (
        "the branch had no call in the step before: guidance begins, a branch paused, or embeddings changed or were "
        "made anew on a device",
        "pass the same embedding objects in each step, or `with cw.branch(name):`; prompts that take turns: "
        '`ch.wrap(unet, reuse="same condition")`',
    ),
    RENEWED: (
        "the conditions were the same objects in the steps before, and are other ones now: this may be the next run",
        "nothing; or `cw.reset()` before each trajectory",
    ),
    COUNT: (
        "several calls have the same time and conditions, and it is not yet known if their number is regular",
        "nothing; or `with cw.step():`, which trusts the order of the calls",
    ),
    AGAIN: (
        "more calls with the same time and conditions than in the step before",
        "nothing; or `with cw.step():` around each step",
    ),
    APART: (
        "a time stands twice in the scheduler's list, and this branch missed one of the two",
        "`with cw.step():` around each step",
    ),
    CROWDED: (
        "more than 128 calls at one time: features are released, so that memory stays bounded",
        "fewer, larger batches",
    ),
    CHANGED: (
        "batch, resolution, dtype, device, autocast, gradients or training mode changed, or an argument came or went",
        "nothing; once per change",
    ),
    WEIGHTS: (
        "weights were loaded or written to; a LoRA was loaded, switched, scaled, fused or removed; an IP-Adapter was "
        "scaled, FreeU switched, or attention processors replaced",
        "nothing; once per change. `cw.reset()` after writes through `.data`, which leave no mark",
    ),
    NOT_KEPT: ("the call before was no pass of this region, or ended early", "nothing"),
    WRITTEN: (
        "a hook, or FreeU that was switched on after the first call, wrote to the cached feature in place",
        "nothing; once, then a copy is kept",
    ),
    DIFFERED: (
        "the UNet called its modules in another way than when it was recorded, in this pass or in the step before; the "
        "pass ran again in full",
        "look for another library that skips modules (DeepCache); if it happens every time without one, report it",
    ),
    USED: (
        "the UNet's code or a hook reads a skipped value (`item()`, `if`, NumPy, `print`), keeps it for the next call, "
        "or returns it without going through the region's exit; the pass ran again in full",
        "choose another region, whose modules contain that code (`ch.find_regions` lists them); remove hooks that look "
        "at features while sampling",
    ),
    NO_REGION: ("these inputs have no low-resolution region", "nothing"),
    OTHER_REGION: (
        "`region=` does not fit what was recorded for these inputs",
        "leave `region=` out",
    ),
    REPLACED: (
        "another library removed its hook from the UNet and put back an older forward, without the wrapper; the "
        "wrapper has attached itself again",
        "nothing; once. If it happens again and again, wrap the UNet after the other library's hooks are on",
    ),
    ANSWERED: (
        "a forward that another library put on after `wrap` did not call the one below it: it keeps steps itself, or "
        "calls the UNet's class directly",
        "nothing if it keeps steps; else remove it, or put it on before `wrap`",
    ),
    UNANALYSED: (
        "the first call of this input signature was recorded, and finding the region in it failed: a warning said how",
        "nothing; calls of other input signatures are served",
    ),
    EMPTY: ("a sample without rows has nothing to save", "nothing"),
    TEACHER: ("training and calibration record what the UNet itself computes", "nothing"),
    COMPILED: (
        "a compiled, exported or scripted call is fixed, so it is the UNet's own",
        "to sample, call the UNet itself; `cw.compile()` compiles",
    ),
    TRANSFORMED: (
        "`vjp`, `jvp`, `grad` and `vmap` transform the UNet's own call, which is no step of a sampling loop",
        "nothing",
    ),
    REPEATED: (
        "a backward pass runs the call a second time, and both have to do the same; also within any "
        "`autograd.Function`, as in an adjoint method, and where a checkpoint holds skipped modules and others",
        "nothing; `unet.enable_gradient_checkpointing()`, or a checkpoint for each module, keeps the adaptor passes",
    ),
    UNTOLD: (
        "a private name of torch that is needed to know this is gone",
        "use a version of torch in the range of pyproject.toml; report it if it happens there",
    ),
}
