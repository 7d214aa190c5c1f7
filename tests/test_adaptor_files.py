"""Adaptors on disk: they come back as they were saved, belong to one region, and a damaged file is refused."""

import contextlib
import copy
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks.adaptors import LearnedAdaptor
from clockwork_hooks.regions.region import Layout
from tests.small_unet import Tiny
from tests.snapshot import snapshot
from tests.test_adaptors import alive, region_of, rollout
from tests.zoo import ZOO
from tests.zoo.case import ZooCase

FACTS = {"sampler": "DPM++ 2M", "steps": 8, "clock": 2, "losses": [0.5, 0.25]}


@pytest.fixture(scope="module")
def sd15() -> ZooCase:
    return ZOO["sd15"]()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small saved adaptor."""
    adaptor = ch.ResNetAdaptor(exit=Layout(6, (4, 4)), entry=Layout(3, (4, 4)), time=5, text=7, width=8)
    adaptor.facts = FACTS
    alive(adaptor).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", [ch.ResNetAdaptor, ch.UNetAdaptor])
def test_saved_and_loaded(sd15: ZooCase, kind: Any, tmp_path: Path) -> None:
    """`wrap` finds the region that it was made for, the paper's cut, and gives the same images."""
    region = region_of(sd15, cut="paper")
    adaptor = alive(kind.for_region(region, width=8))
    adaptor.facts = FACTS
    adaptor.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = LearnedAdaptor.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert not loaded.training
    assert (loaded.facts, loaded.region, loaded.arguments) == (adaptor.facts, adaptor.region, adaptor.arguments)
    assert all(map(torch.equal, loaded.state_dict().values(), adaptor.state_dict().values()))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    expected = rollout(sd15, adaptor, region=region)
    assert all(map(torch.equal, rollout(sd15, str(tmp_path), region=region), expected))
    assert torch.equal(rollout(sd15, tmp_path, steps=4)[-1], rollout(sd15, adaptor, steps=4, region=region)[-1])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "DPM++ 2M" in card
    assert region.fingerprint in card
    adaptor.facts = {**FACTS, "relative error": {"2": 0.1, "4": 0.2}, "of the identity": {"2": 0.3}}
    card = str(adaptor.generate_model_card())
    assert "| step | relative error | of the identity |" in card
    assert "| 4    |          20.0% |               – |" in card
    assert "{" not in card


def test_half_precision_comes_back(tmp_path: Path) -> None:
    ch.ResNetAdaptor(exit=Layout(6, (4, 4)), width=8).half().save_pretrained(tmp_path)
    assert {p.dtype for p in ch.ResNetAdaptor.from_pretrained(tmp_path).parameters()} == {torch.float16}


def test_a_loaded_adaptor_goes_where_the_exit_is(sd15: ZooCase, tmp_path: Path) -> None:
    """To its dtype here; its parameters are ordinary ones even where sampling runs in inference mode."""
    ch.ResNetAdaptor.for_region(region_of(sd15)).save_pretrained(tmp_path)
    unet = ZOO["sd15"]().model.to(torch.bfloat16)
    text = sd15.kwargs["encoder_hidden_states"].bfloat16()
    with torch.inference_mode(), ch.wrap(unet, tmp_path) as cw, cw.trajectory():
        for t in (900, 600):
            cw(sd15.args[0].bfloat16(), torch.tensor(t), encoder_hidden_states=text)
        assert cw.stats.adaptor_passes == 1
    assert isinstance(cw.adaptor, nn.Module)
    assert {parameter.dtype for parameter in cw.adaptor.parameters()} == {torch.bfloat16}
    assert not any(parameter.is_inference() for parameter in cw.adaptor.parameters())


# -- the region ------------------------------------------------------------------------------------------------------


def test_every_region_is_found_again(sd15: ZooCase, tmp_path: Path) -> None:
    """By its fingerprint: several regions lie below one level, of which `share=` finds the wider ones."""
    regions = ch.find_regions(sd15.model, *sd15.args, **sd15.kwargs)
    assert len({region.level for region in regions}) < len(regions)
    edges = [edge for region in regions for edge in (region, region.inner) if edge is not None]
    for k, region in enumerate(edges):
        adaptor = ch.ResNetAdaptor.for_region(region, width=4)
        adaptor.save_pretrained(tmp_path / str(k))
        with torch.no_grad(), ch.wrap(sd15.model, tmp_path / str(k)) as cw:
            for t in torch.tensor([900, 600]):
                cw(sd15.args[0], t, **sd15.kwargs)
            assert cw.region is not None
            assert cw.region.fingerprint == region.fingerprint
            assert cw.stats.adaptor_passes == 1  # it knows where its exit was: no pass is full with the reason "traced"
        with torch.no_grad(), ch.wrap(sd15.model, adaptor) as cw:
            cw(*sd15.args, **sd15.kwargs)
            assert cw.region is not None
            assert cw.region.fingerprint == region.fingerprint


def test_another_cut_is_refused(sd15: ZooCase, tmp_path: Path) -> None:
    ch.ResNetAdaptor.for_region(region_of(sd15, cut="paper")).save_pretrained(tmp_path)
    with pytest.raises(ch.AdaptorError) as raised:
        ch.wrap(sd15.model, tmp_path, region=region_of(sd15))
    assert {
        "cut": "paper → outer",
        "entry path": "down_blocks.0.downsamplers.0.conv → down_blocks.0.attentions.1",
        "exit path": "up_blocks.2.attentions.2 → up_blocks.2.upsamplers.0.conv",
    }.items() <= raised.value.seen.items()
    with pytest.raises(ch.AdaptorError) as raised:
        ch.wrap(sd15.model, tmp_path, region=region_of(sd15, level=2))
    assert raised.value.seen["level"] == "1 → 2"


def test_another_model_is_refused(sd15: ZooCase, tmp_path: Path) -> None:
    """At the first call, which leaves the UNet as it was."""
    ch.ResNetAdaptor.for_region(region_of(sd15, cut="paper")).save_pretrained(tmp_path)
    other = ZOO["unet2d"]()
    before = [dict(vars(module)) for module in other.model.modules()]
    cw = ch.wrap(other.model, tmp_path)
    with pytest.raises(ch.AdaptorError, match="serves the region that it was made for") as raised:
        cw(*other.args)
    assert raised.value.seen["model"] == "UNet2DConditionModel → UNet2DModel"
    assert raised.value.seen["text width"] == "24 → none"
    assert before == [dict(vars(module)) for module in other.model.modules()]


def test_other_channels_and_another_text_are_refused(sd15: ZooCase) -> None:
    """The same modules and calls: channels are in the fingerprint, the width of the text is compared beside it."""
    adaptor = ch.ResNetAdaptor.for_region(region_of(sd15))
    wider = ZOO["sd15"]()
    config = {**wider.model.config, "block_out_channels": (24, 32, 48, 48)}
    other = type(wider.model).from_config(config).eval()
    with pytest.raises(ch.AdaptorError) as raised:
        adaptor.check_region(ch.find_region(other, *sd15.args, **sd15.kwargs))
    assert raised.value.seen["entry channels"] == "16 → 24"
    other = type(wider.model).from_config({**wider.model.config, "cross_attention_dim": 32}).eval()
    text = torch.randn(2, 7, 32)
    with pytest.raises(ch.AdaptorError) as raised:
        adaptor.check_region(ch.find_region(other, *sd15.args, encoder_hidden_states=text))
    assert set(raised.value.seen) == {"adaptor", "region", "text width"}
    assert raised.value.seen["text width"] == "24 → 32"


def test_another_batch_and_size_are_the_same_region(sd15: ZooCase) -> None:
    adaptor = ch.ResNetAdaptor.for_region(region_of(sd15))
    region = ch.find_region(
        sd15.model, torch.randn(3, 4, 24, 32), torch.tensor(5), encoder_hidden_states=torch.randn(3, 9, 24)
    )
    adaptor.check_region(region)


# -- damage ----------------------------------------------------------------------------------------------------------


def refused(folder: Path, **seen: str) -> None:
    with pytest.raises(ch.AdaptorError) as raised:
        LearnedAdaptor.from_pretrained(folder)
    facts = {name.replace(" ", "_"): str(value) for name, value in raised.value.seen.items()}
    for name, part in seen.items():
        assert part in facts[name], facts
    assert raised.value.do


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("size", [0, 4, 100, -1, -1000])
def test_truncated(folder: Path, size: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ch.AdaptorError, match="truncated or corrupted"):
        LearnedAdaptor.from_pretrained(folder)


@pytest.mark.parametrize("place", [0, 9, 40, -1, -500])
def test_one_bit_is_wrong(folder: Path, place: int) -> None:
    """In the header safetensors sees it, or a name changes; in the tensors the digest tells."""
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[place] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ch.AdaptorError):
        LearnedAdaptor.from_pretrained(folder)


def test_the_digest_tells(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(folder, **{"model.safetensors": "was altered"})


class Boom:
    """What a pickle may do."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adaptor.pt", "model.ckpt"])
def test_pickles_are_not_read(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Boom()))
    refused(folder, **{"pickled,_so_not_read": name})
    with pytest.raises(ch.AdaptorError, match="nothing is unpickled"):
        LearnedAdaptor.from_pretrained(folder / name)


def test_renamed_pickles_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Boom()))
    refused(folder, **{"a_renamed_pickle,_so_not_read": "model.safetensors"})
    torch.save({"down.weight": torch.zeros(3)}, folder / "model.safetensors")
    refused(folder, **{"a_renamed_pickle,_so_not_read": "model.safetensors"})


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_file_is_missing(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    refused(folder, missing=missing)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"kind": 3}', "\x00\xff", '{"kind": "ResNetAdaptor"}'])
def test_a_configuration_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ch.AdaptorError, match="a saved adaptor is a folder"):
        LearnedAdaptor.from_pretrained(folder)


WRONG = [None, 0, -1, 3.5, "", "x", [], {}, True, 10**400, ["a"], {"a": 1}, [[1]]]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where all values of some JSON stand."""
    yield at
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from places(part, (*at, name))


def put(value: Any, at: tuple[Any, ...], wrong: Any) -> Any:
    """The same JSON with another value there."""
    if not at:
        return wrong
    changed = copy.copy(value)
    changed[at[0]] = put(value[at[0]], at[1:], wrong)
    return changed


def test_a_region_that_was_changed_by_hand(tmp_path: Path) -> None:
    """Any value of the wrong type, anywhere: it is refused, or tells nothing, and the UNet is as it was."""
    unet, call = Tiny(), (torch.randn(1, 2, 8, 8), torch.tensor(900.0))
    before = snapshot(unet)
    ch.ResNetAdaptor.for_region(ch.find_region(unet, *call), width=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    refused = []
    for at in places(config["region"]):
        for wrong in WRONG:
            changed = {**config, "region": put(config["region"], at, wrong)}
            (tmp_path / "config.json").write_text(json.dumps(changed), encoding="utf-8")
            try:
                with torch.no_grad(), ch.wrap(unet, tmp_path), contextlib.suppress(ch.AdaptorError):
                    unet(*call)
            except ch.AdaptorError as error:
                refused.append(" ".join(map(str, error.seen.values())))
            assert snapshot(unet) == before, (at, wrong)
    assert len(refused) > 50
    assert all("region" in seen for seen in refused)


@pytest.mark.parametrize(
    "arguments",
    [
        {"width": -1},
        {"width": "8"},
        {"width": 1 << 40},
        {"unknown": 1},
        {"exit": None},
        {"exit": {"channels": 6, "space": [4] * 4}},
        {"exit": {"channels": 6, "space": [4, 4], "order": "sideways"}},
        {"width": 16},
        {"text": None},
        {"time": 6},
    ],
)
def test_a_configuration_of_another_adaptor(folder: Path, arguments: dict[str, Any]) -> None:
    """Nothing is allocated before the tensors of the file are seen to be those."""
    edit(folder, lambda config: config["arguments"].update(arguments))
    with pytest.raises(ch.AdaptorError):
        LearnedAdaptor.from_pretrained(folder)


def test_tensors_of_another_adaptor_are_named(folder: Path) -> None:
    edit(folder, lambda config: config["arguments"].update(width=16))
    refused(folder, **{"block1.conv1.bias": "8, not 16"})
    edit(folder, lambda config: config["arguments"].update(width=8, text=None))
    refused(folder, **{"text.weight": "unknown"})


def test_another_class(folder: Path) -> None:
    with pytest.raises(ch.AdaptorError, match="loads a UNetAdaptor"):
        ch.UNetAdaptor.from_pretrained(folder)
    edit(folder, lambda config: config.update(kind="Unheard"))
    refused(folder, saved_there="Unheard")


def test_no_folder_and_no_repository(tmp_path: Path) -> None:
    """Offline here: the hub is asked only for what may be an id."""
    for name in (tmp_path / "nothing", "nothing", "someone/nothing-that-exists"):
        with pytest.raises(ch.AdaptorError, match="or the id of such a repository"):
            ch.wrap(nn.Conv2d(1, 1, 1), name)


def test_pushed_to_the_hub_and_loaded_from_it(sd15: ZooCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the place of the Hugging Face Hub; what would go over the network is what is written there."""
    from huggingface_hub import HfApi

    hub = tmp_path / "hub"
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, *, folder_path, **options: shutil.copytree(folder_path, hub)
    )
    adaptor = alive(ch.ResNetAdaptor.for_region(region_of(sd15), width=4))
    adaptor.facts = FACTS
    adaptor.push_to_hub("someone/adaptor")
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in hub.iterdir()}
    assert "library_name: clockwork_hooks" in (hub / "README.md").read_text(encoding="utf-8")
    asked = []
    fetch = lambda name, **options: asked.append((name, options)) or str(hub)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    loaded = LearnedAdaptor.from_pretrained("someone/adaptor", revision="main")
    assert loaded.facts == FACTS
    assert all(map(torch.equal, loaded.state_dict().values(), adaptor.state_dict().values()))
    assert (asked[0][0], asked[0][1]["revision"]) == ("someone/adaptor", "main")
    with ch.wrap(sd15.model, "someone/adaptor") as cw:
        assert isinstance(cw.adaptor, ch.ResNetAdaptor)


def test_facts_that_json_does_not_hold(tmp_path: Path) -> None:
    """Nothing half written is left."""
    adaptor = ch.ResNetAdaptor(exit=Layout(6, (4, 4)), width=8)
    adaptor.facts = {"loss": torch.zeros(1)}
    with pytest.raises(ch.AdaptorError, match="what JSON holds"):
        adaptor.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with torch.device("meta"):
        adaptor = ch.ResNetAdaptor(exit=Layout(6, (4, 4)), width=8)
    with pytest.raises(ch.AdaptorError, match="saved only with its weights"):
        adaptor.save_pretrained(tmp_path)


class OneConv(LearnedAdaptor):
    """An adaptor of a user's own."""

    def __init__(self, **inputs: Any) -> None:
        super().__init__(**inputs)
        self.conv = nn.Conv2d(self.channels, self.exit.channels, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def difference(self, x: torch.Tensor, time: Any, text: Any) -> torch.Tensor:
        output: torch.Tensor = self.conv(x)
        return output


def test_an_adaptor_of_ones_own(sd15: ZooCase, tmp_path: Path) -> None:
    """It inherits all of this: sized by the region, the identity at first, saved, found again by `wrap`."""
    region = region_of(sd15)
    adaptor = OneConv.for_region(region)
    assert torch.equal(rollout(sd15, adaptor, region=region)[1], rollout(sd15, None, region=region)[1])
    alive(adaptor).save_pretrained(tmp_path)
    assert torch.equal(rollout(sd15, tmp_path, region=region)[1], rollout(sd15, adaptor, region=region)[1])
