"""Schedules of lost data, message by message, in which a replica that comes back could do harm."""

from __future__ import annotations

from interaction import Interpreter
from interaction_text import owner_key
from timetier.cluster.keys import item_key
from timetier.cluster.messages import POINT, Check, pack_i64, pack_u32


def play(interpreter: Interpreter, script: str) -> str:
    """What commands of `interaction.py` say; and `greet`: all replicas send a Hello, and take each other's."""
    said = []
    for line in filter(None, map(str.strip, script.splitlines())):
        if line == "greet":
            interpreter.group.greet()
        else:
            said.append(interpreter.run(line))
    return "\n".join(said)


def test_a_learner_proposes_nothing_not_even_for_a_chore() -> None:
    """Else it would count, once it votes, a promise of its own from before it had copied everything.

    r0 alone has accepted a wipe, r1 and r2 have chosen [v], and r2 loses its data.
    """
    interpreter = Interpreter()
    play(
        interpreter,
        """
        cluster
        wipe r0 alice id=w
        sync r0
        drop r0->
        crash r0
        restart r0
        write r2 alice@10=v id=v
        drop r2->r0
        deliver r2->r1
        sync r1 r2
        deliver r1->r2
        drop r2->r0
        deliver r2->r1
        sync r1 r2
        deliver r1->r2
        crash r2
        lose r2
        start r2
        greet
        rejoin r2
        answer r0
        sync r2
        crash r2
        start r2
        greet
        """,
    )
    said = play(interpreter, "chores r2\ntick 500ms r2\ngreet\nchores r2\nsync r2")
    assert "1 chores left" in said, "it knows of the wipe, which is a chore to come"
    assert "Prepare" not in said
    said = play(
        interpreter,
        """
        rejoin r2
        answer r1
        sync r2
        answer r0
        answer r1
        sync r2
        state alice
        """,
    )
    assert "r2: chosen 0, promised 1.r2.i1.b1, knows of [v] @10=v at 1.r2.i1.b1" in said


def test_a_timeline_whose_only_entry_was_fetched_just_before_a_crash_is_found_by_the_next_learner() -> None:
    """r0 and r2 choose [v], r1 hears nothing. r2 is lost, copies it, votes and crashes at once; then r0 is lost."""
    interpreter = Interpreter()
    said = play(
        interpreter,
        """
        cluster
        write r0 alice@10=v id=v
        sync r0
        drop r0->r1
        deliver r0->r2
        sync r0 r2
        deliver r2->r0
        tick 5ms r0
        drop r0->
        crash r2
        lose r2
        start r2
        greet
        rejoin r2
        answer r0
        deliver r2->r0
        sync r0
        deliver r0->r2
        sync r2
        rejoin r2
        answer r1
        answer r0
        answer r1
        crash r2 keep=all
        start r2
        greet
        tick 1s r2
        greet
        crash r0
        lose r0
        start r0
        greet
        rejoin r0
        answer r1
        answer r2
        answer r1
        answer r2
        state alice
        read alice r0 r1
        """,
    )
    assert "r0: chosen 0, promised 0.r0.i1.b1, knows of [v] @10=v at 0.r0.i1.b1" in said
    assert "nobody can tell whether entry 1 was chosen" in said, "so a reader settles it"


def test_a_state_from_before_an_eviction_is_not_put_in_the_place_of_what_is_there() -> None:
    """Its rows would be the newest that are left, and be taken for the truth, though the block has newer ones."""
    interpreter = Interpreter()
    play(
        interpreter,
        """
        cluster
        write r0 alice@10=old id=a
        rest
        write r0 alice@10=new id=b seen=1
        drop r0->r2
        stabilize r0 r1
        drop r0->r2
        link r0 alice window=0..100 id=l
        stabilize r0 r1
        drop ->r2
        chores r0
        """,
    )
    key = owner_key("alice")
    replica = interpreter.group.replica(0)
    replica.catch_up.mend(replica.core.timeline(key), 2, interpreter.group.members[0].now)
    interpreter.group.after_step(0)
    play(interpreter, "deliver r0->r2\ndeliver r2->r0\nsync r0")
    check = Check([key], pack_i64([-1]), bytes((POINT,)), [item_key(10)], pack_u32([1]), [])
    answer, _ = replica.reads.check(check, interpreter.group.members[0].now)
    assert not answer.values
    assert [ref.file for links in answer.links for ref in links.refs], "the block has it"
