"""Interaction scripts: the consensus protocol as commands and their output, after etcd's raft (`testdata/*.txt`).

A script is a text file of blocks, each of them commands, a line `----`, and what happens; lines with `#` explain.

    # The first entry of a timeline waits for the disk of its own replica.
    write r0 alice@10=hello id=a
    ----
    r0 waits for its disk

`Interpreter.run` carries out one command on a `HandDriven` group and returns what happened (a script has `ok` for
nothing). Commands:

    cluster [replicas=3] [ids=128] [keep=256] [transfer=1048576]      start a group (W, log entries kept, bytes a piece)
    write rN OWNER@TIME[:ID]=VALUE ... id=REQUEST [seen=V] [if=V] [timeout=2s]
    delete rN OWNER@TIME[:ID] ... id=REQUEST ...      wipe rN OWNER id=REQUEST ...
    fill rN OWNER entries=N among=rN,rM     entries that these replicas alone hear of, one item each (@ENTRY=x)
    link rN OWNER window=A..B id=REQUEST    sink what rN has of a window into a file; commit the link to it
    unlink FILE                             remove a cold file
    settle rN OWNER/ENTRY [timeout=2s]      have a replica find out whether an entry was chosen
    get OWNER [limit=10]      newreader     have a reader ask for the newest items; another one, that has nothing cached
    rejoin rN                               begin to rejoin, or go on after a pause
    answer rN|cN ...          fail rN|cN    what the reader and the rejoin ask is answered, or not (c0: a cold node)
    read OWNER rN rM ...                    versions of these replicas, and what `Votes` makes of them
    look rN OWNER [have=V] [proof=V@BALLOT] what a reader gets from one replica
    fetch rN OWNER from=rM                  a comparison has shown rN that it is behind rM
    chores rN                               trim, evict, purge until nothing is left
    sync rN ...       tick TIME [rN ...]    fsync; move clocks on
    deliver|drop|copy SELECTION             SELECTION: `all`, `rN->rM`, `rN->` or `->rM`, then kinds of messages;
    hold SELECTION as=NAME                  `first` takes only one of them. `copy` delivers and keeps.
    release NAME                            `hold` puts messages aside
    messages          state OWNER           lives
    stabilize [rN ...]                      sync and deliver until nothing is left; prints answers only
    rest                                    the same, and then a second passes: all that is known is on all disks
    crash rN [keep=none|all|COUNT]          COUNT: writes not fsync'd that had reached the disk all the same
    start rN [boot=N] restart rN            the next life; `restart` also has all replicas greet each other
    pause rN          resume rN             a process stands still
    lose rN                                 the disk of a replica that is down is gone: a further incarnation
    copydisk rN as=NAME   putback rN NAME   keep a copy of the disk of a replica that is down; replace the disk by one

Ballots are `ROUND.LIFE`, lives `rN.iINCARNATION.bBOOT`: see `interaction_text`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from interaction_answers import answer_text, version_and_open
from interaction_calls import HandAnswered
from interaction_command import Command, ScriptError, parse_ballot, replica_number, request_id, seconds
from interaction_group import Flight, HandDriven, Member
from interaction_reader import ScriptedReader, Shelf
from interaction_rejoin import ScriptedRejoin
from interaction_text import life_text, message_text, owner_key
from timetier.cluster.cold.link import encode_link
from timetier.cluster.errors import Unavailable
from timetier.cluster.keys import bucket_of, system_timeline
from timetier.cluster.memory.votes import OPEN, PROVEN, Votes
from timetier.cluster.messages import (
    DELETE,
    DELTA,
    PUT,
    WIPE,
    AskAccepted,
    AskDigests,
    AskVersions,
    BlockRead,
    Check,
    Known,
    Message,
    Settle,
    Versions,
    Write,
    pack_i64,
    pack_u32,
)
from timetier.cluster.paxos.core import Settings


class Interpreter:
    """Carries out the commands of one script. Every command is a method `_do_NAME`."""

    def __init__(self) -> None:
        self._group: HandDriven | None = None
        self._aside: dict[str, list[Flight]] = {}
        self._folders: dict[str, Member] = {}
        self._asked: dict[int, tuple[str, Callable[[Message], None]]] = {}  # token -> what was asked, and for whom
        self._tokens = 0
        self._shelf = Shelf()
        self._reader = ScriptedReader(3, self._say)
        self._rejoins: dict[int, ScriptedRejoin] = {}

    def run(self, line: str) -> str:
        """What happens on one command, as lines."""
        command = Command.parse(line)
        method: Callable[[Command], None] | None = getattr(self, f"_do_{command.name}", None)
        if method is None:
            raise ScriptError(f"there is no command {command.name!r}")
        if self._group is not None:
            self._group.events.clear()
        method(command)
        return "\n".join(self.group.events)

    @property
    def group(self) -> HandDriven:
        if self._group is None:
            raise ScriptError("begin with `cluster`")
        return self._group

    def _say(self, text: str) -> None:
        self.group.events.append(text)

    # ---- the group and its replicas

    def _do_cluster(self, command: Command) -> None:
        settings = Settings(
            request_id_entries=command.number("ids", 128),
            log_keep_entries=command.number("keep", 256),
            transfer_bytes=command.number("transfer", 1 << 20),
        )
        self._group = HandDriven(command.number("replicas", 3), settings)
        self._group.on_answer = self._on_answer
        self._reader = ScriptedReader(len(self._group.members), self._say)
        self._shelf = Shelf()
        self._rejoins = {}
        self._group.events.clear()

    def _do_start(self, command: Command) -> None:
        number = command.replica()
        self.group.start(number, command.number("boot", 0))
        self._say_state(number)

    def _do_restart(self, command: Command) -> None:
        number = command.replica()
        self.group.start(number)
        self.group.join(number)
        self.group.events.clear()
        self._say_state(number)

    def _say_state(self, number: int) -> None:
        replica = self.group.replica(number)
        self._say(f"r{number} is {replica.state} as {life_text(replica.core.life)}")

    def _do_crash(self, command: Command) -> None:
        known = {"none": 0, "all": 1 << 30}
        keep = command.option("keep", "none")
        self.group.crash(command.replica(), known[keep] if keep in known else command.number("keep"))

    def _do_pause(self, command: Command) -> None:
        self.group.members[command.replica()].paused = True

    def _do_resume(self, command: Command) -> None:
        self.group.members[command.replica()].paused = False

    def _do_lose(self, command: Command) -> None:
        self.group.lose_disk(command.replica())

    def _do_copydisk(self, command: Command) -> None:
        self._folders[command.option("as")] = self.group.copy_disk(command.replica())

    def _do_putback(self, command: Command) -> None:
        self.group.put_back(command.replica(), self._folders[command.args[1]])

    def _do_sync(self, command: Command) -> None:
        for number in command.replicas():
            self.group.sync(number)

    def _do_tick(self, command: Command) -> None:
        for number in command.replicas() or self.group.up():
            self.group.tick(number, seconds(command.args[0]))

    def _do_chores(self, command: Command) -> None:
        number = command.replica()
        member, replica = self.group.members[number], self.group.replica(number)
        before = len(list(member.engine.scan(b"R", b"S")))
        while replica.run_chores(member.now):
            pass
        self.group.after_step(number)
        gone = before - len(list(member.engine.scan(b"R", b"S")))
        left = replica.chores.pending
        self._say(f"r{number} deletes {gone} rows" + (f", {left} chores left" if left else ""))

    # ---- messages in flight

    def _select(self, command: Command) -> list[Flight]:
        where, *kinds = command.args or ["all"]
        once = "first" in kinds
        kinds = [kind for kind in kinds if kind != "first"]
        source, arrow, target = where.partition("->")
        if where != "all" and not arrow:
            raise ScriptError(f"{where!r} selects nothing: write all, r0->r1, r0-> or ->r1")
        found = [
            flight
            for flight in self.group.flights
            if (where == "all" or not source or flight.source == replica_number(source))
            and (where == "all" or not target or flight.target == replica_number(target))
            and (not kinds or message_text(flight.message).split()[0] in kinds)
        ]
        if not found:
            raise ScriptError(f"no message in flight is meant by {' '.join(command.args)!r}")
        return found[:1] if once else found

    def _take(self, command: Command) -> list[Flight]:
        found = self._select(command)
        for flight in found:
            self.group.flights.remove(flight)
        return found

    def _do_deliver(self, command: Command) -> None:
        for flight in self._take(command):
            if self.group.members[flight.target].paused:
                self.group.flights.append(flight)
            else:
                self.group.deliver(flight)

    def _do_copy(self, command: Command) -> None:
        for flight in self._select(command):
            self.group.deliver(flight)

    def _do_drop(self, command: Command) -> None:
        for flight in self._take(command):
            self._say(f"lost: {flight}")

    def _do_hold(self, command: Command) -> None:
        for flight in self._take(command):
            self._aside.setdefault(command.option("as"), []).append(flight)
            self._say(f"held: {flight}")

    def _do_release(self, command: Command) -> None:
        self.group.flights += self._aside.pop(command.args[0])

    def _do_messages(self, _command: Command) -> None:
        for flight in self.group.flights:
            self._say(str(flight))
        for name, flights in self._aside.items():
            for flight in flights:
                self._say(f"{name}: {flight}")
        if not self.group.events:
            self._say("none")

    def _do_stabilize(self, command: Command) -> None:
        self.group.stabilize(command.replicas() or self.group.up())
        self._keep_answers()

    def _do_rest(self, _command: Command) -> None:
        self.group.rest()
        self._keep_answers()

    def _keep_answers(self) -> None:
        events = self.group.events
        events[:] = [event for event in events if " answers " in event or event.startswith("reader ")]

    # ---- requests

    def _ask(self, number: int, what: str, message: Message, then: Callable[[Message], None] = lambda _m: None) -> None:
        """Give a request to a replica. Its answer is printed when it comes, and given to `then`."""
        self._tokens += 1
        self._asked[self._tokens] = what, then
        replica, now = self.group.replica(number), self.group.members[number].now
        try:
            if isinstance(message, Write):
                replica.write(now, self._tokens, message)
            elif isinstance(message, Settle):
                replica.settle(now, self._tokens, message)
            elif isinstance(message, AskVersions | Check | AskAccepted | AskDigests):
                replica.ask(now, self._tokens, message)
        except Unavailable as error:
            self._say(f"r{number} refuses: {error.message}")
            return
        self.group.after_step(number)

    def _on_answer(self, number: int, token: int, message: Message) -> None:
        what, then = self._asked.pop(token)
        self._say(f"r{number} answers {what}: {answer_text(message)}")
        then(message)

    def _send_write(self, command: Command, key: bytes, mutations: list[tuple[int, bytes, bytes]]) -> None:
        name = command.option("id")
        message = Write(
            1,
            [key],
            [request_id(name)],
            pack_i64([command.number("seen", 0)]),
            pack_i64([command.number("if", -1)]),
            pack_u32([len(mutations)]),
            bytes(kind for kind, _, _ in mutations),
            [item for _, item, _ in mutations],
            [content for _, _, content in mutations],
            command.milliseconds("timeout", "2s"),
        )
        self._ask(command.replica(), name, message)

    def _do_write(self, command: Command) -> None:
        key, items = command.items()
        self._send_write(command, key, [(PUT, item, value) for item, value in items])

    def _do_fill(self, command: Command) -> None:
        """Entries of no interest: each is chosen and applied by `among`, and no other replica hears of it."""
        number, owner = command.replica(), command.args[1]
        among = [replica_number(word) for word in command.option("among").split(",")]
        timeline = self.group.replica(number).core.timeline(owner_key(owner))
        first = timeline.chosen + 1
        for _ in range(command.number("entries")):
            entry = timeline.chosen + 1
            options = {"id": f"fill{entry}", "seen": str(timeline.chosen)}
            self._do_write(Command("write", [f"r{number}", f"{owner}@{entry}=x"], options))
            self.group.stabilize(among)
            self.group.flights[:] = [f for f in self.group.flights if f.source not in among or f.target in among]
            if timeline.chosen < entry:
                raise ScriptError(f"entry {entry} was not chosen")
        self.group.events.clear()
        self._say(f"{command.option('among')}: entries {first}..{timeline.chosen}")

    def _do_delete(self, command: Command) -> None:
        key, items = command.items()
        self._send_write(command, key, [(DELETE, item, b"") for item, _ in items])

    def _do_wipe(self, command: Command) -> None:
        self._send_write(command, command.owner(), [(WIPE, b"", b"")])

    def _do_link(self, command: Command) -> None:
        key = command.owner()
        low, high = map(int, command.option("window").split(".."))
        link = self._shelf.sink(self.group, command.replica(), key, (low, high))
        self._send_write(command, system_timeline(bucket_of(key)), [(PUT, link.key, encode_link(link))])

    def _do_unlink(self, command: Command) -> None:
        del self._shelf.files[command.args[0]]

    def _do_settle(self, command: Command) -> None:
        owner, _, entry = command.args[1].partition("/")
        message = Settle([owner_key(owner)], pack_i64([int(entry)]), command.milliseconds("timeout", "2s"))
        self._ask(command.replica(), f"settle {command.args[1]}", message)

    def _do_fetch(self, command: Command) -> None:
        number, peer, key = command.replica(), replica_number(command.option("from")), command.owner()
        chosen = self.group.replica(peer).core.timeline(key).chosen
        if not self.group.replica(number).note_behind(self.group.members[number].now, peer, key, chosen):
            self._say(f"r{number} is not behind")
        self.group.after_step(number)

    # ---- questions

    def _do_read(self, command: Command) -> None:
        votes = Votes(len(self.group.members))
        for number in command.replicas():
            if number not in self.group.up():
                self._say(f"r{number} does not answer")
                continue
            self._ask(number, "read", AskVersions([command.owner(0)]), partial(_count, votes, f"r{number}"))
        verdict = votes.verdict()
        if verdict.state == PROVEN:
            self._say(f"proven: version {verdict.version}")
        elif verdict.state == OPEN:
            self._say(f"nobody can tell whether entry {verdict.version} was chosen")
        else:
            self._say("too few answers")

    def _do_look(self, command: Command) -> None:
        known = []
        if "proof" in command.options:
            entry, ballot = command.option("proof").split("@")
            known = [Known(0, int(entry), parse_ballot(ballot))]
        message = Check(
            [command.owner()],
            pack_i64([command.number("have", -1)]),
            bytes((DELTA,)),
            [b""],
            pack_u32([1000]),
            known,
        )
        self._ask(command.replica(), "look", message)

    def _do_get(self, command: Command) -> None:
        self._reader.get(command.owner(0), command.number("limit", 10))

    def _do_newreader(self, _command: Command) -> None:
        self._reader = ScriptedReader(len(self.group.members), self._say)

    def _do_rejoin(self, command: Command) -> None:
        number = command.replica()
        rejoin = self._rejoins.get(number)
        if rejoin is None or not rejoin.is_of_present_life:
            rejoin = self._rejoins[number] = ScriptedRejoin(self.group, number, self._say)
        if rejoin.asks:
            raise ScriptError(f"the rejoin of r{number} waits for answers")
        rejoin.go_on()

    def _do_answer(self, command: Command) -> None:
        for name in command.args:
            for asker, at, message in self.questions(name):
                if isinstance(message, BlockRead):
                    asker.answer(at, self._shelf.read(message))
                    continue
                self._ask(replica_number(name), asker.name, message, partial(asker.answer, at))

    def _do_fail(self, command: Command) -> None:
        for name in command.args:
            for asker, at, _ in self.questions(name):
                asker.answer(at, None)

    def questions(self, name: str) -> list[tuple[HandAnswered, int, Message]]:
        """What waits for an answer of a node."""
        askers: list[HandAnswered] = [self._reader, *self._rejoins.values()]
        found = [(asker, *question) for asker in askers for question in asker.waiting(name)]
        if not found:
            raise ScriptError(f"nobody waits for an answer of {name}")
        return found

    def _do_state(self, command: Command) -> None:
        described: dict[str, list[int]] = {}
        for number in range(len(self.group.members)):
            described.setdefault(self.group.describe(number, command.owner(0)), []).append(number)
        for text, numbers in described.items():
            self._say(f"{' '.join(f'r{number}' for number in numbers)}: {text}")

    def _do_lives(self, _command: Command) -> None:
        for number in self.group.up():
            lives = self.group.replica(number).core.lives
            self._say(f"r{number} knows {', '.join(life_text(lives[peer]) for peer in sorted(lives))}")


def _count(votes: Votes, name: str, answer: Message) -> None:
    assert isinstance(answer, Versions), "a question for versions is answered by versions"
    votes.add(name, *version_and_open(answer))
