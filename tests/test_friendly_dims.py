"""Dims that kernels and quantised formats can use."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest

from slicecli.errors import RequestError
from slicecli.family.friendly_dims import (
    friendly_multiple,
    gguf_type,
    preferred_dims,
    why_not_quantised,
    why_writers_are_not_quantised,
)
from slicecli.family.slice_plan import Width


@dataclass
class Sizes:
    hidden_size: int
    dim_multiple: int = 1

    def legal_dims(self):
        return range(self.dim_multiple, self.hidden_size, self.dim_multiple)

    def parameters(self, dim=None):
        return 1000 * (dim or self.hidden_size)


@pytest.mark.parametrize(
    ("hidden_size", "dim_multiple", "step"),
    [(8192, 1, 256), (4096, 32, 128), (2048, 1, 64), (1024, 1, 32), (576, 9, 9)],
)
def test_the_step_is_the_largest_that_is_small_for_the_model(hidden_size, dim_multiple, step):
    dims = preferred_dims(Sizes(hidden_size, dim_multiple))
    assert {second - first for first, second in pairwise(dims)} == {step}


def test_a_multiple_that_is_asked_for_is_kept_to_with_the_rule_of_the_class():
    assert all(dim % 96 == 0 for dim in preferred_dims(Sizes(1152, 9), 32) if dim % 9 == 0 and dim % 32 == 0)
    assert preferred_dims(Sizes(1152, 9), 32) == [288, 576, 864]


@pytest.mark.parametrize("width", [{"sparsity": 0.3}, {"target_parameters": 700_000}, {"memory": 1_400_000}])
def test_every_wish_goes_to_a_multiple(width):
    assert Width(**width, multiple_of=128).resolve(Sizes(1024), 2) % 128 == 0


def test_a_multiple_without_legal_dim_is_refused():
    with pytest.raises(RequestError, match="that 512 divides"):
        Width(sparsity=0.1, multiple_of=512).resolve(Sizes(512), 2)


def test_a_multiple_has_no_effect_on_a_dim():
    with pytest.raises(RequestError, match="--multiple-of"):
        Width(dim=64, multiple_of=32)


@pytest.mark.parametrize(
    ("widths", "kind"), [((512,), "Q4_K_M"), ((448,), "Q8_0"), ((432,), ""), ((512, 1152), "Q8_0"), ((512, 1166), "")]
)
def test_the_type_of_a_quantised_file_has_groups_that_divide_the_widths(widths, kind):
    assert gguf_type(*widths) == kind


@pytest.mark.parametrize(("dim", "multiple"), [(3072, 256), (2944, 128), (448, 64), (416, 32), (432, None)])
def test_the_multiple_of_a_dim_is_the_most_demanding_that_divides_it(dim, multiple):
    assert friendly_multiple(dim) == multiple


def test_a_dim_that_no_format_quantises_names_its_neighbours():
    assert "The nearest that it divides: 416 and 448." in why_not_quantised(432, range(1, 576))
    assert "nearest" not in why_not_quantised(432, range(9, 576, 9)[:20])
    assert why_not_quantised(448, range(1, 576)) == ""


def test_an_mlp_width_that_no_format_can_use_names_its_neighbours():
    assert "1152 and 1184" in why_writers_are_not_quantised(1166, range(1, 1537))
    assert why_writers_are_not_quantised(1152, range(1, 1537)) == ""
