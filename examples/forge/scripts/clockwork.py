"""Clockwork in the web UIs of AUTOMATIC1111 and of Forge: a slider below the prompt, for every UNet that they run."""

from contextlib import nullcontext

import gradio as gr
from modules import script_callbacks, scripts

import clockwork_hooks as ch
from clockwork_hooks.clock.samplers import find_sampler
from clockwork_hooks.comfyui import evaluations_of


class Run:
    """One sampling run on a UNet; `evaluate` comes before each evaluation that the sampler asks for.

    Of samplers whose steps have two evaluations (`each`), the clock counts those.
    """

    def __init__(self, cw, sampler, steps, each):
        self.cw, self.inner, self.left, self.number, self.each = cw, cw.unet.forward, 0, 0, each
        self.evaluations = evaluations_of(sampler, [1.0] * steps + [0.0])
        self.calls, self.before = [], []  # the conditions of each call of this evaluation, and of the one before
        cw.unet.forward = self.forward
        cw.reset()

    def evaluate(self, _=None):
        self.calls, self.before = [], self.calls
        if self.evaluations is None:
            return
        self.number += 1
        if self.each or self.left == 0:
            self.cw.step(ordered=not self.each)
            self.number = 0
        self.left = (self.left or next(self.evaluations, 1)) - 1

    def rows(self, x, transformer_options=None, **_):
        """Forge's batch is the pictures once for each condition; where one comes twice, rows have no names.

        Then the order of its calls tells (perturbed attention calls with a condition again), unless memory splits the
        batches in another way than in the evaluation before.
        """
        options = transformer_options or {}
        conds, sigmas = options.get("cond_or_uncond") or [], options.get("sigmas")
        self.calls.append(list(conds))
        before = [cond for call in self.before for cond in call]
        if len(set(before)) < len(before) and self.calls != self.before[: len(self.calls)]:
            self.cw.reset()
        pictures = len(sigmas) if getattr(sigmas, "ndim", 0) else 0
        if not conds or len(set(conds)) < len(conds) or len(conds) * pictures != len(x):
            return nullcontext()
        names = [f"{self.number} {cond} {picture}" for cond in conds for picture in range(pictures)]
        return self.cw.rows(names, exact=False) if names else nullcontext()

    def forward(self, x, *args, **kwargs):
        try:
            with self.rows(x, **kwargs):
                return self.inner(x, *args, **kwargs)
        except ch.ClockworkError as error:  # the picture goes on, every step in full
            print(f"Clockwork: every step is full: {error}")
            self.cw.remove()
            return self.inner(x, *args, **kwargs)

    def end(self):
        del self.cw.unet.forward
        self.cw.unet.forward = self.inner
        self.cw.remove()


class Clockwork(scripts.Script):
    run, kept = None, (None, None)

    def title(self):
        return "Clockwork (faster UNet)"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        with gr.Accordion(self.title(), open=False):
            clock = gr.Slider(1, 6, value=1, step=1, label="One full step every so many (1 is off)")
            start = gr.Slider(
                0.0, 1.0, value=0.0, step=0.05, label="All steps before this part of the sampling are full"
            )
        return [clock, start]

    def process_before_every_sampling(self, p, clock, start, **_):
        self.finish()
        if clock > 1:
            model = getattr(p.sd_model, "forge_objects", None)
            unet = (model.unet.model if model else p.sd_model.model).diffusion_model
            sampler, first = name_of(p.sampler), round(start * p.steps)
            each = getattr(find_sampler(sampler), "each", False)
            first = 2 * first + 2 if each else first + 1  # the clock ticks from a step's second evaluation on
            self.run = Run(self.wrapper(unet, int(clock), first), sampler, p.steps, each)
            script_callbacks.on_cfg_denoiser(self.run.evaluate)

    def postprocess(self, p, processed, *_):
        self.finish()

    def finish(self):
        if self.run is not None:
            print(self.run.cw.report())
            self.run.end()
            script_callbacks.remove_current_script_callbacks()
            self.run = None

    def wrapper(self, unet, clock, start):
        """The one of the run before, where nothing has changed: it knows the UNet's calls already."""
        key, cw = self.kept
        if key != (unet, clock, start):
            cw = ch.wrap(unet, schedule=ch.Schedule.every(clock, start=start), ignore=("transformer_options",))
            self.kept = (unet, clock, start), cw
        cw.stats.clear()
        return cw.attach()


def name_of(sampler):
    name = getattr(sampler, "funcname", "")
    return str(getattr(name, "__name__", name)).removeprefix("sample_")
