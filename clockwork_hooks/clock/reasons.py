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
    LONGEST: ("an adaptive schedule came to its bound", "a larger `longest=`, if the results allow it"),
    UNSEEN: (
        "an adaptive schedule has nothing to compare: of several entries, the one it looks at comes after the first "
        "skipped module",
        "another region, or another schedule",
    ),
    TREND: (
        "the adaptor reads how the exit moved between the last two full passes, and only one came since conditions, "
        "weights or inputs changed, or a call could not be placed",
        'nothing; once per change. An adaptor of a kind without "+trend" does without',
    ),
    TIMES: (
        "the adaptor reads the time as one number, as a calibrated one does, and the steps of rows at different times "
        "were declared",
        "a call for each time; or an adaptor that reads no time, or a time per row, as a trained one does",
    ),
    TRACED: (
        "the first call of an input signature is recorded, and its exit, or the entry that an adaptive schedule "
        "compares with, was not among the tensors kept alive",
        "nothing; once per signature. `cw.prepare(*example)` before the first run saves it",
    ),
    TRAINING: ("the UNet is in training mode and gradients are on", "`unet.eval()` or `torch.no_grad()` to sample"),
    NO_TIME: (
        "the UNet takes no time, or none that a name or the graph tells from a class label",
        "`wrap(..., time=name)`, or `with cw.step():` around each step",
    ),
    UNREADABLE: (
        "rows at different times, as in training and validation losses; or a time on the meta device",
        "nothing; or for a sampler with a time for each row, `with cw.step():` around each step; where there is "
        "nothing but losses, `cw.enabled = False`",
    ),
    EVIDENCE: (
        "plain times are believed after three equal strides, or five that follow a trend, and items in the middle of "
        "a list after two: before that they may be drawn at random, as in score distillation",
        "`with cw.trajectory():` around each run; or take its times from one tensor, `for t in timesteps`; for a "
        'sampler that evaluates between its steps, `with cw.sampler("dpm_2_ancestral", sigmas):` with its own name',
    ),
    STRIDE: (
        "plain times came at one stride or trend, and now at another: perhaps a restart",
        "nothing; or `cw.reset()` before each trajectory and `with cw.step():` around each step",
    ),
    SHARED: (
        "a loop whose calls are made by several threads or tasks, or several loops that share their times and their "
        "embeddings: nothing proves which of them a call is of",
        "`with cw.trajectory(name):` in each loop; or a list of times, or embeddings, of its own for each",
    ),
    ELSEWHERE: (
        "a generator holds `cw.trajectory()` or `cw.branch()` open and another function calls, or what opened the "
        "block is over: whether the call is inside cannot be told",
        "`with cw.trajectory() as run:`, and `run(...)` in the place of `unet(...)`",
    ),
    BACKWARDS: (
        "declared steps went back in time: noise was added again (RePaint), or a trajectory began without `reset()`",
        "`cw.reset()` before each trajectory",
    ),
    NEW: (
        "a branch that had no call in the step before: guidance begins, a branch paused, embeddings changed or were "
        "made anew on a device",
        "hand over the same embedding objects each step, or `with cw.branch(name):`; prompts that take turns: "
        '`ch.wrap(unet, reuse="same condition")`',
    ),
    RENEWED: (
        "they were the same objects in the steps before: perhaps the next run, with the same prompt",
        "nothing; or `cw.reset()` before each trajectory",
    ),
    COUNT: (
        "several calls with one time and the same conditions, and their number is not yet known to be regular",
        "nothing; or `with cw.step():`, which trusts the order of the calls",
    ),
    AGAIN: (
        "more calls with one time and the same conditions than in the step before",
        "nothing; or `with cw.step():` around each step",
    ),
    APART: (
        "a time stands twice in the scheduler's list, and this branch missed one of the two",
        "`with cw.step():` around each step",
    ),
    CROWDED: (
        "more than 128 calls at one time: their features are let go, so that memory stays bounded",
        "fewer, larger batches",
    ),
    CHANGED: (
        "batch, resolution, dtype, device, an argument that came or went, autocast, gradients or training mode",
        "nothing; once per change",
    ),
    WEIGHTS: (
        "weights were loaded or written to; a LoRA was loaded, switched, scaled, fused or taken off; an IP-Adapter was "
        "scaled, FreeU switched, attention processors exchanged",
        "nothing; once per change. `cw.reset()` after writes through `.data`, which leave no mark",
    ),
    NOT_KEPT: ("the call before was no pass of this region, or ended early", "nothing"),
    WRITTEN: (
        "code that came after the trace wrote to the cached feature in place: a hook, or FreeU switched on",
        "nothing; once, then a copy is kept",
    ),
    DIFFERED: (
        "the UNet called its modules in another way than when it was recorded, in this pass or in the step before; an "
        "adaptor pass was run again in full",
        "look for another library that skips modules (DeepCache); else report it, if it happens every time",
    ),
    USED: (
        "the UNet's code, or a hook on it, reads a value of the skipped part (`item()`, `if`, NumPy, `print`), keeps "
        "it for its next call, or makes its output of it past the region's exit; an adaptor pass was run again in full",
        "another region: one whose modules hold that code (`ch.find_regions` lists them); take hooks off that look at "
        "features while sampling",
    ),
    NO_REGION: ("these inputs have no low-resolution region", "nothing"),
    OTHER_REGION: (
        "`region=` does not fit what was recorded for these inputs",
        "leave `region=` out",
    ),
    REPLACED: (
        "another library took its own hook off the UNet and put back the forward that it had found; the call ran past "
        "the wrapper, which has attached itself again",
        "nothing; once. Where it comes again and again, wrap the UNet after the other library's hooks are on",
    ),
    ANSWERED: (
        "another library's forward, put on after `wrap`, did not call the one below it: it keeps steps itself, or it "
        "calls the UNet's class past the wrapper",
        "nothing where it keeps steps; else take it off, or put it on before `wrap`",
    ),
    UNANALYSED: (
        "the first call of this input signature was recorded, and finding the region in it failed: a warning said how",
        "nothing; calls of other input signatures are served",
    ),
    EMPTY: ("a sample without rows has nothing to save, and tells nothing of the UNet", "nothing"),
    TEACHER: ("training and calibration record what the UNet itself computes", "nothing"),
    COMPILED: (
        "what they make of a call is fixed, so it is of the UNet itself",
        "to sample, call the UNet itself; `cw.compile()` compiles",
    ),
    TRANSFORMED: (
        "`vjp`, `jvp`, `grad`, `vmap`: what they compute is of the UNet itself, and no step of a sampling loop",
        "nothing",
    ),
    REPEATED: (
        "the call is run again by the backward pass, or is that second run, and has to do the same both times; also "
        "in the forward of any `autograd.Function`, as in an adjoint method; or the UNet checkpoints skipped modules "
        "together with others, so that the second run would not be what ran",
        "nothing; `unet.enable_gradient_checkpointing()`, or a checkpoint for each module, leaves the adaptor passes",
    ),
    UNTOLD: (
        "a private name of torch that is asked for this is gone",
        "a version of torch in the range of pyproject.toml; report it if it happens there",
    ),
}
