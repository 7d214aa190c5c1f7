"""Edit a picture by its text: a red circle becomes a blue square where it was, with Clockwork in both loops.

python examples/edit_scene.py
"""

import clockwork_hooks as ch
from clockwork_hooks.demo import attribute_accuracy, load_demo, parse, render
from clockwork_hooks.demo.edits import layout_error
from clockwork_hooks.demo.model import to_images, to_latents
from clockwork_hooks.demo.scenes import scenes_of
from clockwork_hooks.editing import edit, find_injection, invert

REST = "left of a small green star on a white background"
SOURCE, TARGET = f"a large red circle {REST}", f"a large blue square {REST}"


def main(inversion_steps=40, steps=20):
    demo = load_demo()
    ddim = demo.scheduler("ddim")
    picture = render(scenes_of(parse([SOURCE]), seed=3))
    old, new = demo.encode_prompts([SOURCE, TARGET], guided=False).split(1)
    trace = ch.trace(demo.unet, to_latents(picture), 500, encoder_hidden_states=old)
    injection = find_injection(trace, until_features=0.3)  # at 16×16 the demo's features hold shape and colour too
    pictures = {"source": picture}
    for name, clock in (("plain", 1), ("Clockwork", 2)):
        way = invert(demo.unet, ddim, to_latents(picture), old, steps=inversion_steps, clock=clock)
        told = {"target": new, "negative": old, "guidance": 3.0, "injection": injection}
        made = edit(demo.unet, ddim, way, steps=steps, clock=clock, **told)
        pictures[name] = image = to_images(made.latents)
        right = attribute_accuracy(demo.classifier, image, [TARGET]).total
        moved, _, _ = layout_error(picture, image)
        count = made.passes.adaptor_passes + way.passes.adaptor_passes
        print(
            f"{name}: {made.macs / 1e9:.1f} GMACs ({made.saving:.0%} saved, {count} passes with the adaptor), ", end=""
        )
        print(f"{right:.0%} of the attributes right, objects moved by {moved:.1f} of 64 pixels")
    return pictures


if __name__ == "__main__":
    main()
