"""A token was replaced in place: a step computed the new one, the key kept the old one, and others were given its KV.

What a user may set of a request is checked when it is set, and what KV depends on is fixed.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json

import numpy as np
import pytest

from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.tokens import FixedTokens, TokenList
from jaxcache.request import Request, RequestState
from tests.model.manager_driver import assert_contents, small_manager, write_step


def admitted(manager, tokens, rid="r", **options):
    request = Request(rid, tokens, **options)
    assert manager.admit(request) is not None
    manager.run(write_step, manager.extend([(request, request.num_tokens - request.kv_len)]))
    return request


def test_a_placeholder_is_not_replaced_behind_the_key():
    """Another prompt with the placeholder in this place found the KV of the token that was computed."""
    manager = small_manager()
    request = admitted(manager, [1, 2, 3, 4, 5, 6, 7])
    request.output_ids.append(0)
    manager.retract(request)
    manager.admit(request)
    with pytest.raises(RequestStateError, match="output_ids only grows"):
        request.output_ids[-1] = 77
    while request.kv_len < request.num_tokens:
        manager.run(write_step, manager.extend([(request, request.num_tokens - request.kv_len)]))
    assert_contents(manager, [request])
    manager.finish(request)
    other = admitted(manager, [1, 2, 3, 4, 5, 6, 7, 0, 8], "other")
    assert other.cached_tokens == 8
    assert_contents(manager, [other])


CHANGES = {
    "replace": lambda ids: ids.__setitem__(0, 9),
    "replace some": lambda ids: ids.__setitem__(slice(0, 2), [9]),
    "delete": lambda ids: ids.__delitem__(0),
    "delete some": lambda ids: ids.__delitem__(slice(0, 2)),
    "insert": lambda ids: ids.insert(0, 9),
    "pop": lambda ids: ids.pop(),
    "remove": lambda ids: ids.remove(5),
    "clear": lambda ids: ids.clear(),
    "sort": lambda ids: ids.sort(reverse=True),
    "reverse": lambda ids: ids.reverse(),
    "repeat": lambda ids: ids.__imul__(2),
}
GROWS = {
    "append": lambda ids: ids.append(9),
    "extend": lambda ids: ids.extend([9]),
    "add": lambda ids: ids.__iadd__([9]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_sampled_only_grows(change):
    request = Request("r", [1, 2, 3], output_ids=[4, 5, 6])
    with pytest.raises(RequestStateError, match="output_ids only grows"):
        CHANGES[change](request.output_ids)
    assert request.output_ids == [4, 5, 6] and request.key == RadixKey([1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("change", CHANGES | GROWS)
def test_a_prompt_stays_as_it_is(change):
    given = [4, 5, 6]
    request = Request("r", given)
    with pytest.raises(RequestStateError, match="origin_input_ids is fixed"):
        (CHANGES | GROWS)[change](request.origin_input_ids)
    given[0] = 9  # the caller's
    assert request.origin_input_ids == [4, 5, 6] and request.key == RadixKey([4, 5, 6])


def test_no_way_to_change_a_list_is_left_out():
    """Whatever a list can do to itself is refused, or is a way to append."""
    harmless = {"__init__", "__new__", "__getattribute__", "__class_getitem__", "__doc__", "__hash__"}
    inherited = {
        name for name in vars(list) if vars(list)[name] is getattr(TokenList, name) and name not in harmless
    }  # fmt: skip
    reads = {"__contains__", "__iter__", "__len__", "__getitem__", "__add__", "__mul__", "__rmul__", "__reversed__"}
    reads |= {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__repr__", "__sizeof__"}
    assert inherited - reads == {"copy", "index", "count"}


@pytest.mark.parametrize(
    "prompt", [np.array([4, 5, 6]), np.array([4, 5, 6], np.int32), (4, 5, 6), range(4, 7), b"\4\0\0\0\5\0\0\0\6\0\0\0"]
)
def test_a_prompt_of_any_kind_stays_what_the_key_says(prompt):
    request = Request("r", prompt)
    if isinstance(prompt, np.ndarray):
        with pytest.raises(ValueError, match="read-only"):
            request.origin_input_ids[0] = 9
        prompt[0] = 9
        assert np.array_equal(request.origin_input_ids, [4, 5, 6])
    else:
        assert request.origin_input_ids == prompt
    assert request.key == RadixKey([4, 5, 6])


def test_tokens_read_like_a_list():
    tokens = TokenList(np.array([1, 2, 3]))
    tokens.append(np.int64(4))
    tokens += range(5, 7)
    tokens.extend(np.array([7, 8], np.uint8))
    assert tokens == [1, 2, 3, 4, 5, 6, 7, 8] and {type(token) for token in tokens} == {int}
    assert json.dumps(tokens) == "[1, 2, 3, 4, 5, 6, 7, 8]"
    tail = [9]
    assert type(tokens[2:]) is type(tokens + tail) is type(tail + tokens) is type(tokens.copy()) is list
    for kind in (TokenList, FixedTokens):
        for twin in (copy.copy(kind([1, 2])), copy.deepcopy(kind([1, 2]))):
            assert type(twin) is kind and twin == [1, 2]


@pytest.mark.parametrize("token", [3.7, 2**31, -(2**31) - 1, "1", None, [1], np.float32(1), np.array([1, 2])])
def test_what_is_no_token_is_never_appended(token):
    tokens = TokenList([1])
    for add in (tokens.append, lambda token: tokens.extend([2, token]), lambda token: tokens.__iadd__([2, token])):
        with pytest.raises(ArgumentError, match="token"):
            add(token)
    assert tokens == [1]


def test_the_edges_of_int32_are_tokens():
    tokens = TokenList()
    for token in (2**31 - 1, -(2**31), 0, True):
        tokens.append(token)
    assert tokens == [2**31 - 1, -(2**31), 0, 1] and type(tokens[-1]) is int


# ---- fields ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("origin_input_ids", [1, 2, 3]),
        ("extra_key", None),
        ("extra_key", Namespace(lora_id="b")),
        ("output_ids", [4]),
        ("output_ids", TokenList([4])),
        ("prompt_len", 2),
    ],
)
def test_what_kv_depends_on_is_set_once(field, value):
    request = Request("r", [1, 2, 3], "tenant", output_ids=[4])
    before = copy.copy(vars(request))
    with pytest.raises(RequestStateError, match=f"{field} of request r"):
        setattr(request, field, value)
    assert vars(request) == before
    request.output_ids += [5]
    assert request.key == RadixKey([1, 2, 3, 4, 5], "tenant")


def test_a_list_of_tokens_belongs_to_one_request():
    first = Request("1", [1], output_ids=[2])
    second = Request("2", [1], output_ids=first.output_ids)
    second.output_ids.append(3)
    assert first.output_ids == [2] and second.output_ids == [2, 3]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("tag", 2**31, "must fit int32"),
        ("tag", "1", "must be an integer"),
        ("tag", 1.0, "must be an integer"),
        ("tag", None, "must be an integer"),
        ("priority", 2**63, "must fit int64"),
        ("priority", "high", "must be an integer"),
        ("logprob_start_len", -1, "must not be negative"),
        ("logprob_start_len", 2.0, "must be an integer"),
        ("cpu_copy", "copy", "must be None, or what a retraction"),
    ],
)
def test_a_value_that_is_none_is_refused_when_it_is_set(field, value, rule):
    request = Request("r", [1, 2], tag=5, priority=-3, logprob_start_len=1)
    before = copy.copy(vars(request))
    with pytest.raises(ArgumentError, match=f"{field} of request r {rule}"):
        setattr(request, field, value)
    assert vars(request) == before
    if field != "cpu_copy":
        with pytest.raises(ArgumentError, match=f"{field} of request r {rule}"):
            Request("r", [1, 2], **{field: value})


def test_a_tag_is_fixed_while_its_request_runs():
    """Plans remember it, so a new one was seen by some steps and not by others."""
    manager = small_manager()
    request = Request("r", list(range(6)), tag=1)
    request.tag = np.int64(2)
    manager.admit(request)
    with pytest.raises(RequestStateError, match="tag of request r is fixed while it runs"):
        request.tag = 3
    request.priority, request.logprob_start_len = 7, None  # which plans do not know
    assert request.tag == 2 and type(request.tag) is int
    manager.retract(request)
    request.tag = 3
    manager.admit(request)
    plan = manager.extend([(request, 6)])
    assert plan.tag.tolist() == [3]
    manager.run(write_step, plan)
    manager.finish(request)
    assert request.state is RequestState.DONE


def test_what_the_managers_is_is_no_argument():
    arguments = list(inspect.signature(Request).parameters)
    wanted = ["rid", "origin_input_ids", "extra_key", "priority", "tag", "logprob_start_len", "output_ids", "media"]
    assert arguments == wanted
    for field in dataclasses.fields(Request):
        if field.name not in arguments:
            with pytest.raises(TypeError, match="unexpected keyword"):
                Request("r", [1], **{field.name: None})


def test_tokens_that_a_loop_computed_are_tokens():
    """One that is none was found only when its request ended, which it could not any more."""
    manager = small_manager()
    request = admitted(manager, list(range(6)))
    request.output_ids.append(1)
    plan = manager.decode_loop([request], 2)
    with pytest.raises(ArgumentError, match="token"):
        request.output_ids += [2, None]
    assert request.output_ids == [1]
    manager.cancel_loop(plan)
    manager.finish(request)
    manager.check_memory()
