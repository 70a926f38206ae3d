"""Makes the planned faults happen, and ends all of them when the clients are done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from timetier.cluster.cold.service import ColdService
from timetier.cluster.errors import TimeTierError
from timetier.cluster.messages import DISK_SERVES, DiskReplace, DiskRetry, Message

from .disk import SimDisk
from .network import Weather
from .plan import Fault
from .workload import Workload
from .world import World

POWER_CUT_S = 0.3
OPERATOR_S = 0.2  # between two looks of whoever mends disks

_WEATHERS = (
    Weather(dropped=0.02),
    Weather(dropped=0.2),
    Weather(doubled=0.1, late_s=0.5),
    Weather(straggling=0.2, late_s=0.3),
    Weather(dropped=0.05, doubled=0.05, straggling=0.1, late_s=2.0),
)


class Faults:
    """The faults of one run."""

    def __init__(self, world: World, workload: Workload) -> None:
        self._world = world
        self._workload = workload
        self._over = False
        self._ends: dict[str, Callable[[], None]] = {}  # of faults that are on, by what they are on
        self._damaged: set[str] = set()

    def begin(self) -> None:
        """Plan the faults of the run."""
        self._world.network.weather = self._world.weather
        for fault in self._world.plan.faults:
            self._world.later(fault.at_s, lambda fault=fault: self._happen(fault))  # type: ignore[misc]

    def end(self) -> None:
        """End all faults: nodes run, links work, disks have room."""
        self._over = True
        world = self._world
        world.trace.note("faults", "are over")
        world.network.heal()
        for end in list(self._ends.values()):
            end()
        for node in world.nodes.values():
            node.disk.crash_after = None
            node.disk.full = node.disk.failing = False
            node.slow = 1.0
            if node.life is None:
                world.start(node.name)

    def _happen(self, fault: Fault) -> None:
        if self._over:
            return
        self._world.trace.note("fault", str(fault))
        _HAPPENS[fault.kind](self, fault)

    def _until(self, what: str, lasts_s: float, end: Callable[[], None]) -> None:
        """Have a fault end after some time, or with all others. A fault on the same thing replaces it."""

        def over() -> None:
            if self._ends.get(what) is over:
                del self._ends[what]
                self._world.trace.note("fault", f"{what} is over")
                end()

        self._ends[what] = over
        self._world.later(lasts_s, over)

    # ------------------------------------------------------------ processes

    def _crash(self, fault: Fault) -> None:
        self._world.nodes[fault.node].restart_s = fault.lasts_s
        self._world.crash(fault.node)

    def _crash_at_disk(self, fault: Fault) -> None:
        node = self._world.nodes[fault.node]
        node.restart_s, node.disk.crash_after = fault.lasts_s, int(fault.amount)

    def _crash_all(self, fault: Fault) -> None:
        for name, node in self._world.nodes.items():
            node.restart_s = POWER_CUT_S
            self._world.crash(name, "power cut")

    def _pause(self, fault: Fault) -> None:
        life = self._world.nodes[fault.node].life
        if life is not None:
            self._world.loop.pause(life)
            self._until(f"pause of {fault.node}", fault.lasts_s, lambda: self._world.loop.resume(life))

    def _kill_client(self, fault: Fault) -> None:
        self._workload.kill_client(fault.node)

    def _sink(self, fault: Fault) -> None:
        self._workload.run_sink(f"sink-{fault.number}", killed_after_s=fault.lasts_s)

    # ------------------------------------------------------------ network

    def _isolate(self, fault: Fault) -> None:
        names = [name for name in (*self._world.nodes, *self._workload.names()) if name != fault.node]
        self._cut_links([(fault.node, n) for n in names] + [(n, fault.node) for n in names], fault)

    def _cut(self, fault: Fault) -> None:
        self._cut_links([(fault.node, fault.other), (fault.other, fault.node)], fault)

    def _cut_one_way(self, fault: Fault) -> None:
        self._cut_links([(fault.node, fault.other)], fault)

    def _cut_links(self, links: list[tuple[str, str]], fault: Fault) -> None:
        network = self._world.network
        for source, target in links:
            network.cut(source, target)

        def mend() -> None:
            for source, target in links:
                network.mend(source, target)

        self._until(f"cut {fault.number}", fault.lasts_s, mend)

    def _slow_link(self, fault: Fault) -> None:
        network = self._world.network
        network.slow_down(fault.node, fault.other, fault.amount)
        end = f"slow link from {fault.node} to {fault.other}"
        self._until(end, fault.lasts_s, lambda: network.slow_down(fault.node, fault.other, 0.0))

    def _weather(self, fault: Fault) -> None:
        network = self._world.network
        network.weather = _WEATHERS[fault.number % len(_WEATHERS)]

        def clear() -> None:
            network.weather = self._world.weather

        self._until("weather", fault.lasts_s, clear)

    # ------------------------------------------------------------ disks

    def _slow_disk(self, fault: Fault) -> None:
        node = self._world.nodes[fault.node]
        node.slow = 50.0

        def end() -> None:
            node.slow = 1.0

        self._until(f"slow disk of {fault.node}", fault.lasts_s, end)

    def _full_disk(self, fault: Fault) -> None:
        disk = self._world.nodes[fault.node].disk
        disk.full = True

        def end() -> None:
            disk.full = False

        self._until(f"full disk of {fault.node}", fault.lasts_s, end)

    def _broken_disk(self, fault: Fault) -> None:
        disk = self._world.nodes[fault.node].disk
        disk.failing = True

        def end() -> None:
            disk.failing = False

        self._until(f"broken disk of {fault.node}", fault.lasts_s, end)

    # ------------------------------------------------------------ loss of a replica's data

    def _lose(self, name: str, how: Callable[[SimDisk], bool]) -> None:
        """Have a node crash, and have something happen to its folder before it starts again."""
        world = self._world
        if self._over or not world.may_lose():
            return
        disk = world.nodes[name].disk
        world.crash(name, "before it loses data")
        if how(disk):
            world.trace.note("fault", f"{name} has lost data")
            world.lost(name)
        world.start(name)

    def _wipe(self, fault: Fault) -> None:
        def wipe(disk: SimDisk) -> bool:
            disk.wipe()
            return True

        self._lose(fault.node, wipe)

    def _old_folder(self, fault: Fault) -> None:
        """Copy a folder, let the node live another life on it, and put the copy back. Without that other life, noted
        by the peers, nobody could tell (see docs/guarantees.md)."""
        saved = self._world.nodes[fault.node].disk.copy_folder()

        def put(disk: SimDisk) -> bool:
            disk.put_folder(saved)
            return True

        def put_back() -> None:
            now = self._world.nodes[fault.node].disk.identity
            if now and saved[1] and now["boot"] > saved[1]["boot"] and self._world.life_is_noted(fault.node):
                self._lose(fault.node, put)

        self._world.later(fault.lasts_s / 2, lambda: self._restart(fault.node))
        self._world.later(fault.lasts_s, put_back)

    def _restart(self, name: str) -> None:
        if not self._over:
            self._world.crash(name)
            self._world.start(name)

    def _flip_log(self, fault: Fault) -> None:
        self._lose(fault.node, lambda disk: disk.engine.flip_bit())

    def _flip_row(self, fault: Fault) -> None:
        self._lose(fault.node, lambda disk: disk.engine.flip_row_bit(disk.random))

    # ------------------------------------------------------------ clocks and cold files

    def _clock_jump(self, fault: Fault) -> None:
        self._world.skew_us[fault.node] += int(fault.amount * 1e6)

    def _flip_cold(self, fault: Fault) -> None:
        folder = self._world.nodes[fault.node].cold
        files = folder.files()
        if files:
            self._world.cold_copies_needed = self._world.topology.cold_replicas - 1
            if len(files) > 1 and int(fault.amount) % 3 == 0:
                folder.swap(files[0], files[1 + int(fault.amount) % (len(files) - 1)])
                return
            folder.flip_bit(files[int(fault.amount) % len(files)], int(fault.amount) // 7)

    def _lose_cold(self, fault: Fault) -> None:
        folder = self._world.nodes[fault.node].cold
        files = folder.files()
        if files:
            self._world.cold_copies_needed = self._world.topology.cold_replicas - 1
            folder.lose(files[int(fault.amount) % len(files)])

    def _fail_cold_disk(self, fault: Fault) -> None:
        """A disk of a cold node fails for a while; then it works again, or another one takes its place."""
        folder = self._world.nodes[fault.node].cold
        ordinal, changed = divmod(int(fault.amount), 2)
        name = f"disk-{ordinal}"
        folder.failing.add(name)
        self._world.lost_disks.add(fault.node)

        def end() -> None:
            folder.failing.discard(name)
            if changed:
                self._world.cold_copies_needed = self._world.topology.cold_replicas - 1
                folder.change_disk(name)
            self._operate(fault.node, ordinal, name)

        self._until(f"{name} of {fault.node}", fault.lasts_s, end)

    def _operate(self, node: str, ordinal: int, name: str) -> None:
        """What an operator does until a disk serves again: has it retried, or replaced when it is empty."""
        world = self._world
        found = world.nodes[node]
        if name in found.cold.failing:
            return  # it has failed again; whoever ends that goes on
        disk = None if found.service is None or found.life is None else found.service.keeper.disk(ordinal)
        if disk is not None and found.life is not None:
            empty = not any(path.parent.name == name for path in found.cold.names)
            serves = disk.state == DISK_SERVES  # with an empty one: nobody has asked anything of it since
            if serves and not empty:
                return
            if serves or not disk.readable:
                message = DiskReplace(ordinal, serves) if empty else DiskRetry(ordinal)
                world.loop.spawn(found.life, _order(found.service, message))
        world.later(OPERATOR_S, lambda: self._operate(node, ordinal, name))


async def _order(service: ColdService, message: Message) -> None:
    with contextlib.suppress(TimeTierError):  # the operator tries again
        await service.handle(message)


_HAPPENS: dict[str, Callable[[Faults, Fault], None]] = {
    "crash": Faults._crash,
    "crash at disk": Faults._crash_at_disk,
    "crash all": Faults._crash_all,
    "pause": Faults._pause,
    "isolate": Faults._isolate,
    "cut": Faults._cut,
    "one-way cut": Faults._cut_one_way,
    "slow link": Faults._slow_link,
    "weather": Faults._weather,
    "slow disk": Faults._slow_disk,
    "full disk": Faults._full_disk,
    "broken disk": Faults._broken_disk,
    "clock jump": Faults._clock_jump,
    "kill client": Faults._kill_client,
    "flip cold": Faults._flip_cold,
    "lose cold": Faults._lose_cold,
    "fail cold disk": Faults._fail_cold_disk,
    "sink": Faults._sink,
    "wipe": Faults._wipe,
    "old folder": Faults._old_folder,
    "flip log": Faults._flip_log,
    "flip row": Faults._flip_row,
}
