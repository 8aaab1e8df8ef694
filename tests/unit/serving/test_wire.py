"""What is sent over the wire: any name, any JSON, any number."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn2gnn_dist.inference.inputs import Input
from cnn2gnn_dist.serving import wire
from cnn2gnn_dist.serving.limits import Limits, Refused

ANY = st.text(st.characters(exclude_categories=()), max_size=300)  # including lone surrogates


@given(ANY)
def test_plain_text_can_be_sent_and_printed(text: str):
    clean = wire.plain_text(text)
    clean.encode()
    assert clean.isprintable()
    assert len(clean) <= wire.LONGEST_NAME
    assert wire.plain_text(clean) == clean


@given(ANY)
def test_class_names_are_taken_as_they_are_or_refused(text: str):
    with contextlib.suppress(Refused):
        name = wire.class_name_of(text)
        assert name == text.strip()
        assert name.isprintable()


@given(ANY, ANY, st.binary(max_size=9))
def test_keys_stay_inside_and_tell_contents_apart(name: str, class_name: str, data: bytes):
    one, other = wire.keyed([Input(name, data), Input(name, data + b"x")], class_name)
    assert one.name != other.name
    assert one.name.count("/") == 1
    assert ".." not in one.name.split("/")
    assert wire.keyed([Input(name, data)], class_name)[0].name == one.name


def test_keys_are_readable():
    made = wire.keyed([Input("C:\\photos\\cat 1.JPG", b"a"), Input(".hidden", b"a")], "a/b")
    assert [one.name for one in made] == ["a_b/cat 1-ca978112.JPG", "a_b/.hidden-ca978112"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"images": 3}',
        b'{"images": [{"data": 5}]}',
        b'{"images": [], "more": 1}',
        b'{"images": ["\\ud800"]}',
        b"\xff\xfe",
    ],
)
def test_json_that_is_not_a_request(body: bytes):
    with pytest.raises(Refused) as refused:
        wire._of_json(body, Limits())
    assert refused.value.status == 400
    assert refused.value.what.isprintable()


@pytest.mark.parametrize("one", ['""', "{}", "[]", "1", '{"data": ""}'])
def test_too_many_images_are_refused_before_anything_is_made_of_them(
    one: str, monkeypatch: pytest.MonkeyPatch
):
    """Within the bytes of one request there may be millions of empty ones."""
    monkeypatch.setattr(wire, "parsed", lambda *_: pytest.fail("they were parsed"))
    body = f'{{"images": [{", ".join([one] * 200_000)}]}}'.encode()
    with pytest.raises(Refused, match="more than 64 images in one request") as refused:
        wire._of_json(body, Limits())
    assert (refused.value.status, refused.value.remedy) == (413, "send them in several")


def test_a_few_too_many_images_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wire, "Input", lambda *_: pytest.fail("one was decoded"))
    with pytest.raises(Refused, match="65 images in one request, more than 64") as refused:
        wire._of_json(json.dumps({"images": [""] * 65}).encode(), Limits())
    assert refused.value.status == 413


def test_names_of_the_longest_kind_are_no_images():
    images = [{"name": "," * wire.LONGEST_NAME, "data": ""}] * 64
    assert len(wire._of_json(json.dumps({"images": images}).encode(), Limits()).images) == 64


@given(st.binary(max_size=60))
def test_any_bytes_for_json(body: bytes):
    with contextlib.suppress(Refused):
        wire.parsed(wire.KeysIn, body)


def test_numbers_that_json_does_not_have():
    made = wire.finite({"a": float("nan"), "b": [1.5, float("inf")], "c": ("x", None, 3)})
    assert json.dumps(made, allow_nan=False) == '{"a": null, "b": [1.5, null], "c": ["x", null, 3]}'


@pytest.mark.parametrize(("value", "text"), [(1.5, "1.5"), (float("nan"), "null"), ("é", '"é"')])
def test_answers_are_json_that_every_parser_accepts(value, text):
    assert wire.json_bytes({"a": [value]}) == f'{{"a":[{text}]}}'.encode()
