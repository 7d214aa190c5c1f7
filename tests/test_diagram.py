"""The U diagram: its blocks add up to the pass, its region is the region, and both files show it."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from PIL import Image

import clockwork_hooks as ch
from clockwork_hooks.reports.u_drawing import Diagram
from tests.zoo import ZOO

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(params=["sd15", "unet1d", "svd", "plain", "ddpm_pytorch", "monai3d", "a_unet1d"], scope="module")
def drawn(request):
    case = ZOO[request.param]()
    return case, ch.diagram(case.model, *case.args, **case.kwargs)


def test_blocks_hold_all_macs_and_the_region_its_own(drawn):
    case, figure = drawn
    report = ch.flops_report(case.model, *case.args, **case.kwargs)
    assert sum(block.macs for block in figure.blocks) == report.full_macs
    assert sum(block.macs for block in figure.blocks if block.skipped) == report.region.macs


def test_blocks_are_in_order_and_lie_apart(drawn):
    _, figure = drawn
    assert all(a.last <= b.first for a, b in pairwise(figure.blocks))
    assert {block.level for block in figure.blocks} == set(range(len(figure.levels)))
    down = [block.level for block in figure.blocks if block.arm == "down"]
    assert down[0] == 0
    assert max(down) == len(figure.levels) - 1
    assert [block.arm for block in figure.blocks] == sorted((block.arm for block in figure.blocks), key="down up".index)


def test_skips_go_from_the_way_down_to_the_way_up(drawn):
    _, figure = drawn
    assert figure.skips
    for skip in figure.skips:
        assert (figure.blocks[skip.source].arm, figure.blocks[skip.target].arm) == ("down", "up")
        assert figure.blocks[skip.source].level < len(figure.levels) - 1


def test_sd15_has_the_skips_that_its_code_has():
    """UNet2DConditionModel: conv_in and every resnet, attention and downsampler output above the bottleneck."""
    case = ZOO["sd15"]()
    diagram = ch.diagram(case.model, *case.args, **case.kwargs)
    sources = [diagram.blocks[skip.source] for skip in diagram.skips]
    assert [sum(block.level == level for block in sources) for level in range(3)] == [3, 3, 3]
    assert {block.name for block in sources if block.level == 0} == {
        "conv_in", "down_blocks.0.attentions.0", "down_blocks.0.attentions.1"
    }  # fmt: skip


def test_residuals_of_a_controlnet_do_not_hide_the_skips():
    plain, residuals = ZOO["sd15"](), ZOO["sd15_controlnet"]()
    one, other = (ch.diagram(case.model, *case.args, **case.kwargs) for case in (plain, residuals))
    assert len(one.skips) == len(other.skips)


def test_the_svg_is_sound_and_tells_every_block(drawn):
    _, figure = drawn
    root = ET.fromstring(figure.to_svg())
    boxes = [box for box in root.iter(f"{SVG}rect") if box.get("class") in ("block", "skipped")]
    assert [box.get("class") for box in boxes] == ["skipped" if block.skipped else "block" for block in figure.blocks]
    titles = [box.findtext(f"{SVG}title") for box in boxes]
    assert all(title.startswith(block.name) for title, block in zip(titles, figure.blocks, strict=True))
    words = " ".join(word.text for word in root.iter(f"{SVG}text"))
    assert all(
        mark in words for mark in ("entry", "exit", figure.region.entry.path, "×".join(map(str, figure.levels[0])))
    )


def test_nothing_leaves_the_page(drawn):
    _, figure = drawn
    root = ET.fromstring(figure.to_svg())
    width, height = map(float, root.get("viewBox").split()[2:])
    for box in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(box.get(name)) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    for path in root.iter(f"{SVG}path"):
        if path.get("class") == "skip":
            assert all(float(n) >= 0 for n in re.findall(r"-?\d+\.\d", path.get("d")))


def test_no_line_crosses_the_words_entry_and_exit(drawn):
    """Nor do their marks lie in a block."""
    _, figure = drawn
    root = ET.fromstring(figure.to_svg())
    words = [word for word in root.iter(f"{SVG}text") if word.text in ("entry", "exit")]
    assert len(words) == 2
    curves = [
        path.get("d")
        for path in root.iter(f"{SVG}path")
        if path.get("class") in ("flow", "skip") and path.get("id") is None
    ]
    assert sum("Q" in curve for curve in curves) < len(curves)
    for word in words:
        x, y, wide = float(word.get("x")), float(word.get("y")), 6.0 * len(word.text)
        left = x - wide if word.get("text-anchor") == "end" else x
        for px, py in (point for curve in curves for point in points(curve)):
            assert not (left < px < left + wide and y - 8 < py < y), (word.text, px, py)
    marks = [float(path.get("d")[1:].split()[0]) for path in root.iter(f"{SVG}path") if path.get("class") == "mark"]
    top = min(figure.blocks[k].level for k in range(len(figure.blocks)) if figure.blocks[k].skipped)
    boxes = [box for box in root.iter(f"{SVG}rect") if box.get("class") in ("block", "skipped")]
    for box, block in zip(boxes, figure.blocks, strict=True):
        if block.level == top:
            x, wide = float(box.get("x")), float(box.get("width"))
            assert not any(x < mark < x + wide for mark in marks[1:])


def points(path):
    """Points along "Mx yQx y x y", or along the straight pieces of "Mx yLx yLx y"."""
    corners = [tuple(map(float, point.split())) for point in re.split("[MLQ]", path) if point]
    if "Q" in path:
        (ax, ay), (cx, cy, bx, by) = corners
        for t in (k / 200 for k in range(201)):
            a, b, c = (1 - t) ** 2, t * t, 2 * t * (1 - t)
            yield a * ax + b * bx + c * cx, a * ay + b * by + c * cy
        return
    for (ax, ay), (bx, by) in pairwise(corners):
        yield from ((ax + (bx - ax) * k / 200, ay + (by - ay) * k / 200) for k in range(201))


def test_widths_go_by_macs(drawn):
    _, figure = drawn
    root = ET.fromstring(figure.to_svg())
    widths = [float(b.get("width")) for b in root.iter(f"{SVG}rect") if b.get("class") in ("block", "skipped")]
    order = sorted(range(len(widths)), key=lambda k: figure.blocks[k].macs)
    assert all(widths[a] <= widths[b] + 0.11 for a, b in pairwise(order))


def test_files(drawn, tmp_path):
    _, figure = drawn
    figure.save(tmp_path / "u.svg")
    assert (tmp_path / "u.svg").read_text(encoding="utf-8") == figure.to_svg()
    figure.save(tmp_path / "new" / "folder" / "u.png")
    with Image.open(tmp_path / "new" / "folder" / "u.png") as picture:
        assert picture.size[0] == 1920
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    with pytest.raises(ch.ArgumentError, match="SVG or PNG"):
        figure.save(tmp_path / "u.gif")
    with pytest.raises(ch.ArgumentError, match="can be written"):
        figure.save(tmp_path / "u.svg" / "in-a-file.svg")


def test_without_a_region():
    """A stack of convolutions at one resolution: one row, one arm, and a word that nothing is skipped."""
    import torch

    diagram = ch.diagram(
        torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 3, 1, 1) for _ in range(3))), torch.zeros(1, 4, 8, 8)
    )
    assert isinstance(diagram, Diagram)
    assert (diagram.levels, diagram.region, diagram.skips) == (((8, 8),), None, ())
    assert "No region" in diagram.to_svg()
