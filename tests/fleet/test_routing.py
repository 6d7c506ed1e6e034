"""The routing policy: conversations stay, spread, move and are forgotten."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icarus_jax.fleet.routing import FIRST_PIECE, ReplicaLoad, Routed, Router, RoutingConfig, pieces_of

NAMES = [f"r{i}" for i in range(5)]


def router_of(loads, **config):
    router = Router(RoutingConfig(**config))
    for name, queue in loads.items():
        router.update(ReplicaLoad(name, queue))
    return router


def send(router, request):
    """Routes a request; returns the replica."""
    chosen = router.choose(request)[0]
    router.on_routed(request, chosen)
    return chosen


def is_overloaded(load, loads, config):
    """What RoutingConfig says, over all loads."""
    others = [each for each in loads.values() if each is not load]
    if not others:
        return False
    queue = sum(each.queue for each in others) / len(others)
    pages = sum(each.pages for each in others) / len(others)
    return load.queue > config.queue_factor * queue + config.queue_slack or (
        load.pages > config.pages_full and load.pages > pages + config.pages_slack + 1e-9
    )


# Sixteenths: none is at a limit, where rounding decides: with up to four others no share is their mean and 0.1, or 0.9.
SHARES = st.integers(0, 16).map(lambda n: n / 16)
actions = st.one_of(
    st.tuples(st.just("send"), st.integers(0, 9)),
    st.tuples(st.just("load"), st.sampled_from(NAMES), st.integers(0, 60), SHARES),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(actions, max_size=60))
def test_a_conversation_stays_until_its_replica_is_overloaded_or_gone(script):
    config = RoutingConfig()
    router, loads, homes = Router(config), {}, {}
    for act, *what in script:
        if act == "load":
            loads[what[0]] = ReplicaLoad(*what)
            router.update(loads[what[0]])
        elif act == "remove":
            router.remove(what[0])
            loads.pop(what[0], None)
            homes = {key: home for key, home in homes.items() if home != what[0]}
        else:
            request = Routed(f"c{what[0]}")
            chosen = router.choose(request)
            assert set(chosen) <= set(loads) and len(set(chosen)) == len(chosen) and bool(chosen) == bool(loads)
            if not chosen:
                continue
            home = homes.get(what[0])
            if home and not is_overloaded(loads[home], loads, config):
                assert chosen[0] == home
            elif len(chosen) > 1:  # the less loaded of two
                assert loads[chosen[0]].queue <= loads[chosen[1]].queue
            router.on_routed(request, chosen[0])
            homes[what[0]] = chosen[0]
        assert sorted(router.replicas) == sorted(loads)
        assert [router.overloaded(name) for name in loads] == [is_overloaded(x, loads, config) for x in loads.values()]


def test_cold_conversations_spread():
    """Of 2,000 on 20 replicas each has 100: with one random choice the fullest has about 120, with two about 102."""
    router, queues = router_of(dict.fromkeys(map(str, range(20)), 0)), Counter()
    for i in range(2000):
        chosen = send(router, Routed(f"c{i}"))
        queues[chosen] += 1
        router.update(ReplicaLoad(chosen, queues[chosen]))
    assert max(queues.values()) <= 105


def test_an_overloaded_replicas_conversations_move_and_stay_moved():
    router = router_of({"a": 0, "b": 30})
    talk = Routed("talk")
    assert send(router, talk) == "a"
    router.update(ReplicaLoad("a", 40))  # less than 1.5 * 30 + 8
    assert send(router, talk) == "a"
    router.update(ReplicaLoad("b", 5))
    assert send(router, talk) == "b"
    router.update(ReplicaLoad("a", 0))
    assert send(router, talk) == "b"


def test_thresholds_are_those_of_the_settings():
    """Beside one with 10 requests, 20 are more than 10 * 1.5 + 4, and not more than 10 * 1.5 + 5."""
    for slack, moves in ((4, True), (5, False)):
        router = router_of({"a": 0, "b": 9}, queue_slack=slack)
        assert send(router, Routed("x")) == "a"
        router.update(ReplicaLoad("a", 20))
        router.update(ReplicaLoad("b", 10))
        assert (router.choose(Routed("x"))[0] == "b") is moves
    for full, moves in ((0.94, True), (0.96, False)):
        router = router_of({"a": 0, "b": 9}, pages_full=full)
        assert send(router, Routed("x")) == "a"
        router.update(ReplicaLoad("a", 1, pages=0.95))
        router.update(ReplicaLoad("b", 0, pages=0.5))
        assert (router.choose(Routed("x"))[0] == "b") is moves
        router.update(ReplicaLoad("b", 0, pages=0.9))  # the others are as full
        assert router.choose(Routed("x"))[0] == "a"


def test_a_replica_that_dies_is_forgotten_even_if_it_comes_back():
    router = router_of({"a": 0, "b": 9})
    assert send(router, Routed("x")) == "a"
    router.remove("a")
    assert router.choose(Routed("x")) == ["b"] and router.replicas == ["b"]
    router.update(ReplicaLoad("b", 0))
    router.update(ReplicaLoad("a", 5))
    assert router.choose(Routed("x"))[0] == "b"
    router.remove("a")
    router.remove("a")
    router.remove("b")
    assert router.choose(Routed("x")) == []
    router.on_routed(Routed("x"), "b")  # answered by one that is gone: nothing is remembered
    router.update(ReplicaLoad("a", 0))
    assert router.choose(Routed("x")) == ["a"]


def chat(*messages):
    return Routed(pieces=messages)


def test_a_longer_chat_goes_where_its_beginning_went():
    router = router_of(dict.fromkeys(NAMES, 0))
    first = send(router, chat("system", "hello"))
    router.update(ReplicaLoad(first, 5))  # busier than the others, not overloaded
    for longer in (("system", "hello", "hi", "how?"), ("system", "hello", "hi", "how?", "so", "and?")):
        assert send(router, chat(*longer)) == first
    assert send(router, chat("system", "another")) == first  # one text: it may be the same conversation, forked


def test_a_common_beginning_leads_nowhere():
    """Many conversations have the same system prompt: they spread, and each stays where it is."""
    router, queues = router_of(dict.fromkeys(NAMES, 0), max_continuations=4), Counter()
    homes = {}
    for i in range(100):
        homes[i] = send(router, chat("system", f"question {i}"))
        queues[homes[i]] += 1
        router.update(ReplicaLoad(homes[i], queues[homes[i]]))
    assert max(queues.values()) <= 25
    assert all(send(router, chat("system", f"question {i}", "reply", "more")) == homes[i] for i in homes)


@given(st.lists(st.integers(0, 3), max_size=3000), st.lists(st.integers(0, 3), max_size=500))
@settings(max_examples=50, deadline=None)
def test_a_longer_prompt_begins_with_the_same_pieces(prompt, more):
    pieces = pieces_of(prompt)
    assert pieces_of(prompt + more)[: len(pieces)] == pieces
    text = "".join(map(str, prompt))
    assert "".join(pieces_of(text)) == text[: sum(map(len, pieces_of(text)))]
    left = len(text) - sum(map(len, pieces_of(text)))
    assert left < max(FIRST_PIECE, len(text) / 8)


def test_a_long_prompt_has_few_pieces():
    assert len(pieces_of("x" * 100_000)) < 60 and len(pieces_of([70_000] * 100_000)) < 60
    router = router_of(dict.fromkeys(NAMES, 0))
    text = "".join(map(str, range(1000)))
    first = send(router, Routed(pieces=pieces_of(text)))
    router.update(ReplicaLoad(first, 5))
    assert router.choose(Routed(pieces=pieces_of(text + "and so on" * 50)))[0] == first
    assert router.choose(Routed(pieces=pieces_of("9" + text)))[0] != first


def test_memory_is_bounded_and_the_longest_unused_goes_first():
    router = router_of({"a": 0, "b": 9}, max_keys=3)
    for name in ("x", "y", "z", "x", "w"):  # y is forgotten
        assert send(router, Routed(name)) == "a"
    router.update(ReplicaLoad("a", 5))
    router.update(ReplicaLoad("b", 0))
    assert {name: router.choose(Routed(name))[0] for name in "xyzw"} == {"x": "a", "y": "b", "z": "a", "w": "a"}


@pytest.mark.parametrize("other, apart", [({"model": "m2"}, False), ({"cache_salt": "s"}, True)])
def test_what_is_one_conversation(other, apart):
    for config, differs in (({}, apart), ({"per_model": True}, True)):
        router = router_of({"a": 0, "b": 9}, **config)
        for known in (Routed("x", model="m1"), Routed(pieces=("p", "q"), model="m1")):
            router.update(ReplicaLoad("a", 0))
            router.update(ReplicaLoad("b", 9))
            assert send(router, known) == "a"
            router.update(ReplicaLoad("a", 5))
            router.update(ReplicaLoad("b", 0))
            request = Routed(known.conversation, known.pieces, **{"model": "m1", **other})
            assert (router.choose(request)[0] == "b") is differs


def test_the_same_seed_makes_the_same_choices():
    def choices(seed):
        router = router_of(dict.fromkeys(NAMES, 0), seed=seed)
        return [send(router, Routed(f"c{i}")) for i in range(50)]

    assert choices(1) == choices(1) != choices(2)


@pytest.mark.parametrize("wrong", [{"max_keys": 0}, {"queue_factor": 0.5}, {"pages_full": float("nan")}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RoutingConfig(**wrong)
