"""Clockwork in the web UIs of AUTOMATIC1111 and of Forge: a slider below the prompt, for every UNet that they run."""

import gradio as gr
from modules import script_callbacks, scripts

import clockwork_hooks as ch
from clockwork_hooks.comfyui import evaluations_of


class Run:
    """One sampling run on a UNet; `evaluate` comes before each evaluation that the sampler asks for."""

    def __init__(self, cw, sampler, steps):
        self.cw, self.inner, self.left = cw, cw.unet.forward, 0
        self.evaluations = evaluations_of(sampler, [1.0] * steps + [0.0])
        cw.unet.forward = self.forward
        cw.reset()

    def evaluate(self, _=None):
        if self.evaluations is not None and self.left == 0:
            self.cw.step()
            self.left = next(self.evaluations, 1)
        self.left -= self.evaluations is not None

    def forward(self, *args, **kwargs):
        try:
            return self.inner(*args, **kwargs)
        except ch.ClockworkError as error:  # the picture goes on, every step in full
            print(f"Clockwork: every step is full: {error}")
            self.cw.remove()
            return self.inner(*args, **kwargs)

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
            self.run = Run(self.wrapper(unet, int(clock), 1 + round(start * p.steps)), name_of(p.sampler), p.steps)
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
