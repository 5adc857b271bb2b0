import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dig_jax.demo.request import Menu, Program

MENU = Menu(("ant", "bee", "12"), ("ddim", "euler"), (5, 20), 20, ((8, 8), (8, 12)), 1, 1.5)
UNLABELED = Menu((), ("ddim",), (5,), 5, ((8, 8),), 1, 1.0)


def test_only_the_class_has_no_default():
    request = MENU.read({"class": "bee"})
    assert (request.label, request.seeds, request.guidance_scale) == (1, (0,), 1.5)
    assert request.program == Program("ddim", 20, (8, 8), guided=True)
    assert UNLABELED.read({}).program == Program("ddim", 5, (8, 8), guided=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "invalid class: got no class; expected a name or an index from 0 to 2"),
        ({"class": 3}, "invalid class: got class 3; expected"),
        ({"class": True}, "invalid class: got class True; expected"),
        ({"class": "be"}, "unknown class 'be'; did you mean 'bee'?"),
        ({"class": "x" * 201}, "invalid class: got class 'xxx"),
        ({"seeds": -1}, "invalid seeds: got -1; expected 1 to 8 integers from 0 to 2147483647"),
        ({"seeds": [0] * 9}, "invalid seeds: got [0, 0"),
        ({"seeds": []}, "invalid seeds: got []"),
        ({"seeds": [0.5]}, "invalid seeds: got [0.5]"),
        ({"seeds": "1"}, "invalid seeds: got '1'"),
        ({"guidance_scale": -1}, "invalid guidance_scale: got -1; expected a number from 0 to 20"),
        ({"guidance_scale": 10**400}, "invalid guidance_scale: got 1000"),
        ({"guidance_scale": float("nan")}, "invalid guidance_scale: got nan"),
        ({"guidance_scale": "2"}, "invalid guidance_scale: got '2'"),
        ({"sampler": "eular"}, "invalid sampler: got 'eular'; expected ddim or euler; did you mean 'euler'?"),
        ({"sampler": ["ddim"]}, "invalid sampler: got ['ddim']; expected ddim or euler"),
        ({"steps": 7}, "invalid steps: got 7; expected 5 or 20"),
        ({"steps": "5"}, "invalid steps: got '5'; expected 5 or 20"),
        ({"steps": 5.0}, "invalid steps: got 5.0; expected 5 or 20"),
        ({"size": 9}, "invalid size: got 9; expected 8 or [8, 12]"),
        ({"size": [[8], 8]}, "invalid size: got [[8], 8]"),
        ({"size": {}}, "invalid size: got {}"),
        ({"stepz": 5}, "unknown field: got 'stepz'; expected one of class, seeds"),
    ],
)
def test_an_invalid_field_is_one_sentence(fields, message):
    with pytest.raises(ValueError) as error:
        MENU.read(fields if "class" in fields or not fields else {"class": 0, **fields})
    text = str(error.value)
    assert message in text and "\n" not in text and len(text) < 300


def test_a_model_without_classes_takes_none():
    with pytest.raises(ValueError, match="unexpected class: the model has no classes"):
        UNLABELED.read({"class": 0})


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.fixed_dictionaries(
        {"class": st.sampled_from([0, "bee"]) | ANY},
        optional={
            "seeds": st.integers(0, 9) | ANY,
            "guidance_scale": st.floats(0, 20) | ANY,
            "sampler": st.sampled_from(["ddim", "euler"]) | ANY,
            "steps": st.sampled_from([5, 20]) | ANY,
            "size": st.sampled_from([8, [8, 12]]) | ANY,
        },
    )
)
def test_any_json_is_a_request_that_describes_itself_or_a_value_error(fields):
    try:
        request = MENU.read(fields)
    except ValueError:
        return
    described = json.loads(json.dumps(MENU.describe(request)))
    assert MENU.read(described) == request
