"""Names of places: patterns, nearest suggestions, wrappers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from aftershock.signals.places import Notes, match, module_places, parameter_places, plain_name


def test_patterns_choose_in_model_order(kit: Any) -> None:
    model = kit.decoder()
    assert list(module_places(model, ["blocks.1.attn", "blocks.0.attn"])) == ["blocks.0.attn", "blocks.1.attn"]
    assert list(parameter_places(model, "*.norm.weight")) == ["blocks.0.norm.weight", "blocks.1.norm.weight"]
    assert parameter_places(model, "embed.weight")["embed.weight"] is model.embed.weight


@pytest.mark.parametrize(
    ("pattern", "nearest"), [("block.0.attn", "blocks.0.attn"), ("blocks.*.atn", "blocks.1.attn"), ("haed", "head")]
)
def test_no_match_suggests_the_nearest(kit: Any, pattern: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"no module matches '.*'; the nearest of [0-9]+ is '{nearest}'$"):
        module_places(kit.decoder(), ["head", pattern])


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="the model has no parameter to measure"):
        parameter_places(nn.Tanh())
    with pytest.raises(ValueError, match="no module pattern given"):
        match([], ["a"], what="module")


def test_wrappers_leave_the_names_alone(kit: Any) -> None:
    """equivalence: torch.compile's wrapper, and DDP's prefix; a module that the user calls `module` keeps its name."""
    model = kit.decoder()
    wrapped = nn.Module()  # what torch.compile returns, without loading the compiler
    wrapped._orig_mod = model
    assert list(parameter_places(wrapped)) == list(parameter_places(model))
    assert module_places(wrapped, "blocks.0.attn")["blocks.0.attn"] is model.blocks[0].attn
    assert plain_name("module.blocks.module.weight") == "blocks.module.weight"


def test_notes_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes()
    notes.say("a", "first")
    notes.say("b", "second")
    notes.say("a", "again")
    assert notes.sentences == ("first", "second")
    assert caplog.messages == ["first", "second"]
