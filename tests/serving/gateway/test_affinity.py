"""Prefixes lead back to the replica that has them, in bounded memory."""

from serving.gateway.affinity import Affinity


def anyone(replica: str) -> bool:
    return True


def test_longest_known_prefix_of_a_usable_replica_wins() -> None:
    affinity: Affinity[str] = Affinity()
    affinity.remember((1, 2, 3), "a")
    affinity.remember((1, 20), "b")
    assert affinity.find((1, 2, 3, 4), anyone) == "a"
    assert affinity.find((1, 20, 30), anyone) == "b"
    assert affinity.find((1, 99), anyone) == "b"  # the last to get the shared beginning
    assert affinity.find((1, 2, 3), lambda replica: replica == "b") == "b"
    assert affinity.find((7,), anyone) is None


def test_memory_is_bounded_and_the_least_used_goes_first() -> None:
    affinity: Affinity[str] = Affinity(entries=100)
    affinity.remember((-1,), "kept")
    for i in range(1000):
        affinity.remember((i,), "a")
        affinity.remember((-1,), "kept")
    assert len(affinity) == 100
    assert affinity.find((-1,), anyone) == "kept"
    assert affinity.find((0,), anyone) is None


def test_vanished_replicas_are_forgotten() -> None:
    affinity: Affinity[str] = Affinity()
    affinity.remember((1, 2), "a")
    affinity.remember((1,), "b")
    affinity.keep({"b"})
    assert affinity.find((1, 2), anyone) == "b"
    assert len(affinity) == 1
