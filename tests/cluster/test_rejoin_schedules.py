"""Schedules of lost data, message by message, in which a replica that comes back could do harm."""

from __future__ import annotations

import pytest
from interaction import Interpreter
from interaction_calls import HandAnswered
from interaction_text import owner_key
from timetier.cluster.keys import item_key
from timetier.cluster.messages import POINT, AcceptedList, Check, Digests, Life, Message, pack_i64, pack_u32
from timetier.cluster.storage.learning import SETTLE_ROUNDS


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


FORGETS = """
    cluster keep=4 ids=4
    fill r0 alice entries=20 among=r0,r1
    rest
    chores r0
    chores r1
    rest
    write r0 alice@100=v id=v seen=20
    drop r0->r2
    deliver r0->r1
    sync r0 r1
    deliver r1->r0
    crash r2
    lose r2
    start r2
    greet
    rejoin r2
    answer r0
"""
RESTART = """
    crash r0
    start r0
    greet
    tick 1s r0
    greet
"""


def test_a_learner_asks_anew_for_an_entry_that_its_peer_has_forgotten_to_be_chosen() -> None:
    """r0 has said that entry 21 is chosen, and lost that mark, which nothing but speed depends on, in a restart."""
    interpreter = Interpreter()
    play(interpreter, FORGETS + "drop r2->r0 Fetch" + RESTART)
    assert "r0 r1: chosen 20 at 0.r0.i1.b1, accepted [v]" in play(interpreter, "state alice")
    said = play(interpreter, "rejoin r2\ntick 4s r2\nrejoin r2")
    assert "asks r0" not in said, "it may still come"
    said = play(interpreter, "tick 2s r2\nrejoin r2")
    assert "r2 asks r0: what was promised and accepted" in said
    play(interpreter, "answer r0\nstabilize\nrejoin r2")
    assert "knows of [v] @100=v at 0.r0.i1.b1" in play(interpreter, "state alice")


def test_a_learner_that_can_be_compared_with_no_peer_has_the_last_entry_settled() -> None:
    """It was sent a state as of entry 21, which r0 and r1 do not know to be chosen, and has nothing as of entry 20."""
    interpreter = Interpreter()
    play(interpreter, FORGETS + "deliver r2->r0 Fetch\ndeliver r0->r2" + RESTART)
    said = play(interpreter, "state alice")
    assert "r0 r1: chosen 20 at 0.r0.i1.b1, accepted [v]" in said
    assert "r2: learning, chosen 21 at 0.r0.i1.b1, floor 21" in said
    play(interpreter, "sync r2\nrejoin r2\nanswer r1")
    for _ in range(SETTLE_ROUNDS - 1):
        assert "r2 asks r0: digests of alice" in play(interpreter, "answer r0\nrejoin r2"), "it may still be told"
    assert "r2 asks r0: settle alice/21" in play(interpreter, "answer r0\nrejoin r2")
    assert "r0 answers r2" in play(interpreter, "answer r0\nstabilize r0 r1")
    assert "r2 is voting" in play(interpreter, "answer r0\nanswer r1")


@pytest.mark.parametrize("phase", ["copying", "verifying"])
def test_a_learner_takes_no_answer_of_another_life_than_the_one_that_was_fenced(phase: str) -> None:
    """A process of a peer that was replaced meanwhile may still run, and its folder may be an old one."""
    interpreter = Interpreter()
    play(
        interpreter,
        """
        cluster
        write r0 alice@10=v id=v
        rest
        crash r2
        lose r2
        start r2
        greet
        rejoin r2
        """,
    )
    if phase == "verifying":
        play(interpreter, "answer r0\nstabilize\nrejoin r2\nanswer r1")
    asker, at, question = interpreter.questions("r0")[0]
    old: Life = (0, 1, 0)
    empty: dict[str, Message] = {
        "copying": AcceptedList([], b"", [], [], [], -1, b"", old),
        "verifying": Digests([], b"", b"", b"", -1, b"", old),
    }
    said = answer_by_hand(interpreter, asker, at, empty[phase])
    assert f"r2 is {phase}: r0: life {old} answers" in said
    said = play(interpreter, "rejoin r2")
    assert "r2 asks r0: " in said
    assert interpreter.questions("r0")[0][2] == question, "and so it goes on where it was"


def answer_by_hand(interpreter: Interpreter, asker: HandAnswered, at: int, message: Message) -> str:
    """What happens when this answers a question."""
    interpreter.group.events.clear()
    asker.answer(at, message)
    return "\n".join(interpreter.group.events)
